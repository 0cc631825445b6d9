"""The servers of the other tests do what they say: round trips, the proxy's transparency and each of its faults."""

import contextlib
import hashlib
import http.client
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import boto3
import botocore.exceptions
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from servers import ceph, environment, free_port, listening, running, wait_until
from servers.fault_proxy import fault_proxy

MB = 1 << 20


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No setting of the person who runs the tests gets in."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")


@pytest.fixture(scope="session")
def rclone_env(tmp_path_factory):
    """The environment variables of a running `rclone serve s3`, which checks signatures."""
    directory, port = tmp_path_factory.mktemp("rclone"), free_port()
    program = shutil.which("rclone", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    (directory / "data").mkdir()
    with running([program, "serve", "s3", "--config", directory / "none", "--addr", f"127.0.0.1:{port}",
                  "--auth-key", "key,secret", directory / "data"], directory / "rclone.log") as server:
        wait_until(lambda: listening(port), "rclone", directory / "rclone.log", server)
        yield environment(port, "key", "secret")


@pytest.fixture(params=["ceph_env", "moto_env"])
def env(request):
    """Each of the servers that the other tests share."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["rclone_env", "moto_env"])
def upstream(request):
    """Each of the servers that stand behind the proxy here."""
    return request.getfixturevalue(request.param)


def client(env, url=None, retries=0, key="AWS_ACCESS_KEY_ID", secret="AWS_SECRET_ACCESS_KEY"):
    """A boto3 client for a server, or for the proxy in front of it."""
    config = Config(signature_version="s3v4", retries={"mode": "standard", "max_attempts": retries},
                    s3={"addressing_style": "path"})
    return boto3.client("s3", endpoint_url=url or env["AWS_ENDPOINT_URL"], aws_access_key_id=env[key],
                        aws_secret_access_key=env[secret], region_name=env["AWS_REGION"], config=config)


def bucket(env, name):
    """A new bucket with a small object, b"0123456789" at `digits`."""
    s3 = client(env)
    s3.create_bucket(Bucket=name)
    s3.put_object(Bucket=name, Key="digits", Body=b"0123456789")
    return s3


def signed(s3, method, **params):
    """A request for http.client, signed by boto3: host and path."""
    url = urllib.parse.urlsplit(s3.generate_presigned_url(method, Params=params))
    return url.netloc, f"{url.path}?{url.query}"


def keys(s3, name):
    """The keys of a bucket."""
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=name).get("Contents", [])]


def round_trip(s3, name):
    """Put, get, list, copy, multipart and delete."""
    s3.create_bucket(Bucket=name)
    odd = "ordner/Größe +%20&=~(1).txt"
    s3.put_object(Bucket=name, Key=odd, Body=b"hello")
    assert s3.get_object(Bucket=name, Key=odd)["Body"].read() == b"hello"
    assert s3.get_object(Bucket=name, Key=odd, Range="bytes=1-2")["Body"].read() == b"el"
    assert s3.head_object(Bucket=name, Key=odd)["ContentLength"] == 5
    with pytest.raises(s3.exceptions.NoSuchKey):
        s3.get_object(Bucket=name, Key="nothing")
    s3.put_object(Bucket=name, Key="empty", Body=b"")
    assert s3.get_object(Bucket=name, Key="empty")["Body"].read() == b""
    s3.copy_object(Bucket=name, Key="copy", CopySource={"Bucket": name, "Key": odd})
    assert s3.get_object(Bucket=name, Key="copy")["Body"].read() == b"hello"
    upload = s3.create_multipart_upload(Bucket=name, Key="parts")["UploadId"]
    bodies = [random.randbytes(5 * MB), b"end"]
    tags = [s3.upload_part(Bucket=name, Key="parts", UploadId=upload, PartNumber=number, Body=body)["ETag"]
            for number, body in enumerate(bodies, 1)]
    parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
    s3.complete_multipart_upload(Bucket=name, Key="parts", UploadId=upload, MultipartUpload={"Parts": parts})
    assert s3.get_object(Bucket=name, Key="parts")["Body"].read() == b"".join(bodies)
    assert sorted(keys(s3, name)) == sorted([odd, "copy", "empty", "parts"])
    s3.delete_object(Bucket=name, Key="copy")
    s3.delete_objects(Bucket=name, Delete={"Objects": [{"Key": odd}, {"Key": "empty"}, {"Key": "parts"}]})
    assert keys(s3, name) == []
    s3.delete_bucket(Bucket=name)


def test_round_trip(env):
    round_trip(client(env), "round-trip")


def test_ceph_has_two_users_and_checks_keys(ceph_env):
    bucket(ceph_env, "mine")
    other = client(ceph_env, key="OTHER_ACCESS_KEY_ID", secret="OTHER_SECRET_ACCESS_KEY")
    other.create_bucket(Bucket="theirs")
    mixed = client(ceph_env, secret="OTHER_SECRET_ACCESS_KEY")
    for s3, name, code in (other, "mine", "AccessDenied"), (mixed, "mine", "SignatureDoesNotMatch"):
        with pytest.raises(botocore.exceptions.ClientError, match=code):
            s3.get_object(Bucket=name, Key="digits")
    with pytest.raises(botocore.exceptions.ClientError, match="BucketAlreadyExists"):
        client(ceph_env).create_bucket(Bucket="theirs")


def test_ceph_leaves_nothing_behind_when_it_does_not_start(ceph_env, monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        mon_port, port = free_port(), taken.getsockname()[1]
        ports = iter([mon_port, port])
        monkeypatch.setattr(ceph, "free_port", lambda: next(ports))
        with pytest.raises(RuntimeError, match="(?s)radosgw has stopped.*Address already in use"):
            ceph.ceph(tmp_path).__enter__()
    assert not listening(mon_port)


@pytest.mark.parametrize("how", ["block ends", "starter is killed", "server dies"])
def test_a_server_does_not_outlive_its_starter(how, tmp_path):
    """Not even when a thread that is gone has started it, a child still holds its pipe, or nobody can clean up."""
    port, log = free_port(), tmp_path / "log"
    server = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    if how == "starter is killed":
        code = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from servers import listening, running, wait_until
context = running({server!r}, {str(log)!r})
thread = threading.Thread(target=context.__enter__)
thread.start(), thread.join()
wait_until(lambda: listening({port}), "server", {str(log)!r})
time.sleep(0.2)
print(listening({port}), flush=True)
os.kill(os.getpid(), signal.SIGKILL)"""
        starter = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert (starter.returncode, starter.stdout) == (-signal.SIGKILL, "True\n")
    elif how == "block ends":
        with running(server, log) as guard:
            wait_until(lambda: listening(port), "server", log, guard)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"],
                                     pass_fds=[guard.stdin.fileno()])
            start = time.monotonic()
        assert not listening(port) and time.monotonic() - start < 10
        child.kill()
        child.wait()
    else:
        with socket.create_server(("127.0.0.1", port)), running(server, log) as guard:
            with pytest.raises(RuntimeError, match="(?s)the web has stopped.*Address already in use"):
                wait_until(lambda: False, "the web", log, guard)
    wait_until(lambda: not listening(port), "end of the server", log, seconds=5)


