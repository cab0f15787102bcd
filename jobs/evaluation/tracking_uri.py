"""The MLflow store in which an evaluation is recorded."""

from __future__ import annotations

from dataclasses import replace

from jobs.errors import EvaluationError
from jobs.evaluation.config import EvaluationConfig
from model.artifact.artifact import ArtifactInfo
from pipeline.run.evaluation_summary import EvaluationSummary, local_path
from pipeline.run.relative_urls import resolve
from pipeline.tracking.client import SQLITE, TrackingConfig, default_uri, missing_store
from pipeline.tracking.untrusted_server import ADDRESSES, require_address


def record_store(
    config: EvaluationConfig, info: ArtifactInfo, summary: EvaluationSummary
) -> TrackingConfig:
    """The store that the command line names, else that of the run which made the artifact.

    An artifact may be anybody's: of the stores that it names, a file has to be there, and the
    address of a server has to be listed.

    Raises:
        EvaluationError: the artifact names another store.
    """
    named = config.tracking
    stated = info.context.get("tracking")
    stated = stated if isinstance(stated, dict) else {}
    experiment = named.experiment or stated.get("experiment")
    # As a training names its own.
    experiment = str(experiment or summary.dataset.removesuffix(f"-{summary.split}"))
    uri = str(stated.get("uri", ""))
    if named.uri or not uri:
        return replace(named, uri=named.uri or default_uri(), experiment=experiment)
    if uri.startswith(SQLITE):
        uri = SQLITE + local_path(resolve(uri.removeprefix(SQLITE), base=config.artifact))
        if missing := missing_store(uri):
            raise EvaluationError(f"{missing} (the artifact's run recorded there)")
        return replace(named, uri=uri, experiment=experiment)
    try:
        require_address(uri, named.addresses, uri)
    except ValueError:
        raise EvaluationError(
            f"the artifact's run recorded on the server {uri}: if it is yours, give "
            f"--tracking.uri {uri}, or list it in {ADDRESSES}"
        ) from None
    return replace(named, uri=uri, experiment=experiment)
