"""Addresses that an MLflow server names, and answers that it gives: neither is simply believed.

Who opens an embedded store (sqlite) reads what this machine has written. A server may be anybody's:
it could name local files, which would be read, sent or overwritten, or any address of the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_shards.untrusted.limits import UntrustedError, require

ADDRESSES = "CERTIFIED_PRETRAIN_ADDRESSES"
"""Prefixes that a server may name, separated by blanks."""


class AddressError(ValueError):
    """A server names an address that nobody has listed; the message says how to list it."""


class AnswerError(RuntimeError):
    """A server answers something else than was asked, so nothing counts as recorded."""


def listed_addresses() -> tuple[str, ...]:
    """The prefixes that the environment lists."""
    return tuple(os.environ.get(ADDRESSES, "").split())


def require_address(uri: str, listed: Sequence[str], address: str) -> str:
    """An address from the store, if it may be opened.

    Args:
        uri: the MLflow store that names it.
        listed: URL prefixes under which it may lie.
        address: the address.

    Raises:
        AddressError: the store is a server, and the address lies under none of the prefixes.
    """
    if uri.startswith("sqlite:") or any(_lies_under(prefix, address) for prefix in listed):
        return address
    known = ", ".join(listed) or "none"
    raise AddressError(
        f"the MLflow server {uri} names {address!r}, which lies under no listed address ({known}); "
        f"if it is yours, list its prefix with --tracking.addresses or {ADDRESSES}"
    )


def require_location(uri: str, listed: Sequence[str], location: str) -> str:
    """As `require_address`, where files of a run lie: the server itself may keep them, too."""
    parts = urlsplit(location)
    own = parts.scheme == "mlflow-artifacts" and parts.netloc in ("", urlsplit(uri).netloc)
    return location if own else require_address(uri, listed, location)


def _lies_under(prefix: str, address: str) -> bool:
    (*where, inside), (*there, path) = _parts(prefix), _parts(address)
    return where == there and path[: len(inside)] == inside and ".." not in path


def _parts(address: str) -> tuple[str, str, list[str]]:
    """Scheme, host and path of a URL or local path."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme in ("file", "local"):
        local = rest if separator else address.removeprefix("file:")
        return "file", "", [part for part in Path(local).expanduser().absolute().parts if part]
    host, _, path = rest.partition("/")
    # Decoded: a client may take %2e%2e for .. as well.
    return scheme, host, [part for part in unquote(path).split("/") if part]


def require_answer(found: Any, expected: Any, what: str, uri: str) -> str:
    """An id that a server has answered.

    Args:
        found: the id.
        expected: which one it has to be; None: any.
        what: of which it is the id.
        uri: the MLflow store.

    Raises:
        AnswerError: there is none, or it is another one.
    """
    if not found or (expected is not None and found != expected):
        wanted = "one" if expected is None else repr(expected)
        raise AnswerError(f"MLflow {uri} answers {found!r} for {what}, not {wanted}")
    return str(found)


def bound_answers() -> None:
    """Hold every answer that MLflow's client reads in this process to the limit, uncompressed."""
    from mlflow.utils import request_utils

    genuine = request_utils._get_request_session
    if getattr(genuine, "bounded", False):
        return

    def session(*arguments: Any, **options: Any) -> Any:
        found = genuine(*arguments, **options)
        if _bounded not in found.hooks["response"]:
            found.hooks["response"].append(_bounded)
        return found

    session.bounded = True  # type: ignore[attr-defined]
    request_utils._get_request_session = session


def _bounded(response: Any, **options: Any) -> None:
    """A hook of `requests`, which calls it before the body is read."""
    genuine = response.iter_content

    def iter_content(*arguments: Any, **options: Any) -> Iterator[bytes]:
        size = 0
        for piece in genuine(*arguments, **options):
            size += len(piece)
            try:
                require(size, "answer_bytes", f"the answer of {urlsplit(response.url).netloc} has")
            except UntrustedError:
                response.close()  # what is left of it is not read
                raise
            yield piece

    response.iter_content = iter_content
