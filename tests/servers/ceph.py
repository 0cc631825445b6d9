"""A real Ceph of one node with its Object Gateway: one monitor and one OSD that keeps everything in memory."""

import contextlib
import pathlib
import secrets
import shutil
import subprocess
import uuid

from . import environment, free_port, listening, running, wait_until

PROGRAMS = "ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin"

# No keys between the daemons, no copies, no admin sockets (their paths may be at most 107 bytes long), no waiting in
# the monitor (it collects changes for a second by default), and no end when the disk of the logs is nearly full.
# A client does not know the cluster's fsid in the first moment, and the monitor refuses what it says then ("wrong
# fsid", EPERM). An OSD would stop: so it shall not put itself into the map. The others are asked again. Without
# tcp_nodelay every small answer of the gateway takes 40 ms.
CONF = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
public network = 127.0.0.0/8
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
admin socket =
run dir = {directory}
log file = {directory}/$name.log
[mon]
mon data = {directory}/mon
mon data avail crit = 0
paxos propose interval = 0.01
paxos min wait = 0.01
[osd]
osd data = {directory}/osd
osd objectstore = memstore
memstore device bytes = 8589934592
osd crush update on start = false
osd class update on start = false
osd class load list = *
osd class default list = *
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw dns name = localhost
rgw rados pool pg num min = 1
"""


def missing():
    """The names of the programs that are not installed: a reason to skip."""
    return [program for program in PROGRAMS if not shutil.which(program)]


@contextlib.contextmanager
def ceph(directory):
    """Run Ceph's monitor, OSD and Object Gateway; yields the environment variables of a user.

    OTHER_ACCESS_KEY_ID and OTHER_SECRET_ACCESS_KEY belong to a second user. The logs are in the directory.
    """
    directory = pathlib.Path(directory).resolve()
    for name in "mon", "osd":
        (directory / name).mkdir()
    fsid, osd_uuid, mon_port, port = str(uuid.uuid4()), str(uuid.uuid4()), free_port(), free_port()
    conf, monmap = directory / "ceph.conf", directory / "monmap"
    conf.write_text(CONF.format(fsid=fsid, mon_port=mon_port, port=port, directory=directory))

    def run(program, *arguments, tries=1):
        for _ in range(tries):
            done = subprocess.run([program, "-c", conf, *arguments], capture_output=True, text=True, timeout=60)
            if not done.returncode:
                return done.stdout
        raise RuntimeError(f"{program} {' '.join(map(str, arguments))}: {done.stderr[-2000:]}")

    def daemon(name, *command):
        return stack.enter_context(running([*command, "-c", conf, "-f"], directory / f"{name}.out"))

    with contextlib.ExitStack() as stack:
        run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", "--fsid", fsid, monmap)
        run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        mon = daemon("mon", "ceph-mon", "-i", "a", "--public-addr", f"v1:127.0.0.1:{mon_port}")
        wait_until(lambda: listening(mon_port), "ceph-mon", directory / "mon.out", mon)
        run("ceph", "osd", "new", osd_uuid, tries=20)
        run("ceph", "osd", "crush", "add", "osd.0", "1", "host=one", "root=default", tries=20)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        osd = daemon("osd", "ceph-osd", "-i", "0")
        osd_is_up = lambda: " 1 up" in run("ceph", "osd", "stat", tries=20)
        wait_until(osd_is_up, "ceph-osd", directory / "osd.out", mon, osd)
        gateway = daemon("rgw", "radosgw", "-n", "client.rgw")
        wait_until(lambda: listening(port), "radosgw", directory / "rgw.out", mon, osd, gateway)
        keys = {}
        create = "-n client.rgw user create --display-name user --uid".split()
        for user in "AWS", "OTHER":
            key, secret = secrets.token_hex(10).upper(), secrets.token_hex(20)
            run("radosgw-admin", *create, user, "--access-key", key, "--secret-key", secret)
            keys |= {f"{user}_ACCESS_KEY_ID": key, f"{user}_SECRET_ACCESS_KEY": secret}
        yield environment(port, keys)
