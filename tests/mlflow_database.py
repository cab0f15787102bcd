"""Empty MLflow databases: MLflow takes seconds to make one, by all migrations that ever were."""

import functools
import tempfile
from pathlib import Path

from pipeline.tracking.client import TrackingConfig, connect


@functools.cache
def _empty() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        connect(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


def empty_database(folder: Path, experiment: str) -> TrackingConfig:
    """Put an empty database into `folder`; returns how an experiment in it is addressed."""
    path = Path(folder, "mlflow.db")
    path.write_bytes(_empty())
    return TrackingConfig(uri=f"sqlite:///{path}", experiment=experiment)
