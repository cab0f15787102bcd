"""An embedded MLflow store that was copied or moved with its storage: its addresses follow it.

MLflow keeps absolute addresses in its database: a copy would go on writing its artifacts into the
folder that it was copied from, and name the model artifacts there. An experiment of ours lies
beside its database, so one that does not tells where the database was before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from data_shards.untrusted.json_input import read_object
from pipeline.run.relative_urls import moved

logger = logging.getLogger(__name__)

ARTIFACTS = "mlartifacts"
"""Folder of MLflow's own artifacts, beside the database."""
_BUSY_S = 5
SQLITE = "sqlite:///"
"""What the address of an embedded store begins with."""
_ADDRESSES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "tags": ("value",),
    "params": ("value",),
    "datasets": ("dataset_source",),
    "logged_models": ("artifact_location",),
    "logged_model_tags": ("tag_value",),
    "logged_model_params": ("param_value",),
    "model_versions": ("source", "storage_location"),
    "model_version_tags": ("value",),
}


def location(database: Path) -> str:
    """Where the artifacts of our experiments lie."""
    return f"{database.parent.as_uri()}/{ARTIFACTS}"


def relocate(database: Path) -> None:
    """Let the addresses of a database that was copied or moved name the place where it lies now.

    Nobody else may have it open for the first time meanwhile.
    """
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=_BUSY_S)) as connection, connection:
        for before in _places(connection):
            if before == database.parent or _is_same(before / database.name, database):
                continue
            logger.warning(
                "%s was copied or moved from %s: its addresses name the new place from now on",
                database,
                before,
            )
            _replace(connection, before, database.parent)
            _note(database, before)


def follow(uri: str, address: str) -> str:
    """Where something lies that a file in an MLflow store names.

    Args:
        uri: the store.
        address: URL or path, perhaps of the place where the store was when the file was written.
    """
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE))
        for before in _noted(database):
            address = moved(address, before=f"file://{before}", now=f"file://{database.parent}")
    return address


def _places(connection: sqlite3.Connection) -> Iterator[Path]:
    """Folders in which the database has been, by the experiments that were made there."""
    if "artifact_location" not in _columns(connection, "experiments"):
        return  # MLflow has not made its tables yet
    rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    for (where,) in rows:
        if where and where.startswith("file:///") and where.endswith(f"/{ARTIFACTS}"):
            yield Path(_path(where)).parent


def _path(uri: str) -> str:
    from urllib.request import url2pathname

    return url2pathname(uri.removeprefix("file://"))


def _is_same(one: Path, other: Path) -> bool:
    """Whether a folder only has two names, such as a link."""
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False


def _replace(connection: sqlite3.Connection, before: Path, now: Path) -> None:
    spellings = {before.as_uri(): now.as_uri(), f"file://{before}": f"file://{now}"}
    spellings[str(before)] = str(now)
    for table, columns in _ADDRESSES.items():
        present = _columns(connection, table)
        for column in present & set(columns):
            for old, new in spellings.items():
                # At the beginning of the value, or of a text in JSON.
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )
                connection.execute(
                    f"UPDATE {table} SET {column} = replace({column}, ?, ?)",
                    (f'"{old}/', f'"{new}/'),
                )


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}


def _notes(database: Path) -> Path:
    return database.with_name(f"{database.name}.moved")


def _noted(database: Path) -> list[str]:
    try:
        with _notes(database).open("rb") as file:
            return [str(place) for place in read_object(file, _notes(database))["before"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def _note(database: Path, before: Path) -> None:
    places = [*_noted(database), str(before)]
    _notes(database).write_text(json.dumps({"before": list(dict.fromkeys(places))}, indent=1))