def test_proxy_is_transparent(upstream):
    with fault_proxy(upstream["AWS_ENDPOINT_URL"]) as proxy:
        round_trip(client(upstream, proxy.url), "transparent")
        assert proxy.requests > 15
        assert proxy.slow_downs == proxy.resets == proxy.truncations == proxy.copies_refused == 0


def test_proxy_is_transparent_for_ceph(ceph_env):
    with fault_proxy(ceph_env["AWS_ENDPOINT_URL"]) as proxy:
        round_trip(client(ceph_env, proxy.url), "transparent")


@pytest.mark.parametrize("faults", [{}, {"slow_down_every": 9, "reset_every": 10, "truncate_every": 4}])
def test_64_mb_in_parts_arrive_equal(upstream, faults, tmp_path):
    source, back, name = tmp_path / "source", tmp_path / "back", f"big-{len(faults)}"
    source.write_bytes(random.randbytes(64 * MB))
    client(upstream).create_bucket(Bucket=name)
    parts = TransferConfig(multipart_threshold=8 * MB, multipart_chunksize=8 * MB, max_concurrency=4)
    with fault_proxy(upstream["AWS_ENDPOINT_URL"], **faults) as proxy:
        s3 = client(upstream, proxy.url, retries=10)
        s3.upload_file(str(source), name, "big", Config=parts)
        s3.download_file(name, "big", str(back), Config=parts)
        assert bool(faults) == bool(proxy.slow_downs) == bool(proxy.resets) == bool(proxy.truncations)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (source, back)}
    assert len(digests) == 1


