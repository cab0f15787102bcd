"""An HTTP proxy before an object store that behaves as badly as it is told to."""

import dataclasses
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PIECE = 1 << 18
_Answer = tuple[int, list[tuple[str, str]], bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weather:
    """What the proxy does to a request. Shares are probabilities, drawn in this order."""

    unavailable: float = 0.0
    """Share answered with 503 SlowDown."""
    stall: float = 0.0
    """Share whose body stops half-way for `stall_s`."""
    stall_s: float = 30.0
    reset: float = 0.0
    """Share whose connection is reset after `reset_at` bytes of the body."""
    reset_at: int = 1000
    trickle: float = 0.0
    """Share whose body comes at `trickle_rate`."""
    trickle_rate: float = 100.0
    """Bytes per second."""
    short: float = 0.0
    """Share whose body is cut to half, with a header that agrees."""
    latency_s: float = 0.0
    """Before the first byte of every answer."""
    rate: float = 0.0
    """Bytes per second of one connection; 0 = no limit."""


FAULTS = ("unavailable", "stall", "reset", "trickle", "short")


class FaultyProxy:
    """Forwards to `upstream` (host:port) on a free loopback port while the `with` block lasts.

    Args:
        upstream: The server.
        weather: What happens to requests.
        seed: Of the faults' order.
        remember: Ask for each object once and cut ranges here: faster than any server for tests.

    Attributes:
        weather: may be replaced at any time.
        seen: number of requests ("requests") and of each fault made.
        most_at_once: largest number of requests under way together.
    """

    def __init__(
        self,
        upstream: str,
        weather: Weather | None = None,
        *,
        seed: int = 0,
        remember: bool = False,
    ) -> None:
        self.upstream = upstream
        self.objects: dict[str, bytes] | None = {} if remember else None
        self.weather = weather or Weather()
        self.seen: Counter[str] = Counter()
        self.most_at_once = 0
        self._now = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """Address for clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def enter(self) -> str:
        """Begin a request; returns its fault, or ""."""
        with self._lock:
            self.seen["requests"] += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            for fault in FAULTS:
                share = getattr(self.weather, fault)
                if share and self._random.random() < share:
                    self.seen[fault] += 1
                    return fault
        return ""

    def leave(self) -> None:
        """End a request."""
        with self._lock:
            self._now -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: FaultyProxy

    def log_message(self, *_: object) -> None:
        pass

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.enter()
        try:
            time.sleep(self.proxy.weather.latency_s)
            if fault == "unavailable":
                return self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>", "")
            if self.proxy.objects is not None and self.command == "GET" and "Range" in self.headers:
                return self._answer(*self._cut(self.proxy.objects), fault)
            return self._answer(*self._ask(body, dict(self.headers)), fault)
        finally:
            self.proxy.leave()

    def _ask(self, body: bytes, headers: dict[str, str]) -> _Answer:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _cut(self, objects: dict[str, bytes]) -> _Answer:
        """Answer a range of an object that is known, or asked for now."""
        if self.path not in objects:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "range"}
            status, answered, data = self._ask(b"", headers)
            if status != 200:
                return status, answered, data
            objects[self.path] = data
        data = objects[self.path]
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1]
        return 206, [("Content-Range", f"bytes {first}-{last}/{len(data)}")], part

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str) -> None:
        if fault == "short":
            data = data[: len(data) // 2]
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self._send(data, fault)

    def _send(self, data: bytes, fault: str) -> None:
        weather = self.proxy.weather
        if fault == "reset":
            self.wfile.write(data[: weather.reset_at])
            # A linger time of zero turns the close into a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "stall":
            self.wfile.write(data[: len(data) // 2])
            time.sleep(weather.stall_s)
            data = data[len(data) // 2 :]
        rate = weather.trickle_rate if fault == "trickle" else weather.rate
        piece = max(1, min(_PIECE, int(rate / 10))) if rate else max(1, len(data))
        begin = time.monotonic()
        for start in range(0, len(data), piece):
            self.wfile.write(data[start : start + piece])
            if rate:
                ahead = (start + piece) / rate - (time.monotonic() - begin)
                time.sleep(max(0.0, ahead))
