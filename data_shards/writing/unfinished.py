"""Whose unfinished work lies in a folder: one set at a time is written there."""

import contextlib
from collections.abc import Iterator

from data_shards.errors import ShardError
from data_shards.format.shard_index import HEADER_FILE, load_header
from data_shards.storage.store import Store

PROGRESS = ".progress"
_CLAIM = "claim.json"


@contextlib.contextmanager
def claim(store: Store, folder: str) -> Iterator[None]:
    """Mark a place as that of one unfinished set, before anything else is written there.

    Processes that write the same set share the mark. Of two that begin different sets at the same
    time at least one gives up: each writes its mark before it looks for others. A block that fails
    before it wrote anything leaves no mark; whoever ends well removes `PROGRESS`.

    Args:
        store: Where the set is written.
        folder: Where its unfinished work lies, `.progress/` and a name that says which set it is.

    Raises:
        ShardError: another set is being written there, or was and is unfinished.
    """
    if not _refuse_others(store, folder):
        store.write(f"{folder}/{_CLAIM}", b"{}\n")
    try:
        _refuse_others(store, folder)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if store.ls(folder) == [f"{folder}/{_CLAIM}"]:
                store.remove(folder, recursive=True)
        raise


@contextlib.contextmanager
def or_finished_elsewhere(store: Store) -> Iterator[None]:
    """Do without a file that is gone because another process has finished the set and tidied up."""
    try:
        yield
    except FileNotFoundError:
        if not store.exists(HEADER_FILE):
            raise


def _refuse_others(store: Store, folder: str) -> bool:
    """Raise where the work of another set lies; return whether that of this one does."""
    names = store.ls(PROGRESS)
    others = [name for name in names if name != folder]
    if others:
        raise ShardError(
            f"{store} holds an unfinished set ({others[0]}) of another source, of other options or "
            "of other encoders. Choose another place (--out) or remove it first"
        )
    return bool(names)


def refuse_other_set(store: Store, plan: str) -> None:
    """Check that a finished set is the one that was asked for.

    Args:
        store: Where it lies.
        plan: What identifies the set that was asked for; the header of a set states its own.

    Raises:
        ShardError: it is another one.
    """
    present = load_header(store)
    if present.generator.get("plan") != plan:
        raise ShardError(
            f"{store} already holds another shard set, {present.name!r} with digest "
            f"{present.digest()}, than what was asked for. Choose another --out or remove its "
            f"{HEADER_FILE} first"
        )