def test_proxy_holds_no_body_in_memory():
    """300 MB up and down, chunked, against a server that counts: this process grows by a few MB only."""
    size, block = 300 * MB, bytes(MB)
    seen = []

    def serve(listener):
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            while stream.readline() != b"\r\n":
                pass
            total = 0
            while count := int(stream.readline(), 16):
                total += len(stream.read(count))
                stream.readline()
            stream.readline()
            seen.append(total)
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(size // MB):
                connection.sendall(b"100000\r\n" + block + b"\r\n")
            connection.sendall(b"0\r\n\r\n")

    def memory():
        with open("/proc/self/status") as lines:
            return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with fault_proxy(f"http://127.0.0.1:{listener.getsockname()[1]}") as proxy, contextlib.closing(
                http.client.HTTPConnection(proxy.url[7:], timeout=30)) as bare:
            before = memory() if sys.platform == "linux" else 0
            bare.request("PUT", "/b/k", (block for _ in range(size // MB)), encode_chunked=True,
                         headers={"Transfer-Encoding": "chunked"})
            answer, received = bare.getresponse(), 0
            while part := answer.read(MB):
                received += len(part)
            grown = memory() - before if sys.platform == "linux" else 0
    assert seen == [size] and received == size
    assert grown < 60


def exchange(*answers):
    """A server that reads heads and sends the given bytes after each, all on one connection; yields url and heads."""
    heads, listener = [], socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            for answer in answers:
                lines = []
                while not lines or lines[-1] != b"\r\n":
                    lines.append(stream.readline())
                heads.append(b"".join(lines))
                connection.sendall(answer)
            stream.read()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", heads


def test_heads_pass_unchanged_and_connections_stay():
    """Path, Host and header names byte by byte; bodies of HEAD, 204 and 304 are none, whatever their length says."""
    whole = b"HTTP/1.1 200 OK\r\nX-Odd:  a b \r\nContent-Length: 2\r\n\r\nok"
    url, heads = exchange(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n",
                          b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", whole)
    sent = [f"{method} /b/%7Eq%2f+%20//é?a=%2B&b HTTP/1.1\r\nhOST: bucket.example:99\r\nX-odd:  1 ,2\r\n\r\n".encode()
            for method in ("HEAD", "DELETE", "GET", "GET")]
    with fault_proxy(url, truncate_every=2) as proxy:
        with socket.create_connection(proxy.server_address, timeout=10) as bare, bare.makefile("rb") as stream:
            answers = []
            for head in sent[:3]:
                bare.sendall(head)
                answers.append(stream.readline())
                while stream.readline() != b"\r\n":
                    pass
            proxy.truncate_every = 0
            bare.sendall(sent[3])
            answers.append(stream.read(len(whole)))
    assert heads == sent
    assert answers == [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 304 Not Modified\r\n",
                       whole]


def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used():
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        for _ in range(2):
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as stream:
                while stream.readline() != b"\r\n":
                    pass
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    threading.Thread(target=serve, daemon=True).start()
    with fault_proxy(f"http://127.0.0.1:{listener.getsockname()[1]}") as proxy, contextlib.closing(
            http.client.HTTPConnection(proxy.url[7:], timeout=10)) as bare:
        for _ in range(2):
            bare.request("GET", "/b/k")
            assert bare.getresponse().read() == b"ok"
            time.sleep(0.2)
    listener.close()


@pytest.mark.parametrize("first", [b"HTTP/1.1 100 Continue\r\n\r\n", b"",
                                   b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"])
def test_expect_100_continue(first):
    """The body follows when the server asks for it or says nothing, and stays away when the answer is final."""
    listener, bodies = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            while stream.readline() != b"\r\n":
                pass
            connection.sendall(first)
            bodies.append(stream.read(4))
            if bodies[-1]:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    with fault_proxy(f"http://127.0.0.1:{listener.getsockname()[1]}") as proxy:
        with socket.create_connection(proxy.server_address, timeout=10) as bare, bare.makefile("rb") as stream:
            bare.sendall(b"PUT /b/k HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
            status = stream.readline()
            if b" 100 " in status:
                assert stream.readline() == b"\r\n"
                bare.sendall(b"body")
                status = stream.readline()
            while stream.readline() != b"\r\n":
                pass
            assert select.select([bare], [], [], 0.1)[0] == []  # nobody said that the connection would be closed
            thread.join(5)
            assert not thread.is_alive()  # but one that waits for a body is not used again
    listener.close()
    assert (status, bodies) == ((b"HTTP/1.1 403 Forbidden\r\n", [b""]) if b"403" in first
                                else (b"HTTP/1.1 200 OK\r\n", [b"body"]))


def test_bare_client_sees_slow_down(upstream):
    s3 = bucket(upstream, "slow-down")
    host, path = signed(s3, "put_object", Bucket="slow-down", Key="new")
    with fault_proxy(upstream["AWS_ENDPOINT_URL"], slow_down_every=3) as proxy:
        bare, seen = http.client.HTTPConnection(proxy.url[7:], timeout=10), []
        for number in range(9):  # rclone keeps the connection (moto does not), and so the refused bodies have been read
            bare.request("PUT", path, random.randbytes(MB + number), headers={"Host": host})
            answer = bare.getresponse()
            seen.append((answer.status, b"<Code>SlowDown</Code><Message>" in answer.read()))
            assert answer.will_close == ("Werkzeug" in answer.getheader("Server", ""))
        assert seen == 3 * [(200, False), (200, False), (503, True)]
        proxy.slow_down_every = 1
        bare.close()
        with socket.create_connection(proxy.server_address, timeout=10) as head:
            head.sendall(f"HEAD {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answer = head.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 503 ") and answer.endswith(b"\r\n\r\n")
        assert (proxy.requests, proxy.slow_downs, proxy.resets, proxy.truncations) == (10, 4, 0, 0)
        proxy.slow_down_every = 2
        with pytest.raises(botocore.exceptions.ClientError, match="SlowDown"):
            for _ in range(3):
                client(upstream, proxy.url).list_objects_v2(Bucket="slow-down")


def test_bare_client_sees_reset(upstream):
    host, path = signed(bucket(upstream, "reset"), "get_object", Bucket="reset", Key="digits")
    with fault_proxy(upstream["AWS_ENDPOINT_URL"], reset_every=4) as proxy:
        seen = []
        for _ in range(8):
            with contextlib.closing(http.client.HTTPConnection(proxy.url[7:], timeout=10)) as bare:
                try:
                    bare.request("GET", path, headers={"Host": host})
                    seen.append(bare.getresponse().read())
                except ConnectionResetError as error:  # RemoteDisconnected, a plain end, is one as well
                    seen.append(type(error))
        assert seen == 2 * [b"0123456789", ConnectionResetError, b"0123456789", b"0123456789"]
        assert (proxy.requests, proxy.slow_downs, proxy.resets, proxy.truncations) == (8, 0, 2, 0)


def test_bare_client_sees_truncation(upstream):
    host, path = signed(bucket(upstream, "truncate"), "get_object", Bucket="truncate", Key="digits")
    with fault_proxy(upstream["AWS_ENDPOINT_URL"], truncate_every=2) as proxy:
        seen = []
        for method in "GET", "HEAD", "GET", "GET", "GET":
            with contextlib.closing(http.client.HTTPConnection(proxy.url[7:], timeout=10)) as bare:
                bare.request(method, path, headers={"Host": host})
                answer = bare.getresponse()
                try:
                    body = answer.read()
                except http.client.IncompleteRead as error:
                    body = error.partial, error.expected
                if method == "GET":
                    seen.append((answer.getheader("Content-Length"), body))
        assert seen == 2 * [("10", (b"01234", 5)), ("10", b"0123456789")]
        assert (proxy.requests, proxy.slow_downs, proxy.resets, proxy.truncations) == (5, 0, 0, 2)


def test_copy_is_refused(upstream):
    bucket(upstream, "no-copy")
    with fault_proxy(upstream["AWS_ENDPOINT_URL"], no_copy=True) as proxy:
        s3 = client(upstream, proxy.url)
        with pytest.raises(botocore.exceptions.ClientError, match="NotImplemented") as caught:
            s3.copy_object(Bucket="no-copy", Key="copy", CopySource="no-copy/digits")
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 501
        s3.put_object(Bucket="no-copy", Key="put", Body=b"x")
        assert (keys(s3, "no-copy"), proxy.copies_refused) == (["digits", "put"], 1)


def test_boto3_gets_through_all_faults_at_once(upstream):
    with fault_proxy(upstream["AWS_ENDPOINT_URL"], slow_down_every=8, reset_every=9, truncate_every=7) as proxy:
        s3 = client(upstream, proxy.url, retries=10)
        s3.create_bucket(Bucket="through")
        for number in range(20):
            s3.put_object(Bucket="through", Key=f"{number:02}", Body=b"%d" % number)
        assert keys(s3, "through") == [f"{number:02}" for number in range(20)]
        assert proxy.slow_downs >= 2 and proxy.resets >= 2


def test_faults_depend_on_the_order_only_and_never_hit_one_request_twice(upstream):
    s3 = bucket(upstream, "order")
    host, path = signed(s3, "get_object", Bucket="order", Key="digits")
    runs = []
    for _ in range(2):
        with fault_proxy(upstream["AWS_ENDPOINT_URL"], slow_down_every=2, reset_every=2, truncate_every=2) as proxy:
            seen = []
            for _ in range(32):
                with contextlib.closing(http.client.HTTPConnection(proxy.url[7:], timeout=10)) as bare:
                    try:
                        bare.request("GET", path, headers={"Host": host})
                        answer = bare.getresponse()
                        seen.append(answer.status if answer.read() else None)
                    except (ConnectionResetError, http.client.IncompleteRead) as error:
                        seen.append(type(error).__name__)
            assert (proxy.slow_downs, proxy.resets, proxy.truncations, seen.count(200)) == (16, 8, 4, 4)
            runs.append(seen)
    assert runs[0] == runs[1]


def test_on_request_and_delay(upstream):
    s3 = bucket(upstream, "hooks")
    with fault_proxy(upstream["AWS_ENDPOINT_URL"], delay=0.1) as proxy:
        numbers = []
        proxy.on_request = lambda number: numbers.append((number, keys(s3, "hooks")))
        start = time.monotonic()
        client(upstream, proxy.url).put_object(Bucket="hooks", Key="a", Body=b"")
        client(upstream, proxy.url).put_object(Bucket="hooks", Key="b", Body=b"")
        assert time.monotonic() - start >= 0.2
        assert numbers == [(1, ["digits"]), (2, ["a", "digits"])]


def test_proxy_is_fast():
    """The proxy should not be what a test waits for: hundreds of requests a second on one connection, at the least."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    url, heads = exchange(*[answer] * 1000)
    with fault_proxy(url) as proxy:
        bare, start = http.client.HTTPConnection(proxy.url[7:], timeout=10), time.monotonic()
        for _ in range(1000):
            bare.request("GET", "/b/k")
            assert bare.getresponse().read() == b"ok"
        seconds = time.monotonic() - start
        bare.close()
    assert len(heads) == 1000 and seconds < 5
