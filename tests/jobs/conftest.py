import pytest

from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.write import write_shard_set
from model.artifact.artifact import write_artifact
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network
from pipeline.run.ray_session import ray_session
from tests.blank_figures import blank_figures, drawn_figures  # noqa: F401

NETWORK = LipNeXtConfig(input_shape=(3, 8, 8), num_classes=4, patch=2, width=16, depth=1)


def export(folder, config=NETWORK, class_names=(), **context):
    """Write an artifact of untrained weights."""
    network = build_network(config)
    network.initialise(seed=3)
    write_artifact(
        Store(folder).open,
        network_config=config,
        tensors=network.named_parameters(),
        context=context,
        class_names=class_names,
    )
    return str(folder)


@pytest.fixture
def bare_artifact(tmp_path):
    """An artifact that does not say where it comes from."""
    return export(tmp_path / "bare")


@pytest.fixture(scope="session")
def network():
    """The network of the artifact."""
    network = build_network(NETWORK)
    network.initialise(seed=3)
    return network


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shard_set(synthetic(classes=4, size=8, samples=100, seed=1), str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory, shards):
    return export(tmp_path_factory.mktemp("artifact"), shards_url=shards, step=7)


def plain_fields(artifact, out):
    return {
        "artifact": artifact,
        "launcher": "local",
        "batch_size": 3,
        "eps": ("1/255", "36/255"),
        "out": str(out),
        "record": False,
    }


@pytest.fixture
def fields(artifact, tmp_path):
    """Config fields of a local evaluation with its own output."""
    return plain_fields(artifact, tmp_path / "out")


@pytest.fixture(scope="module")
def local_ray():
    with ray_session(num_cpus=2) as ray:
        yield ray
