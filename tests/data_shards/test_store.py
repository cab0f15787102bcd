import os
import pickle

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_shards.errors import ShardError
from data_shards.storage.store import Store


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path, memory_store):
    return Store(tmp_path / "deep" / "store") if request.param == "file" else memory_store


def test_round_trip_and_listing(store):
    store.write("a/one", b"0123456789")
    with store.open("two", "wb") as file:
        file.write(b"xyz")
    assert store.read("a/one") == b"0123456789"
    assert store.open("two").read() == b"xyz"
    assert store.size("two") == 3
    assert store.ls() == ["a", "two"]
    assert store.ls("a") == ["a/one"]
    assert store.ls("nowhere") == []
    assert store.sizes("a") == {"a/one": 10}
    assert store.exists("a/one")
    assert not store.exists("b")


def test_ranges(store):
    store.write("one", b"0123456789")
    store.write("two", b"abc")
    assert store.read_range("one", 2, 5) == b"234"
    assert store.read_ranges([("two", 1, 3), ("one", 0, 1), ("one", 8, 99)]) == [b"bc", b"0", b"89"]
    assert store.read_ranges([]) == []
    with pytest.raises(FileNotFoundError):
        store.read_range("absent", 0, 1)


def test_a_local_file_is_opened_once_for_all_its_ranges(tmp_path, monkeypatch):
    data = bytes(range(256)) * 8
    for name in ("one", "two"):
        Store(tmp_path).write(name, data)
    opened, genuine = [], os.open

    def noting(path, *more):
        opened.append(path)
        return genuine(path, *more)

    monkeypatch.setattr(os, "open", noting)
    ranges = [(name, i, i + 3) for name in ("one", "two") for i in range(0, 2046, 2)]
    assert Store(tmp_path).read_ranges(ranges) == [data[i : i + 3] for _, i, _ in ranges]
    assert opened == [f"{tmp_path}/one", f"{tmp_path}/two"]


def test_write_replaces_and_remove_is_idempotent(store):
    store.write("a/one", b"old")
    store.write("a/one", b"new")
    assert store.read("a/one") == b"new"
    assert store.ls("a") == ["a/one"]
    store.remove("a", recursive=True)
    store.remove("a", recursive=True)
    assert not store.exists("a/one")


def test_child(store):
    store.child("a", "b").write("c", b"1")
    assert store.read("a/b/c") == b"1"


def test_pickle_and_equality(store):
    store.write("one", b"1")
    other = pickle.loads(pickle.dumps(store))
    assert other == store
    assert other.read("one") == b"1"


def test_names_cannot_leave_the_store(store):
    for name in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(ShardError, match="leave the store"):
            store.read(name)
    with pytest.raises(ShardError, match="leave the store"):
        store.child("..")


def test_plain_path_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("shards").url == f"file://{tmp_path}/shards"
    assert Store(f"file://{tmp_path}/shards/").local_path() == tmp_path / "shards"
    assert Store("memory://x").local_path() is None
    assert Store("/").child("x").local_path().as_posix() == "/x"


def test_failed_write_leaves_the_old_bytes(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write("one", b"old")

    def no_space(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        store.write("one", b"new")
    assert os.listdir(tmp_path) == ["one"]
    assert store.read("one") == b"old"


def test_credentials_are_not_shown():
    store = Store("s3://user:secret@bucket/set?token=secret")
    assert "secret" not in f"{store} {store!r}"
    assert str(store) == "s3://bucket/set"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_used_before_and_after_fork(tmp_path):
    store = Store(tmp_path)
    store.write("one", b"1")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if store.read("one") == b"1" else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_arrow_reaches_the_same_objects(tmp_path):
    for url in (str(tmp_path), "memory://arrow-place"):
        store = Store(url)
        store.write("a/b", b"content")
        filesystem, path = store.arrow()
        with filesystem.open_input_file(f"{path}/a/b") as file:
            assert file.read() == b"content"


def test_what_has_no_size_or_no_end_is_not_read(tmp_path):
    """Its size says 0: it would be read for ever."""
    (tmp_path / "zeros").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"{}")
    store = Store(tmp_path)
    for name in ("zeros", "pipe"):
        with pytest.raises(OSError, match=f"{name} is a device or a pipe, not a file"):
            store.read(name, limit="image_bytes")
        with pytest.raises(OSError, match=f"{name} is a device or a pipe, not a file"):
            store.read_range(name, 0, 10)
        with pytest.raises(OSError, match="a device or a pipe"):
            store.read_object(name)
    assert store.read_object("link") == {}


class ListingsKept(MemoryFileSystem):
    """Remembers listings, as the clients of most object stores do unless told otherwise."""

    protocol = "kept"

    def ls(self, path, detail=True, **_):
        try:
            return self.dircache[path]
        except KeyError:
            found = super().ls(path, detail=True)
            self.dircache[path] = found
            return found


def test_what_others_wrote_is_listed():
    fsspec.register_implementation("kept", ListingsKept, clobber=True)
    store = Store("kept://listings")
    store.write("one", b"1")
    assert store.ls() == ["one"]
    store.write("two", b"2")
    assert store.ls() == ["one", "two"]
    store.remove("", recursive=True)
