"""What lies in a tree of folders: every entry is an image file, a folder, or named with a cause."""

import concurrent.futures
import dataclasses
import os
import stat
from collections.abc import Iterator

from data_shards.errors import ShardError
from data_shards.sources.transcode import FILE_EXTENSIONS
from data_shards.storage.store import Store

EXTENSIONS = tuple(f".{extension}" for extension in FILE_EXTENSIONS)
HIDDEN = "hidden"
_LISTINGS = 16  # in flight

NotTaken = list[tuple[str, str]]
"""(name, cause) of entries."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """The entries of one folder or of a whole tree, by names relative to the store."""

    folders: list[str]
    files: dict[str, int]
    """Name -> bytes."""
    not_taken: NotTaken


@dataclasses.dataclass(frozen=True)
class FolderTree:
    """Folders and files below one URL; names that are not UTF-8 are as `os.fsdecode` has them.

    Hidden entries, pipes and the like are not taken. On a local disk symbolic links are followed,
    except those that are broken, lead back to a folder above them, or lead out of the tree.

    Args:
        store: Root of the tree.
        follow_links: Follow links that lead out of the tree, too.
    """

    store: Store
    follow_links: bool = False

    def listing(self, folder: str = "") -> Listing:
        """List one folder.

        Raises:
            ShardError: it cannot be listed.
        """
        found = Listing([], {}, [])
        try:
            entries = self.store.entries(folder) if self.store.local_path() is None else None
            for name, size, cause in self._local(folder) if entries is None else _remote(entries):
                if cause:
                    found.not_taken.append((name, cause))
                elif size is None:
                    found.folders.append(name)
                else:
                    found.files[name] = size
        except OSError as error:
            raise ShardError(f"cannot list {self.store}/{folder}: {error}") from error
        return found

    def images(self, folders: list[str]) -> list[Listing]:
        """Return the image files below each of some folders, at any depth."""
        with concurrent.futures.ThreadPoolExecutor(_LISTINGS) as executor:
            return list(executor.map(self._images, folders))

    def _images(self, folder: str) -> Listing:
        found = Listing([], {}, [])
        left = [folder]
        while left:
            listing = self.listing(left.pop())
            left += reversed(listing.folders)
            found.folders.extend(listing.folders)
            found.not_taken.extend(listing.not_taken)
            for name, size in listing.files.items():
                if name.lower().endswith(EXTENSIONS):
                    found.files[name] = size
                else:
                    found.not_taken.append((name, f"not named {', '.join(EXTENSIONS)}"))
        return found

    def _local(self, folder: str) -> Iterator[tuple[str, int | None, str]]:
        """Yield (name, bytes or None for a folder, why it is not taken or "")."""
        root = str(self.store.local_path())
        with os.scandir(f"{root}/{folder}") as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = f"{folder}/{entry.name}".lstrip("/")
            cause = HIDDEN if entry.name.startswith(".") else ""
            if not cause and entry.is_symlink():
                cause = self._link(root, name)
            if cause:
                yield name, None, cause
                continue
            status = entry.stat()
            if stat.S_ISDIR(status.st_mode):
                yield name, None, ""
            elif stat.S_ISREG(status.st_mode):
                yield name, status.st_size, ""
            else:
                yield name, None, "not a file or folder"

    def _link(self, root: str, name: str) -> str:
        """Return why a symbolic link is not followed, or nothing."""
        target = os.path.realpath(f"{root}/{name}")
        if not os.path.exists(target):
            return "broken link"
        top = os.path.realpath(root)
        if not self.follow_links and os.path.commonpath((top, target)) != top:
            return "link out of the source"
        parts = name.split("/")[:-1]
        above = {os.path.realpath("/".join((root, *parts[:i]))) for i in range(len(parts) + 1)}
        return "link to a folder above it" if target in above else ""


def _remote(entries: dict[str, int | None]) -> Iterator[tuple[str, int | None, str]]:
    for name, size in sorted(entries.items()):
        yield name, size, HIDDEN if name.rpartition("/")[2].startswith(".") else ""
