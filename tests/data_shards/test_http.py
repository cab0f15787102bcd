"""Plain HTTP: a server that does as it should, and servers that do not."""

import contextlib
import functools
import gzip
import http.server
import re
import threading
from collections import Counter

import numpy as np
import pytest

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from data_shards.storage import retry
from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream
from data_shards.verify import verify
from tests.object_store import s3_clients

pytestmark = pytest.mark.integration

# An answer of S3 to all who do not sign with this key.
CODES = {"ExpiredToken": "NEWKEY", "RequestTimeTooSkewed": "NEWKEY", "NoSuchBucket": "NEWKEY"}

# Of buckets of another region than the one that was signed for.
MOVED = b"<Error><Code>%s</Code><Region>eu-west-1</Region></Error>"
REDIRECTS = {"PermanentRedirect": 301, "AuthorizationHeaderMalformed": 400}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder by ranges and lists nothing; `way` says what it does wrong."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder, way, seen, *arguments):
        self.folder, self.way, self.seen = folder, way, seen
        super().__init__(*arguments)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, *, head):
        self.seen[self.command] += 1
        path = self.folder / self.path.lstrip("/").partition("?")[0]
        if refused := self.refused(head):
            status, body = refused
            self.send(status, body, {"x-amz-bucket-region": "eu-west-1"})
        elif not path.is_file():
            self.send(404, b"")
        elif head:
            self.send(200, b"", {"Content-Length": str(path.stat().st_size)})
        else:
            self.send_range(path.read_bytes())

    def refused(self, head):
        """Status and body of an answer that is none."""
        if head and self.way == "no head":
            return 405, b""
        if self.way == "busy" and self.seen[self.path] < 2:
            self.seen[self.path] += 1
            return 503, b""
        if self.way == "forbidden":
            return 403, b""
        if self.way in REDIRECTS and "/eu-west-1/s3/" not in self.headers.get("Authorization", ""):
            return REDIRECTS[self.way], MOVED % self.way.encode()
        if self.way in CODES and CODES[self.way] not in self.headers.get("Authorization", ""):
            return 403, f"<Error><Code>{self.way}</Code><Message>x</Message></Error>".encode()
        return None

    def send_range(self, data):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or self.way == "ignores":
            self.send(200, data)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            self.send(416, b"")
            return
        headers, body = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]
        if self.way == "another":
            headers["Content-Range"] = f"bytes 0-{stop - start - 1}/{len(data)}"
            body = data[: stop - start]
        elif self.way == "packed":
            headers, body = {**headers, "Content-Encoding": "gzip"}, gzip.compress(body)
        elif self.way == "short" and self.once(3) and len(body) > 1:
            headers["Content-Length"] = str(len(body))
            body = body[: len(body) // 2]
            self.close_connection = True
        elif self.way == "empty" and self.once(2):
            body = b""
        elif self.way == "endless":
            body = body + bytes(64 << 20)
        self.send(206, body, headers)

    def once(self, times):
        """True for the first calls."""
        self.seen["once"] += 1
        return self.seen["once"] <= times

    def send(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client saw enough
            self.wfile.write(body)


@pytest.fixture
def serve():
    """Serve a folder in a certain way; returns the URL and what was asked."""
    with contextlib.ExitStack() as stack:

        def start(folder, way=""):
            seen = Counter()
            handler = functools.partial(Handler, folder, way, seen)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}", seen

        yield start


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def numbers(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(range(256)))
    return tmp_path


@pytest.mark.parametrize("way", ["", "no head", "busy", "short", "empty"])
def test_a_set_is_read_without_a_listing(synthetic_set, serve, way):
    url, _ = serve(synthetic_set, way)
    index = load_index(url)
    assert index.digest == load_index(str(synthetic_set)).digest
    config = StreamConfig(cache_bytes=0)
    with SampleStream(index, config, split="train", global_batch=96, cursor=Cursor(seed=1)) as s:
        batch = next(s)
    assert not batch.damaged
    assert len(np.unique(batch.rows)) == 96
    if not way:
        assert list(verify(index)) == []


def test_what_is_absent(synthetic_set, serve, copy_of):
    folder = copy_of(synthetic_set)
    url, _ = serve(folder)
    assert not Store(url).exists("nothing")
    with pytest.raises(ShardError, match=r"no shard set at http://.*/nothing"):
        load_index(f"{url}/nothing")
    (folder / "train-00001.tar").unlink()
    with pytest.raises(ShardError, match=r"train-00001\.tar is listed in the index and absent"):
        load_index(url)


def test_ranges(numbers, serve):
    url, _ = serve(numbers)
    store = Store(url)
    assert store.read_range("x.bin", 100, 110) == bytes(range(100, 110))
    assert store.read_range("x.bin", 250, 300) == bytes(range(250, 256))
    assert store.read_range("x.bin", 256, 300) == b""
    assert store.read("x.bin") == bytes(range(256))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("ignores", "the server ignores Range: asked for bytes 100 to 109"),
        ("another", "the server sent another range: asked for bytes 100 to 109"),
        ("packed", r"the server sends the bytes packed \(gzip\)"),
        ("forbidden", "403"),
        ("endless", "the server sends more than the 10 bytes asked for"),
    ],
)
def test_a_server_that_sends_other_bytes_is_named(numbers, serve, way, message):
    url, seen = serve(numbers, way)
    with pytest.raises(OSError, match=message):
        Store(url).read_range("x.bin", 100, 110)
    assert seen["GET"] == 1  # it would do so again


