"""The servers of the other tests end with them; the proxy is transparent and makes each of its faults."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse

import boto3
from botocore.config import Config
from servers import free_port, listening, wait_until
from servers.fault_proxy import fault_proxy

from helpers import storage


def test_a_server_does_not_outlive_its_starter(tmp_path):
    """Not even when the starter is killed, the thread that has started it is gone, and nobody can clean up."""
    port, log = free_port(), tmp_path / "log"
    server = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    code = f"""
import os, signal, sys, threading
sys.path.insert(0, {os.path.dirname(__file__)!r})
from servers import listening, running, wait_until
context = running({server!r}, {str(log)!r})
thread = threading.Thread(target=context.__enter__)
thread.start(), thread.join()
wait_until(lambda: listening({port}), "server", {str(log)!r})
print(listening({port}), flush=True)
os.kill(os.getpid(), signal.SIGKILL)"""
    starter = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (starter.returncode, starter.stdout) == (-signal.SIGKILL, "True\n")
    wait_until(lambda: not listening(port), "end of the server", log, seconds=5)


def exchange(*connections):
    """A server that reads heads and sends the given bytes after each, a list for each connection; its url and heads."""
    heads, listener = [], socket.create_server(("127.0.0.1", 0))

    def serve():
        for answers in connections:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as stream:
                for answer in answers:
                    lines = []
                    while not lines or lines[-1] != b"\r\n":
                        lines.append(stream.readline())
                    heads.append(b"".join(lines))
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", heads


def test_heads_pass_unchanged_and_connections_stay_unless_the_server_has_closed_them():
    """Path, Host and header names byte by byte; bodies of HEAD, 204 and 304 are none, whatever their length says."""
    whole = b"HTTP/1.1 200 OK\r\nX-Odd:  a b \r\nContent-Length: 2\r\n\r\nok"
    first = "200 OK\r\nContent-Length: 9", "204 No Content", "304 Not Modified\r\nContent-Length: 9"
    answers = [f"HTTP/1.1 {each}\r\n\r\n".encode() for each in first] + [whole]
    url, heads = exchange(answers, [whole])  # the server closes its connection after the fourth
    head = "{} /b/%7Eq%2f+%20//é?a=%2B&b HTTP/1.1\r\nhOST: bucket.example:99\r\nX-odd:  1 ,2\r\n\r\n"
    sent = [head.format(method).encode() for method in ("HEAD", "DELETE", "GET", "GET", "GET")]
    with fault_proxy(url) as proxy:
        with socket.create_connection(proxy.server_address, timeout=10) as bare, bare.makefile("rb") as stream:
            for number, answer in enumerate([*answers, whole]):
                proxy.truncate_every = 2 * (number < 3)
                bare.sendall(sent[number])
                assert stream.read(len(answer)) == answer
                if number > 2:
                    wait_until(lambda: not proxy.idle or proxy.idle[0].readable(0), "end of it", os.devnull)
    assert heads == sent


def test_faults_depend_on_the_order_only_and_never_hit_one_request_twice(embedded):
    storage.create_bucket("order")
    s3 = boto3.client("s3", config=Config(signature_version="s3v4"))
    s3.put_object(Bucket="order", Key="digits", Body=b"0123456789")
    params = {"Bucket": "order", "Key": "digits"}
    url = urllib.parse.urlsplit(s3.generate_presigned_url("get_object", Params=params))
    with fault_proxy(embedded["AWS_ENDPOINT_URL"], slow_down_every=2, reset_every=2, truncate_every=2) as proxy:
        seen = []
        for _ in range(16):
            with contextlib.closing(http.client.HTTPConnection(proxy.url[7:], timeout=10)) as bare:
                try:
                    bare.request("GET", f"{url.path}?{url.query}", headers={"Host": url.netloc})
                    answer = bare.getresponse()
                    seen.append((answer.status, answer.read()[:10] if answer.status == 200 else b""))
                except ConnectionResetError as error:  # RemoteDisconnected, a plain end, is one as well
                    seen.append(type(error))
                except http.client.IncompleteRead as error:
                    seen.append((error.partial, error.expected))
        assert (proxy.requests, proxy.slow_downs, proxy.resets, proxy.truncations) == (16, 8, 4, 2)
    busy, whole = (503, b""), (200, b"0123456789")
    assert seen == 2 * [ConnectionResetError, busy, (b"01234", 5), busy, ConnectionResetError, busy, whole, busy]
