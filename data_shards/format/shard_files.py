"""The files of a set's shards: beside the index, or where another program wrote them."""

import dataclasses
import functools
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence

from data_shards.storage.store import Store


class Traffic:
    """Ranges asked of the stores and the bytes that came; threads share it, processes do not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = 0
        self.bytes = 0

    def __reduce__(self) -> tuple[type["Traffic"], tuple[()]]:
        return Traffic, ()

    def add(self, requests: int, size: int) -> None:
        """Count ranges that were read."""
        with self._lock:
            self.requests += requests
            self.bytes += size


@dataclasses.dataclass(frozen=True)
class ShardFiles:
    """Reads shards by the names that the header gives them.

    Args:
        store: Directory of the set.
        sources: Name -> where the file of another program lies, relative to the set or as a URL;
            None for a file of the set's own.
        traffic: What was read so far.
    """

    store: Store
    sources: Mapping[str, str | None]
    traffic: Traffic = dataclasses.field(default_factory=Traffic, compare=False)

    @functools.cached_property
    def _located(self) -> dict[str, tuple[Store, str]]:
        """Name -> store and name in it; one store per folder, so that connections are shared."""
        stores = {str(self.store): self.store}
        found = {}
        for file, source in self.sources.items():
            folder, _, name = (source or file).rpartition("/")
            if "://" in folder:
                found[file] = stores.setdefault(folder, Store(folder)), name
            else:
                found[file] = self.store, source or file
        return found

    @property
    def local(self) -> bool:
        """Whether all files are on this machine."""
        stores = {self.store, *(store for store, _ in self._located.values())}
        return all(store.local_path() is not None for store in stores)

    @property
    def retries(self) -> int:
        """Requests that were repeated after a fault of a store."""
        stores = {self.store, *(store for store, _ in self._located.values())}
        return sum(store.retries for store in stores)

    def locate(self, file: str) -> tuple[Store, str]:
        """Return the store of a shard and its name in there."""
        return self._located[file]

    def describe(self, file: str) -> str:
        """Return where a shard lies, for messages."""
        store, name = self._located[file]
        return f"{store}/{name}"

    def survey(self) -> tuple[dict[str, int], list[str]]:
        """Return the bytes of every shard that is there, and tars beside the index that are none.

        One listing per folder, or a request per shard where a server need not list. A set with
        shards of another program tells nothing of what else lies beside the index: that may be the
        other one's folder.
        """
        folders: dict[tuple[Store, str], dict[str, str]] = defaultdict(dict)
        for file, (store, name) in self._located.items():
            folders[store, name.rpartition("/")[0]][name] = file
        sizes: dict[str, int] = {}
        strays: set[str] = set()
        for (store, folder), names in folders.items():
            if not store.lists:
                found = store.sizes_of(list(names))
                sizes |= {names[name]: size for name, size in found.items()}
                continue
            listed = store.sizes(folder)
            sizes |= {file: listed[name] for name, file in names.items() if name in listed}
            strays |= {name for name in listed if name.endswith(".tar") and name not in names}
        return sizes, [] if any(self.sources.values()) else sorted(strays)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return bytes [start, stop) of each (file, start, stop), as `Store.read_ranges` does."""
        by_store: dict[Store, list[int]] = defaultdict(list)
        for place, (file, _, _) in enumerate(ranges):
            by_store[self._located[file][0]].append(place)
        found: dict[int, bytes] = {}
        for store, places in by_store.items():
            wanted = [(self._located[ranges[i][0]][1], *ranges[i][1:]) for i in places]
            found |= zip(places, store.read_ranges(wanted), strict=True)
        self.traffic.add(len(ranges), sum(map(len, found.values())))
        return [found[place] for place in range(len(ranges))]

    def read_range(self, file: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of one shard; fewer if it ends earlier."""
        return self.read_ranges([(file, start, stop)])[0]
