import io
import subprocess
import tarfile

import pytest

from data_shards.errors import ShardError
from data_shards.format.tar import BLOCK, add_end, add_member, walk

FILES = {"a.txt": b"first", "b.bin": bytes(range(256)) * 3, "empty": b"", "d.txt": b"last"}


def archive(format=tarfile.GNU_FORMAT, files=FILES, **fields):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def members(data):
    return list(walk(io.BytesIO(data), 0, len(data), "x.tar"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(form):
    long = {**FILES, "deep/" * 30 + "n.txt": b"x", "ä" * 60: b"y"}
    files = FILES if form == tarfile.USTAR_FORMAT else long
    # A time with a fraction makes an extended header of its own in the PAX format.
    data = archive(form, files, mtime=1.5 if form == tarfile.PAX_FORMAT else 1)
    found = members(data)
    assert [m.name for m in found] == list(files)
    assert [data[m.offset : m.offset + m.size] for m in found] == list(files.values())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [m.offset for m in found] == [m.offset_data for m in tar.getmembers()]


def test_an_archive_inside_another():
    inner = archive()
    outer = archive(files={"inner.tar": inner, "after": b"!"})
    place = members(outer)[0]
    found = list(walk(io.BytesIO(outer), place.offset, place.offset + place.size, "inner"))
    assert [m.name for m in found] == list(FILES)


def test_own_members_have_fixed_bytes():
    tar = io.BytesIO()
    offsets = [add_member(tar, name, body) for name, body in FILES.items()]
    add_end(tar)
    assert [m.offset for m in members(tar.getvalue())] == offsets
    with tarfile.open(fileobj=tar.seek(0) or tar) as again:
        assert {(m.uid, m.mtime, m.mode, m.uname) for m in again} == {(0, 0, 0o444, "")}
    assert len(tar.getvalue()) % tarfile.RECORDSIZE == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.DIRTYPE, "a directory"),
        (b"Z", "of unknown type"),
    ],
)
def test_other_kinds_are_named(kind, name):
    assert members(archive(files={"x": b""}, type=kind, linkname="/etc/passwd"))[0].kind == name


def test_every_cut_and_every_changed_header_is_an_error():
    data = archive()
    ends = [m.offset for m in members(data)]
    content_end = ends[-1] + BLOCK
    for stop in range(0, content_end, 97):
        with pytest.raises(ShardError, match=r"x\.tar: (the archive is cut|member .* declares)"):
            members(data[:stop])
    for body in ends:
        for byte in (0, 124, 130, 148, 156, 300):
            damaged = bytearray(data)
            damaged[body - BLOCK + byte] ^= 0x15
            with pytest.raises(ShardError, match=r"damaged header at offset \d+"):
                members(damaged)
        zeroed = bytearray(data)
        zeroed[body - BLOCK : body] = bytes(BLOCK)
        with pytest.raises(ShardError, match="data behind the end marker"):
            # The last body is behind the marker too.
            members(zeroed)


def test_a_huge_member_is_refused_by_its_header():
    info = tarfile.TarInfo("bomb.png")
    info.size = 10 << 30
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(3 * BLOCK)
    with pytest.raises(ShardError, match=r"member 'bomb.png' .* declares 10737418240 bytes"):
        members(data)


@pytest.mark.parametrize(
    "record",
    [b"99 path=x\n", b"11 size=-1\n", b"8 path=\xff", b"0 a=b\n", b"path=x\n", b"9 pathxx\n"],
)
def test_damaged_extended_headers(record):
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf(tarfile.GNU_FORMAT) + record.ljust(BLOCK, b"\0") + archive()
    with pytest.raises(ShardError, match="damaged extended header"):
        members(data)
    info.size = 2 << 20
    with pytest.raises(ShardError, match="extended header of 2097152 bytes"):
        members(info.tobuf(tarfile.GNU_FORMAT) + bytes(3 << 20))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_of_more_than_a_thousand_bytes_is_refused(form):
    def named(name):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            tar.addfile(tarfile.TarInfo(name))
        return buffer.getvalue()

    assert [member.name for member in members(named("a" * 1024))] == ["a" * 1024]
    with pytest.raises(ShardError, match="has a name of 1,025 bytes, the limit is 1,024"):
        members(named("a" * 1025))


@pytest.mark.parametrize(
    "options", ["--format=gnu", "--format=pax --sparse-version=0.1", "--format=pax"]
)
def test_a_sparse_file_is_refused(options, tmp_path):
    """Its body lacks the holes: other bytes than those that tar would extract."""
    with (tmp_path / "0.png").open("wb") as file:
        file.write(b"head")
        for place in range(1, 40):  # more pieces than the first header has room for
            file.seek(place << 16)
            file.write(b"piece")
    command = ["tar", "-cf", "x.tar", "--sparse", *options.split(), "0.png"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(ShardError, match=r"x.tar: member .*0.png' .* is a sparse file"):
        members((tmp_path / "x.tar").read_bytes())
