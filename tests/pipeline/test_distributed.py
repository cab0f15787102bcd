"""What the ranks of one machine listen on."""

import contextlib
import datetime
import os
from unittest import mock

import pytest
import torch

from pipeline.config import ClusterConfig
from pipeline.run import distributed
from pipeline.run.distributed import join_process_group, listening_store
from pipeline.training import zero3
from tests.strangers import listening, off_loopback


def test_the_group_and_the_store_of_a_lone_rank_are_on_loopback(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**single, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    before = listening(os.getpid())
    with join_process_group(ClusterConfig(launcher="local", device="cpu")):
        group = listening(os.getpid()) - before
        assert group
        store = listening_store(0, datetime.timedelta(seconds=10))
        ports = {port for _, _, port in listening(os.getpid()) - before}
        assert store.port in ports - {port for _, _, port in group}
        assert off_loopback(listening(os.getpid()) - before) == set()


@contextlib.contextmanager
def joined(monkeypatch, *, cuda):
    """A lone rank, on a device that claims to be a GPU."""
    genuine = distributed.create_group
    for name in ("RANK", "DS_ACCELERATOR", "LOCAL_SIZE", *ALLOCATOR, *INTERFACES):
        monkeypatch.setenv(name, "")  # goes back to what it was
        monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "use_cuda", lambda *_: cuda)
    monkeypatch.setattr(distributed, "create_group", lambda _, timeout: genuine("gloo", timeout))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    yield


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("cuda", "own", "expected"),
    [
        (True, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (False, {}, {}),
        (True, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_blocks_grow_on_a_gpu_unless_the_user_says_otherwise(cuda, own, expected, monkeypatch):
    with joined(monkeypatch, cuda=cuda):
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        with join_process_group(ClusterConfig(launcher="local")):
            found = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    assert found == (own if expected is None else expected)


def test_no_environment_of_ray_overrules_that_of_the_user():
    from pipeline.launch.ray_launcher import _WORKER_ENVIRONMENT

    assert not set(_WORKER_ENVIRONMENT) & {*ALLOCATOR, *INTERFACES}


@pytest.mark.parametrize(("backend", "named"), [("gloo", INTERFACES[:1]), ("nccl", INTERFACES)])
def test_interfaces_are_named_to_the_libraries_that_a_device_uses(backend, named, monkeypatch):
    genuine = distributed.create_group
    with joined(monkeypatch, cuda=False):
        monkeypatch.setattr(distributed.dist, "init_process_group", mock.Mock())
        monkeypatch.setattr(distributed, "listening_store", mock.Mock())
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            monkeypatch.setenv(name, "0")
        genuine(backend, datetime.timedelta(seconds=1))
        assert [name for name in INTERFACES if name in os.environ] == list(named)


@pytest.mark.parametrize(("kind", "local_size"), [("cpu", "3"), ("cuda", None)])
def test_deepspeed_computes_where_the_rank_does(kind, local_size, monkeypatch):
    with joined(monkeypatch, cuda=False):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        zero3._import_deepspeed(torch.device(kind))
        assert os.environ["DS_ACCELERATOR"] == kind
        assert os.environ.get("LOCAL_SIZE") == local_size


def test_fp16_is_asked_of_the_device_of_the_run(monkeypatch):
    """And not of a GPU that lies beside it."""
    asked = []
    accelerator = mock.Mock(**{"get_accelerator.return_value.is_fp16_supported.return_value": True})

    def imported(device):
        asked.append(device.type)
        return accelerator

    monkeypatch.setattr(zero3, "_import_deepspeed", imported)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    zero3.require_precision("fp16", torch.device("cpu"))
    assert asked == ["cpu"]


def test_beside_a_gpu_each_core_of_a_rank_makes_a_matrix(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for kind, expected in (("cuda", (12, 1)), ("cpu", (1, 2))):
            with zero3._initialising_threads(torch.device(kind)) as threads:
                assert (threads, torch.get_num_threads()) == expected
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
