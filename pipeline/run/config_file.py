"""The settings of a run as files: the record in its folder, and the YAML or TOML of a person."""

import re
import sys
from pathlib import PurePath
from typing import Any

import yaml
from pydantic import TypeAdapter

from data_shards.errors import ShardError
from data_shards.storage.store import Store
from data_shards.untrusted.limits import UntrustedError
from pipeline.config import HOW_TO_CONTINUE, RunConfig
from pipeline.errors import PipelineError
from pipeline.run import layout
from pipeline.run.lease import read_record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_STARTED = re.compile(r"(.+)-(\d{8}-\d{6})(?:-(\d+))?")
_HEAD = """\
# The settings of this run, all of them. A run with the same ones, or with others beside them:
# python -m pipeline.pretrain --config THIS_FILE --train.seed 1
"""


def stored_config(run: Store) -> RunConfig:
    """The settings of an existing run.

    Raises:
        PipelineError: they cannot be read.
        OSError: the store refused.
    """
    try:
        stored = read_record(run, layout.CONFIG) or run.read(layout.CONFIG, limit="json_bytes")
        return RunConfig.from_json(stored)
    except (PipelineError, UntrustedError) as error:
        raise PipelineError(
            f"{run}/{layout.CONFIG} cannot be used: {error}; restore it, or give another --name"
        ) from error


def newest_run(storage: Store, preset: str | None) -> str:
    """Name of the run that was started last, of those that were given no name.

    Args:
        storage: where the runs are.
        preset: of the run; None: of any.

    Raises:
        PipelineError: there is none.
        OSError: the store refused.
    """
    started: dict[str, tuple[str, int]] = {}
    for name in storage.ls(""):
        if (match := _STARTED.fullmatch(name)) and preset in (None, match[1]):
            started[name] = (match[2], int(match[3] or 1))
    for name in sorted(started, key=lambda name: started[name], reverse=True):
        if storage.child(name).exists(layout.CONFIG):
            return name
    which = f"of preset {preset!r} " if preset else ""
    raise PipelineError(f"--resume: no run {which}under {storage.url} without a --name of its own")


def to_yaml(config: RunConfig) -> str:
    """All settings but those that say how an existing run is continued, for --config."""
    body = TypeAdapter(RunConfig).dump_python(config, mode="json")
    body = {name: value for name, value in body.items() if name not in HOW_TO_CONTINUE}
    return _HEAD + str(yaml.safe_dump(body, sort_keys=False, allow_unicode=True))


def read_file(place: str) -> dict[str, Any]:
    """Settings, nested as in the configuration, of a file.

    Args:
        place: path or URL of a file that ends in .toml, or of one in YAML (as JSON is, too).

    Raises:
        PipelineError: there is no such file, or it holds no settings.
    """
    path = PurePath(place)
    folder = place[: -len(path.name)] or "."
    try:
        text = Store(folder).read(path.name, limit="json_bytes").decode()
        body = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, ShardError, UntrustedError) as error:
        raise PipelineError(f"--config {place}: {type(error).__name__}: {error}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PipelineError(f"--config {place}: {reason}") from error
    if not isinstance(body, dict) or not all(isinstance(name, str) for name in body):
        raise PipelineError(f"--config {place}: settings by name are needed, as `train: ...`")
    body.pop("schema_version", None)  # of the record of a run
    return body
