"""A real PostgreSQL with a database and a user that has a password."""

import contextlib
import glob
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import tempfile

from . import free_port, listening, running, wait_until

PROGRAMS = "initdb", "postgres", "psql"
PASSWORD = "p@ss/w:rd#1%"  # in an address: p%40ss%2Fw%3Ard%231%25


def program(name):
    """The path of a program, None when it is not installed; Debian keeps most of them outside the PATH."""
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)


def missing():
    """The names of the programs that are not installed: a reason to skip."""
    return [name for name in PROGRAMS if not program(name)]


@contextlib.contextmanager
def postgres():
    """Run PostgreSQL; yields the port. It refuses to run as root, and then runs as nobody, in a folder of its own."""
    root = os.geteuid() == 0
    user = ["setpriv", "--reuid=nobody", f"--regid={pwd.getpwnam('nobody').pw_gid}", "--clear-groups"] if root else []
    directory = pathlib.Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        data, password, log, port = directory / "data", directory / "password", directory / "log", free_port()
        password.write_text(PASSWORD)
        if root:
            for path in directory, password:
                shutil.chown(path, "nobody")
        options = "-U bot -A scram-sha-256 --no-sync -E UTF8 --locale=C".split()
        command = [*user, program("initdb"), "-D", data, "--pwfile", password, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=directory)
        if done.returncode:
            raise RuntimeError(f"initdb: {done.stderr[-2000:]}")
        command = [*user, program("postgres"), "-D", data, "-p", port, "-h", "127.0.0.1", "-k", "", "-c", "fsync=off"]
        with running(command, log) as server:
            wait_until(lambda: listening(port), "postgres", log, server)
            try:
                wait_until(lambda: query(port, "SELECT 1") == "1", "postgres", log, server)
                yield port
            finally:  # at once, but by itself: killed, it would leave a piece of shared memory behind
                with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
                    os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
                    server.wait(20)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def query(port, sql, database="postgres"):
    """What psql answers, not one of our own libraries."""
    command = [program("psql"), *f"-h 127.0.0.1 -p {port} -U bot -d {database} -qAtXc".split(), sql]
    env = {**os.environ, "PGPASSWORD": PASSWORD}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    return done.stdout.strip()
