"""A proxy in front of an S3 server that makes the faults of a real network and of a real, busy object store.

It passes heads and bodies on byte by byte (the signature covers the Host header, the path's encoding and more), keeps
connections alive on both sides and holds no body in memory.
"""

import contextlib
import select
import socket
import socketserver
import struct
import threading
import time
import urllib.parse

BLOCK = 1 << 18
ERROR = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{0}</Code><Message>{0}</Message><RequestId>proxy</RequestId></Error>"""


@contextlib.contextmanager
def fault_proxy(upstream_url, kind=None, **settings):
    """Run a FaultProxy, or this kind of it, as long as the block lasts, in threads of this process."""
    with (kind or FaultProxy)(upstream_url, **settings) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            proxy.disconnect()


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

    daemon_threads, block_on_close, request_queue_size = True, False, 128
    slow_down_every = reset_every = truncate_every = delay = speed = 0
    no_copy, on_request, latest = False, None, ""
    requests = slow_downs = resets = truncations = copies_refused = 0

    def __init__(self, upstream_url, **settings):
        super().__init__(("127.0.0.1", 0), Connection)
        upstream = urllib.parse.urlsplit(upstream_url)
        self.upstream, self.url = (upstream.hostname, upstream.port), f"http://127.0.0.1:{self.server_address[1]}"
        self.lock, self.idle, self.clients, self.headers = threading.Lock(), [], set(), {}
        self.candidates = {"slow_downs": 0, "resets": 0, "truncations": 0}  # the requests that each could have hit
        vars(self).update(settings)

    def count(self, counter):
        with self.lock:
            setattr(self, counter, getattr(self, counter) + 1)
            return getattr(self, counter)

    def due(self, fault, every, first):
        """Whether the fault hits this candidate: the one of every n with the remainder `first`; count it then."""
        if not every:
            return False
        with self.lock:
            self.candidates[fault] += 1
            hit = self.candidates[fault] % every == first
        if hit:
            self.count(fault)
        return hit

    def connect(self):
        """A connection to the server: a new one, or an idle one that is not closed (it would be readable then)."""
        while True:
            try:
                peer = self.idle.pop()
            except IndexError:
                return Peer(socket.create_connection(self.upstream), self.speed)
            if not peer.readable(0):
                return peer
            peer.close()

    def disconnect(self):
        for peer in [*self.clients, *self.idle]:
            with contextlib.suppress(OSError):
                peer.socket.shutdown(socket.SHUT_RDWR)


class Peer:
    """One side's connection."""

    def __init__(self, sock, speed=0):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if speed:  # and the sender notices
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.socket, self.stream, self.speed = sock, sock.makefile("rb"), speed

    def close(self):
        self.stream.close()
        self.socket.close()

    def readable(self, seconds):
        """Whether there is something to read, or the end, within so many seconds."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def head(self):
        """Read the head of a request or an answer: bytes, words of the first line, headers by lower-case name."""
        lines = [self.stream.readline()]
        while lines[-1] not in (b"\r\n", b"\n"):
            if not lines[-1]:
                raise ConnectionError("closed")
            lines.append(self.stream.readline())
        pairs = (line.decode("latin-1").partition(":") for line in lines[1:-1])
        return b"".join(lines), lines[0].decode("latin-1").split(), {k.lower(): v.strip() for k, _, v in pairs}

    def body(self, headers, until_close=False):
        """Read a body in blocks, as it is on the wire."""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            size = 1
            while size:
                line = self.stream.readline()
                yield line
                size = int(line.split(b";")[0], 16)
                if size:
                    yield from self.exactly(size + 2)
            while line != b"\r\n":
                line = self.stream.readline()
                yield line or b"\r\n"
                if not line:
                    raise ConnectionError("closed")
        elif "content-length" in headers:
            yield from self.exactly(int(headers["content-length"]))
        elif until_close:
            while block := self.stream.read1(BLOCK):
                yield block

    def exactly(self, size):
        while size:
            block = self.stream.read1(min(size, 8192 if self.speed else BLOCK))
            if not block:
                raise ConnectionError("closed")
            time.sleep(len(block) / self.speed if self.speed else 0)
            size -= len(block)
            yield block

    def send(self, blocks):
        for block in blocks:
            self.socket.sendall(block)


class Connection(socketserver.BaseRequestHandler):
    """One client's connection: a thread that answers its requests, one after the other."""

    def handle(self):
        self.client = Peer(self.request, self.server.speed)
        self.server.clients.add(self.client)
        try:
            while self.answer():
                pass
        except (OSError, ValueError):  # the client or the server is gone, or has said what is no HTTP
            pass
        finally:
            self.server.clients.discard(self.client)
            self.client.close()

    def answer(self):
        """Answer one request; returns whether the connection may be used again."""
        head, (method, path, version), headers = self.client.head()
        proxy, expects = self.server, "100-continue" in headers.get("expect", "").lower()
        number, proxy.latest, proxy.headers = proxy.count("requests"), f"{method} {path}", headers
        if proxy.on_request:
            proxy.on_request(number)
        time.sleep(proxy.delay)
        keep = version == "HTTP/1.1" and "close" not in headers.get("connection", "").lower()
        if proxy.due("slow_downs", proxy.slow_down_every, 0):
            self.refuse(method, headers, expects, "503 Slow Down", "SlowDown")
            return keep
        if proxy.due("resets", proxy.reset_every, proxy.reset_every // 2):
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if proxy.no_copy and method == "PUT" and "x-amz-copy-source" in headers:
            proxy.count("copies_refused")
            self.refuse(method, headers, expects, "501 Not Implemented", "NotImplemented")
            return keep
        upstream = proxy.connect()
        try:
            keep &= self.forward(upstream, method, head, headers, expects)
        except BaseException:
            upstream.close()
            raise
        return keep

    def refuse(self, method, headers, expects, status, code):
        """Read the request's body and answer with S3's XML of an error."""
        if expects:
            self.client.send([b"HTTP/1.1 100 Continue\r\n\r\n"])
        for _ in self.client.body(headers):
            pass
        body = ERROR.format(code)
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self.client.send([(head + body * (method != "HEAD")).encode()])

    def forward(self, upstream, method, head, headers, expects):
        """Pass the request on and the answer back; returns whether the client's connection may be used again."""
        upstream.send([head])
        whole, words = True, ["", "100"]
        if expects and upstream.readable(1):
            head, words, answer = upstream.head()
            whole = words[1] == "100"  # or else the answer is final: the server does not want the body
        elif expects:  # a server that waits for the body without a word
            head = b"HTTP/1.1 100 Continue\r\n\r\n"
        if words[1] == "100":
            if expects:
                self.client.send([head])
            for block in self.client.body(headers):
                try:
                    if whole:
                        upstream.send([block])
                except OSError:  # the server wants no more of it and may have said why: read on to pass that on
                    whole = False
        while words[1] == "100":
            head, words, answer = upstream.head()
        empty, length = method == "HEAD" or words[1] in ("204", "304"), int(answer.get("content-length", 0))
        every = self.server.truncate_every
        self.client.send([head])
        if method == "GET" and not empty and length and self.server.due("truncations", every, every // 2):
            self.client.send(upstream.exactly(length // 2))
            upstream.close()
            return False
        if not empty:
            self.client.send(upstream.body(answer, until_close=True))
        framed = empty or "content-length" in answer or "transfer-encoding" in answer
        keep = framed and words[0] == "HTTP/1.1" and "close" not in answer.get("connection", "").lower()
        if keep and whole:
            self.server.idle.append(upstream)
        else:
            upstream.close()
        return keep
