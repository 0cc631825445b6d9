"""A proxy in front of an S3 server that makes the faults of a real network and of a real, busy object store.

It passes on paths and headers as they come (the signature covers them) and keeps connections alive on both sides.
"""

import contextlib
import http.client
import http.server
import socket
import socketserver
import struct
import threading
import time
import urllib.parse
from collections import Counter

BLOCK = 1 << 18
ERROR = "<Error><Code>{0}</Code><Message>{0}</Message></Error>"


@contextlib.contextmanager
def fault_proxy(upstream_url, kind=None, **settings):
    """Run a FaultProxy, or this kind of it, as long as the block lasts, in threads of this process."""
    with (kind or FaultProxy)(upstream_url, **settings) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.shutdown()


class FaultProxy(socketserver.ThreadingTCPServer):
    """The proxy's address `url`, its settings (change them at any time) and what it has done so far.

    slow_down_every  every n-th request is answered with 503 SlowDown
    reset_every      of the other requests, the connection of every n-th is reset before any answer
    truncate_every   of the GET answers with a Content-Length, every n-th ends after half of its body (Ceph and others
                     send their lists without)
    no_copy          a copy within the server is answered with 501 NotImplemented, as CORTX 1.0 did
    delay            seconds that every request waits
    speed            bytes a second of each connection's bodies
    on_request       called with the number of the request, from 1, before anything is done about it (then it goes on)
    latest, headers  method and path, and headers, of the latest request

    Which requests are hit depends on nothing but their order: the last of every n for SlowDown, one in the middle for
    the others. With n of at least 2 a client that asks again comes through, with 1 never.
    """

    daemon_threads, request_queue_size = True, 128
    slow_down_every = reset_every = truncate_every = delay = speed = 0
    no_copy, on_request, latest = False, None, ""
    requests = slow_downs = resets = truncations = copies_refused = 0

    def __init__(self, upstream_url, **settings):
        super().__init__(("127.0.0.1", 0), Connection)
        self.upstream = urllib.parse.urlsplit(upstream_url).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock, self.candidates = threading.Lock(), Counter()  # the requests that each fault could have hit
        vars(self).update(settings)

    def due(self, fault, every, rest):
        """Whether the fault hits this candidate, the one of every n with this remainder; count it then."""
        with self.lock:
            self.candidates[fault] += bool(every)
            hit = bool(every) and self.candidates[fault] % every == rest
            setattr(self, fault, getattr(self, fault) + hit)
        return hit


class Connection(http.server.BaseHTTPRequestHandler):
    """A client's connection, a thread that answers one request after the other, and with it one to the server."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def handle(self):
        self.upstream = http.client.HTTPConnection(self.server.upstream)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(self.upstream):
            super().handle()  # until the client or the server is gone

    def answer(self):
        proxy = self.server
        with proxy.lock:
            proxy.requests = number = proxy.requests + 1
            proxy.latest, proxy.headers = f"{self.command} {self.path}", self.headers
        if proxy.on_request:
            proxy.on_request(number)
        time.sleep(proxy.delay)
        if proxy.due("slow_downs", proxy.slow_down_every, 0):
            self.refuse(503, "SlowDown")
        elif proxy.due("resets", proxy.reset_every, proxy.reset_every // 2):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close(), self.connection.close()
            self.close_connection = True
        elif proxy.due("copies_refused", proxy.no_copy and "x-amz-copy-source" in self.headers, 0):
            self.refuse(501, "NotImplemented")
        else:
            self.forward()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def refuse(self, status, code):
        """Read the request's body and answer with S3's XML of an error."""
        for _ in self.body():
            pass
        text = ERROR.format(code).encode()
        self.send_response_only(status)
        self.send_header("Content-Length", len(text))
        self.end_headers()
        self.wfile.write(text * (self.command != "HEAD"))

    def body(self):
        return self.blocks(self.rfile, int(self.headers.get("Content-Length", 0)))

    def blocks(self, stream, size):
        """Read so many bytes, at the proxy's speed."""
        while size:
            block = stream.read1(min(size, BLOCK))
            if not block:
                raise ConnectionError("closed")
            time.sleep(len(block) / self.server.speed if self.server.speed else 0)
            size -= len(block)
            yield block

    def forward(self):
        """Pass the request on and the answer back."""
        body = self.body() if "Content-Length" in self.headers else None
        self.upstream.request(self.command, self.path, body, dict(self.headers))
        answer, every = self.upstream.getresponse(), self.server.truncate_every
        unsized = answer.length is None  # it comes in chunks, or ends with the connection
        whole, size = (answer.read(), 0) if unsized else (b"", answer.length)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if unsized:
            self.send_header("Content-Length", len(whole))
        self.end_headers()
        cut = self.command == "GET" and size and self.server.due("truncations", every, every // 2)
        self.wfile.write(whole)
        for block in self.blocks(answer, size // 2 if cut else size):
            self.wfile.write(block)
        answer.close()
        if cut:
            self.upstream.close()
            self.close_connection = True
