"""What a Ray job knows of its submission: for the tags of the run and for its code version."""

import getpass
import os
from pathlib import Path

from data_shards.untrusted.json_input import parse_object

_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_PACKAGE = "_ray_pkg_"


def is_ray_job() -> bool:
    """Whether this process is the entry of a Ray job."""
    return _VARIABLE in os.environ


def default_storage() -> Path:
    """Where runs and data go without --storage; the folder of a Ray job would be thrown away."""
    return Path.home() / "certified-pretrain" if is_ray_job() else Path("runs")


def submission_tags() -> dict[str, str]:
    """Tags of the tracked run: the Ray job, its metadata, and who submitted it.

    `user` of the metadata wins over the account of this process, which on a cluster is everybody's.
    """
    metadata = _metadata()
    job = metadata.pop("job_submission_id", "")
    metadata.pop("job_name", None)
    user = metadata.pop("user", "") or _account()
    tags = {f"ray_job.{name}": value for name, value in metadata.items()}
    if job:
        tags["ray_job"] = job
    return {**tags, "mlflow.user": user}


def uploaded_code(root: Path) -> str | None:
    """Digest by which Ray names an uploaded working directory, None for any other folder."""
    name = root.name
    return f"uploaded-{name.removeprefix(_PACKAGE)}" if name.startswith(_PACKAGE) else None


def _metadata() -> dict[str, str]:
    body = parse_object(os.environ.get(_VARIABLE, "{}"), _VARIABLE)
    return {str(name): str(value) for name, value in (body.get("metadata") or {}).items()}


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return str(os.getuid())
