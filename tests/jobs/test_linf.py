"""The path of a network that is certified in l-infinity, from artifact to metrics."""

import json

import pytest
import torch

from data_shards.storage.store import Store
from jobs.errors import EvaluationError
from jobs.evaluate_cra import evaluate
from jobs.evaluation import certify_tasks
from model.artifact.artifact import write_artifact
from model.errors import ModelError
from model.networks.base import LipschitzBound
from model.networks.linf.groupsort import GroupSortConfig
from model.networks.linf.sortnet import SortNet, SortNetConfig
from model.networks.registry import build_network
from tests.repetitions import mostly_slow

pytestmark = pytest.mark.integration

SHAPE = {"input_shape": (3, 8, 8), "num_classes": 4}
SORTNET = SortNetConfig(**SHAPE, width=12, depth=2, keep=0.7, input_scale=2.0)
MLP = SortNetConfig(**SHAPE, width=12, depth=2, keep=0.7, input_scale=2.0, hidden=9)
GROUPSORT = GroupSortConfig(**SHAPE, width=8, depth=2)


@pytest.fixture(
    params=mostly_slow([MLP, SORTNET, GROUPSORT], [MLP]), ids=["mlp", "sortnet", "groupsort"]
)
def settings(request, shards, tmp_path):
    """An evaluation of an untrained network with the usual radii and an attack."""
    network = build_network(request.param).eval()
    network.initialise(seed=3)
    network.calibrate([torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))])
    tensors = [*network.named_parameters(), *network.named_buffers()]
    write_artifact(
        Store(str(tmp_path / "artifact")).open,
        network_config=request.param,
        tensors=tensors,
        context={"shards_url": shards},
    )
    return {
        "artifact": str(tmp_path / "artifact"),
        "out": str(tmp_path / "out"),
        "launcher": "local",
        "batch_size": 7,
        "attack": "fast",
        "record": False,
    }


def test_batches_are_certified_together_as_one_by_one(settings, tmp_path, monkeypatch):
    found = []
    for elements in (1 << 20, 1):
        monkeypatch.setattr(certify_tasks, "_CERTIFIED_ELEMENTS", elements)
        out = str(tmp_path / f"certified-{elements}")
        evaluate(settings | {"attack": "none", "out": out})
        found.append(Store(out).read("samples.parquet"))
    assert found[0] == found[1]


def test_radii_metrics_and_attacks_are_those_of_the_norm(settings, tmp_path):
    summary = evaluate(settings)
    assert summary.norm == "linf"
    assert summary.layers == ()
    sound = summary.columns["sound"]
    assert list(sound.cra) == ["2/255", "8/255", "16/255", "25/255"]
    assert sound.curve[-1][0] == 0.5
    assert 0 < sound.mean_radius < 1
    names = {f"{name}/linf/8_255" for name in ("cra_sound", "cra_deployed", "attack")}
    assert names <= set(summary.metrics())
    assert summary.attack.inside_radius_samples > 0
    assert summary.attack.inside_radius_flips == 0
    for ratio, certified in sound.cra.items():
        assert certified <= summary.attack.accuracy[ratio] <= sound.clean
    nominal, deployed = summary.columns["nominal"], summary.columns["deployed"]
    assert nominal.mean_radius == pytest.approx(sound.mean_radius, rel=1e-4)
    assert 0.9 * sound.mean_radius < deployed.mean_radius < sound.mean_radius
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"cra.png", "radius.png", "certificate.json"} <= written
    assert "bounds.png" not in written
    body = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert body["norm"] == "linf"
    assert body["layers"] == []


def test_refuses_a_radius_beyond_the_range_of_pixels(settings):
    with pytest.raises(EvaluationError, match=r"eps 256/255 is larger than 1, the greatest"):
        evaluate({**settings, "eps": ("256/255",)})


@pytest.mark.parametrize("settings", [SORTNET], indirect=True, ids=["sortnet"])
def test_a_constant_that_is_too_small_is_refuted(settings, monkeypatch):
    monkeypatch.setattr(
        SortNet, "lipschitz_upper_bound", lambda *_: LipschitzBound(1.5, {"pixels": 1.5})
    )
    with pytest.raises(ModelError, match=r"at most 1\.5, but a derivative shows at least (1\.9|2)"):
        evaluate(settings)