def test_a_server_that_ignores_ranges_is_not_reported_as_damage(synthetic_set, serve):
    url, _ = serve(synthetic_set, "ignores")
    index = load_index(url)
    config = StreamConfig(cache_bytes=0)
    with (
        SampleStream(index, config, split="train", global_batch=96, cursor=Cursor(seed=1)) as s,
        pytest.raises(ShardError, match="the server ignores Range"),
    ):
        next(s)


def test_a_server_that_tells_no_size(numbers, serve, monkeypatch):
    url, _ = serve(numbers, "no head")
    assert Store(url).size("x.bin") == 256
    monkeypatch.setattr(Handler, "do_HEAD", lambda self: self.send(405, b""))
    url, _ = serve(numbers, "ignores")
    with pytest.raises(OSError, match="the server tells no size"):
        Store(url).size("x.bin")


# --- S3 --------------------------------------------------------------------------------------


@pytest.fixture
def s3(tmp_path, serve):
    """Serve one object `x.bin` of a bucket as S3 does; returns its store and what was asked."""
    with contextlib.ExitStack() as stack:

        def start(way=""):
            (tmp_path / "bucket").mkdir()
            (tmp_path / "bucket" / "x.bin").write_bytes(bytes(range(256)))
            url, seen = serve(tmp_path, way)
            stack.enter_context(s3_clients(url))
            return Store("s3://bucket"), seen

        yield start


def test_ranges_of_s3(s3):
    store, _ = s3()
    assert store.read_range("x.bin", 100, 110) == bytes(range(100, 110))
    assert store.read_range("x.bin", 0, 1000) == bytes(range(256))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("ignores", "the server ignores Range: asked for bytes 100 to 109"),
        ("another", "the server sent another range: asked for bytes 100 to 109"),
        ("RequestTimeTooSkewed", "the clock of this machine is wrong"),
        ("NoSuchBucket", "there is no such bucket"),
    ],
)
def test_what_s3_says_is_said(s3, way, message):
    store, seen = s3(way)
    with pytest.raises(OSError, match=message) as caught:
        store.read_range("x.bin", 100, 110)
    assert seen["GET"] == 1
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("way", REDIRECTS)
def test_a_bucket_of_another_region_is_found(s3, way):
    store, seen = s3(way)
    assert store.read_range("x.bin", 100, 110) == bytes(range(100, 110))
    assert store.size("x.bin") == 256
    assert (seen["GET"], seen["HEAD"]) == (2, 1)  # the region is remembered


def test_credentials_that_expired_are_read_anew_once(s3, monkeypatch):
    store, seen = s3("ExpiredToken")
    with pytest.raises(PermissionError, match="have expired"):
        store.read_range("x.bin", 100, 110)
    assert seen["GET"] == 2
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NEWKEY")
    assert store.read_range("x.bin", 100, 110) == bytes(range(100, 110))
    assert seen["GET"] == 4
    assert store.retries == 2
