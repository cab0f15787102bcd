"""Addresses inside of a storage, kept so that it can be copied and moved as a whole."""

import posixpath
from urllib.parse import urlsplit

from data_shards.storage.store import Store


def relative(address: str, *, base: str, within: str) -> str:
    """An address as it is written down.

    Args:
        address: URL or path.
        base: folder of what names it.
        within: folder that is moved as a whole.

    Returns:
        The way from `base` where both lie in `within`, such as `../../data/digits`; else `address`.
    """
    there, here, root = (Store(text).url for text in (address, base, within))
    if not all(f"{url}/".startswith(f"{root}/") for url in (there, here)):
        return address
    return posixpath.relpath(there.removeprefix(root) or "/", here.removeprefix(root) or "/")


def resolve(address: str, *, base: str) -> str:
    """Inverse of `relative`, where `base` lies now."""
    if urlsplit(address).scheme or address.startswith(("/", "~")):
        return address
    scheme, _, path = Store(base).url.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(path, address))}"


def moved(address: str, *, before: str, now: str) -> str:
    """Where something lies after the folder `before` was copied or moved to `now`.

    Args:
        address: URL or path; unchanged if it does not lie in `before`.
        before: URL of the folder as it was.
        now: the same as it is.
    """
    url = Store(address).url
    if f"{url}/".startswith(f"{before}/"):
        return now + url.removeprefix(before)
    return address


def roots(before: str, now: str) -> tuple[str, str]:
    """The folders that became one another, from the same object's address in both.

    Args:
        before: URL of an object in the first.
        now: URL of its copy in the second; the names that both end with belong to the object.
    """
    parts = [Store(url).url.split("/") for url in (before, now)]
    while all(len(part) > 1 for part in parts) and parts[0][-1] == parts[1][-1]:
        parts = [part[:-1] for part in parts]
    return "/".join(parts[0]), "/".join(parts[1])
