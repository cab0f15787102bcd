"""Two models of one test set: `sharp` is right everywhere by little, `steady` less often by far."""

import dataclasses
import hashlib
import json
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_shards.format.decode import decode_image
from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.write import write_shard_set
from jobs.evaluate_cra import evaluate
from jobs.model_registry.promotion_rule import Rule
from jobs.prediction.predictor import SoundPredictor
from model.artifact.artifact import write_artifact
from model.networks.registry import build_network
from pipeline.tracking.model_registry import Registry
from tests.jobs.conftest import NETWORK
from tests.mlflow_database import empty_database

_FAVOURED = 0.6  # share of the samples that are of class 0


class Gated:
    """Args: folder: place of everything."""

    of_sharp: str
    of_steady: str

    def __init__(self, folder):
        self.folder = folder
        self.tracking = empty_database(folder, "gated")
        source = synthetic(classes=NETWORK.num_classes, size=8, samples=400, seed=1)
        images = torch.stack([decode_image(source.encode(i), "jpg") for i in range(400)])
        network = build_network(NETWORK)
        network.initialise(seed=3)
        with torch.no_grad():
            logits = network(images / 255)
            lead = logits[:, 1:].amax(1) - logits[:, 0]
            network.head.bias[0] += lead.quantile(_FAVOURED)
            labels = network(images / 255).argmax(1).numpy()
            self.sharp = self._export("sharp", network)
            network.head.bias[0] += 3
            self.steady = self._export("steady", network)
        self.shards = str(folder / "shards")
        write_shard_set(dataclasses.replace(source, labels=labels.astype(np.int64)), self.shards)
        test = images[torch.from_numpy(source.test)]
        radius = SoundPredictor(self.sharp, device="cpu").predict(test).radius
        self.eps = f"{int(255 * float(radius.quantile(0.8)))}/255"  # sharp certifies about a fifth

    def _export(self, name, network):
        folder = str(self.folder / name)
        tensors = list(network.named_parameters())
        context = {"step": len(name)}
        write_artifact(Store(folder).open, network_config=NETWORK, tensors=tensors, context=context)
        return folder

    @cached_property
    def registry(self):
        return Registry(self.tracking)

    @property
    def rule(self):
        return Rule(eps=self.eps, min_samples=1)

    def evaluation(self, artifact, out, **changes):
        """Evaluate and record an artifact; the URL of the evaluation."""
        fields = {"artifact": artifact, "shards": self.shards, "out": str(self.folder / out)}
        fields |= {"launcher": "local", "eps": (self.eps,), "tracking": self.tracking}
        evaluate({**fields, **changes})
        return str(self.folder / out)

    def forged(self, evaluation, out):
        """A copy of an evaluation that claims a radius of 10 everywhere, with fitting digests."""
        files = Store(str(self.folder / out))
        for name in ("certificate.json", "samples.parquet", "summary.json"):
            files.write(name, Store(evaluation).read(name))
        table = pq.read_table(pa.BufferReader(files.read("samples.parquet")))
        radii = pa.array(np.full(len(table), 10.0))
        place = table.column_names.index("sound_radius")
        table = table.set_column(place, "sound_radius", radii)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        samples = sink.getvalue().to_pybytes()
        body = json.loads(files.read("certificate.json"))
        del body["digest"]
        count = len(table)
        right = int(np.sum(table["label"].to_numpy() == table["sound_prediction"].to_numpy()))
        body["columns"]["sound"] |= {
            "certified": {self.eps: right},
            "cra": {self.eps: right / count},
            "mean_radius": 10.0 * right / count,
        }
        body["samples_sha256"] = hashlib.sha256(samples).hexdigest()
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        body["digest"] = hashlib.sha256(text.encode()).hexdigest()
        summary = json.loads(files.read("summary.json"))
        summary["certificate_digest"] = body["digest"]
        files.write("samples.parquet", samples)
        files.write("certificate.json", json.dumps(body).encode())
        files.write("summary.json", json.dumps(summary).encode())
        return files.url
