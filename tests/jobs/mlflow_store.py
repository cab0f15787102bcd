"""An MLflow store with the checkpoints of a training run, as the trainer records them."""

import json
from pathlib import Path

from data_shards.storage.store import Store as Folder
from jobs.evaluation.runner import artifact_info, evaluation_keys
from jobs.scheduling.config import ScheduleConfig
from model.artifact.artifact import write_artifact
from model.networks.registry import build_network
from pipeline.tracking.checkpoint_query import CheckpointQuery
from pipeline.tracking.client import MlflowConnection, now_ms
from tests.jobs.conftest import NETWORK
from tests.mlflow_database import empty_database


class Store:
    """Args: folder: place of mlflow.db, the artifacts and the claims; shards: their shard set."""

    def __init__(self, folder, shards, status="FINISHED", **params):
        self.folder, self.shards = Path(folder), shards
        self.tracking = empty_database(folder, "set")
        self.server = MlflowConnection(self.tracking)
        self.run_id = self.train("run", status, **params)

    def train(self, name, status="FINISHED", **params):
        run = self.server.start_run(name, None, name, params, {}, now_ms())
        if status != "RUNNING":
            self.server.finish_run(run.run_id, status, now_ms())
        return run.run_id

    def checkpoint(self, step, *, run_id=None):
        """Export an artifact and record it; what the fake evaluation needs lies beside it."""
        run_id = run_id or self.run_id
        folder = self.folder / "artifacts" / f"{run_id[:6]}-step-{step}"
        context = {"shards_url": self.shards, "step": step, "train_run_id": run_id}
        network = build_network(NETWORK)
        network.initialise(seed=step)
        write_artifact(
            Folder(folder).open,
            network_config=NETWORK,
            tensors=network.named_parameters(),
            context=context,
        )
        url = folder.as_uri()
        digest = artifact_info(url).digest
        model_id = self.server.find_or_create_model(
            run_id, step=step, artifact_url=url, digest=digest, params={}
        )
        return url, digest, model_id

    def fake_checkpoint(self, step, suite="certify+fast-attack"):
        """A checkpoint whose evaluation by tests.jobs.fake_evaluation is one of its own."""
        url, digest, model_id = self.checkpoint(step, run_id=self.train(f"run-{step}"))
        (found,) = [c for c in self.watch().checkpoints() if c.model_id == model_id]
        facts = {
            "eval_key": evaluation_keys(self.config().evaluation(suite, found))[-1],
            "digest": digest,
            "run_id": found.run_id,
            "model_id": model_id,
        }
        folder = Path(url.removeprefix("file://"))
        (folder / "facts.json").write_text(json.dumps(facts))
        return folder

    def config(self, **changes):
        return ScheduleConfig(**{"tracking": self.tracking, **changes})

    def watch(self, **changes):
        return CheckpointQuery(self.tracking.uri, ("set",), **changes)
