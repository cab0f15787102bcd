"""What would break on GPUs and can be seen without one: engines that stay, streams, hangs."""

import contextlib
import gc
import os
import threading
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch

from data_shards.storage.store import Store
from jobs.evaluation import certify_tasks, executor
from model.certification.nvidia_overrides import library_overrides
from model.networks.base import CertifiedNetwork
from pipeline.config import CheckpointConfig, ClusterConfig
from pipeline.driver import preflight
from pipeline.errors import PipelineError
from pipeline.planner import environment_checks
from pipeline.presets.registry import PRESETS, run_preset
from pipeline.resilience import hang_detector
from pipeline.resilience.device_progress import DeviceProgress, collectives_begun
from pipeline.resilience.hang_detector import HangDetector
from pipeline.resilience.heartbeat import Beat, Phase, behind
from pipeline.resilience.oom import holding, is_out_of_memory
from pipeline.run.distributed import DistributedContext
from pipeline.training.schedules import StepContext
from pipeline.training.worker import build_engine
from tests.harness import run_ranks
from tests.pipeline.small_runs import batches, rank_world, small_run

NOW = StepContext(0, 0.0, 1.0, 36 / 255)


# -- the engine ----------------------------------------------------------------------------------


def tensor_bytes():
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            storage = found.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def engines(rank, world_size):
    """Bytes of tensors after each engine, and the order of copies and waits of streams."""
    left, order = [], []
    with rank_world(rank, world_size) as world:
        for _ in range(3):
            engine = build_engine(small_run(), world=world, micro_batch=24)
            engine.initialise(seed=3)
            (batch,) = batches(1, 24)
            engine.step([batch], NOW)
            engine.close()
            del engine, batch
            left.append(tensor_bytes())

        engine = build_engine(small_run(), world=world, micro_batch=24)
        zero = engine._engine.optimizer
        coordinator = zero.parameter_offload.param_coordinator
        name = "_PartitionedParameterCoordinator__allgather_stream"
        before = getattr(coordinator, name)
        stream = mock.Mock()
        setattr(coordinator, name, stream)
        with mock.patch.object(torch.accelerator, "current_stream", return_value="current"):
            for what, act in (
                ("publish", engine.partitions[0].publish),
                ("initialise", lambda: engine.initialise(seed=3)),
            ):
                stream.wait_stream.reset_mock()
                act()
                order.append((what, stream.wait_stream.call_count > 0))
            setattr(coordinator, name, None)  # the passes of DeepSpeed itself need none here
            waited = []
            with mock.patch(
                "pipeline.training.zero3._order_streams",
                lambda optimizer: waited.append(optimizer is zero),
            ):
                engine.step(batches(1, 24), NOW)
            order.append(("step", waited == [True]))
        engine.close()
    return left, before, order


@pytest.fixture(scope="module")
def engine_run():
    return run_ranks(engines, 1, timeout=200)[0]


def test_an_engine_that_is_closed_gives_its_memory_back(engine_run):
    left, _, _ = engine_run
    assert left[2] <= left[0] + 4096, left


def test_what_is_gathered_waits_for_what_was_written(engine_run):
    _, before, order = engine_run
    assert before is None  # and DeepSpeed still has the stream under this name
    assert order == [("publish", True), ("initialise", True), ("step", True)]


# -- lack of memory ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error\n"
        "Last error:\nFailed to CUDA calloc async 4194304 bytes",
        "Cuda failure 2 'out of memory'",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA driver error: out of memory",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_libraries_say_in_their_own_words_that_memory_is_lacking(text):
    assert is_out_of_memory(torch.distributed.DistBackendError(text))
    expected = pytest.raises(PipelineError, match="while the engine is built, which smaller")
    with expected, holding("the engine is built"):
        raise RuntimeError(text)


@pytest.mark.parametrize("text", ["NCCL error: remote process exited", "Cuda failure 700"])
def test_what_is_no_lack_of_memory_stays_what_it_is(text):
    with pytest.raises(RuntimeError, match=text), holding("the engine is built"):
        raise RuntimeError(text)


# -- hangs ---------------------------------------------------------------------------------------


def beat(place, *, waits, begun=-1):
    return Beat(10, Phase.STEP, overdue=True, waits=waits, place=place, tick=1, begun=begun)


def test_the_rank_whose_device_is_idle_keeps_the_others_waiting():
    beats = [
        beat("objective.py:50 in forward", waits=True),
        beat("layers.py:7 in forward", waits=False),
        beat("matrix_exp.py:255 in norms", waits=True),
    ]
    assert behind(beats) == [1]


def test_the_rank_that_has_begun_fewer_collectives_keeps_the_others_waiting():
    beats = [beat("a", waits=True, begun=n) for n in (7, 7, 6, 7)]
    assert behind(beats) == [2]
    assert behind([beat("a", waits=True, begun=7)] * 3) == []


def test_the_flight_recorder_is_read_where_it_is():
    import pickle

    def trace(*counts):
        groups = {str(i): {"last_enqueued_collective": str(n)} for i, n in enumerate(counts)}
        return lambda: pickle.dumps({"version": "2.10", "pg_status": groups})

    assert collectives_begun(trace(41, -1)) == 41
    assert collectives_begun(lambda: pickle.dumps({})) == -1
    assert collectives_begun(lambda: b"") == -1


class Device:
    """A queue that stands still after a while; marks behind that are never reached."""

    def __init__(self):
        self.stands = threading.Event()

    def __call__(self):
        return self

    def record(self, stream):
        assert stream == "queue"

    def query(self):
        return not self.stands.is_set()


def test_a_device_that_gets_nowhere_is_seen_and_one_that_does_is_not():
    device = Device()
    progress = DeviceProgress(torch.device("cpu"), 0.02, mark=device, stream="queue")
    time.sleep(0.2)
    assert not progress.blocked()
    device.stands.set()
    deadline = time.monotonic() + 20
    while not progress.blocked() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert progress.blocked()
    device.stands.clear()
    while progress.blocked() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not progress.blocked()
    progress.close()


def test_a_rank_in_a_host_wait_says_that_it_waits(tmp_path):
    """Frames as NCCL leaves them: the training thread stands in code of the project."""
    world = DistributedContext(0, 1, torch.device("cuda", 0), None, ("here",))
    with (
        mock.patch.object(hang_detector, "DeviceProgress") as progress,
        mock.patch.object(hang_detector, "collectives_begun", return_value=12),
        mock.patch.object(threading.Thread, "start"),
    ):
        progress.return_value.blocked.return_value = True
        cluster = ClusterConfig(launcher="local", hang_timeout_s=5)
        watching = HangDetector(world, cluster, step=0, run=Store(str(tmp_path)), emit=print)
        found = watching._own_beat()
        watching.close()
    assert found.waits
    assert found.begun == 12
    assert "12 collectives begun" in str(found)


def test_a_check_of_the_fabric_says_what_a_rank_sends():
    found = run_ranks(measured_fabric, 2, timeout=100)
    for status, value, advice in found:
        assert status == "WARN"  # loopback, and the ranks claim to be two nodes
        assert "all-gather of 2 ranks on 2 node(s)" in value
        assert "--link-gbps" in advice


def measured_fabric(rank, world_size):
    with mock.patch.dict(
        os.environ,
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE="1",
    ), mock.patch.object(environment_checks, "_FABRIC_BYTES", 1 << 16):  # fmt: skip
        found = environment_checks.fabric(60)
    return found.status, found.value, found.advice


def test_evaluations_on_gpus_need_nodes_of_their_own():
    ray = small_run(
        checkpoint=CheckpointConfig(evaluate_gpus=0.5), cluster=ClusterConfig(launcher="ray")
    )
    with pytest.raises(PipelineError, match=r"evaluate_gpus=0\.5 without .*evaluate_placement"):
        preflight._require_own_gpus(ray)
    placed = CheckpointConfig(evaluate_gpus=0.5, evaluate_placement={"role": "evaluation"})
    preflight._require_own_gpus(replace(ray, checkpoint=placed))
    for name in PRESETS:
        preflight._require_own_gpus(run_preset(name))


class Ray:
    """Notes what a task of `map_shards` is made with."""

    def __init__(self):
        self.settings = {}
        self.exceptions = mock.Mock()

    def remote(self, **settings):
        self.settings |= settings
        task = mock.Mock(**{"options.return_value.remote.side_effect": lambda item: item})
        return lambda function: task

    def wait(self, references, num_returns):
        return references[:1], references[1:]

    def get(self, reference):
        return reference


@pytest.mark.parametrize(("gpus", "calls"), [(0.0, 0), (0.5, 1), (1.0, 1)])
def test_a_task_on_a_gpu_ends_with_its_process(gpus, calls, monkeypatch):
    ray = Ray()
    monkeypatch.setattr(executor, "ray_session", lambda: contextlib.nullcontext(ray))
    found: list[object] = [*executor.map_shards(len, ["a", "b"], max_in_flight=1, num_gpus=gpus)]
    assert found == ["a", "b"]  # this Ray gives back what it was given
    assert ray.settings == {"max_calls": calls}


# -- evaluations ---------------------------------------------------------------------------------


def alive():
    gc.collect()
    return sum(issubclass(type(found), CertifiedNetwork) for found in gc.get_objects())


def test_a_process_holds_the_networks_of_one_artifact(monkeypatch):
    from model.networks.registry import build_network
    from tests.pipeline.small_runs import small_model

    def read(open_file, device):
        network = build_network(small_model())
        info = mock.Mock(digest="d", network=small_model())
        return mock.Mock(network=network, info=info, spec=["network", "info"])

    monkeypatch.setattr(certify_tasks, "read_artifact", read)
    certify_tasks.forget()
    before = alive()
    for number in range(3):
        task = certify_tasks.ArtifactTask(url=f"memory://{number}", digest="d", device="cpu")
        first = certify_tasks.load(task)
        for program in ("float32", "float64"):
            certify_tasks.in_program(task, program)
        assert certify_tasks.load(task) is first
        assert certify_tasks.in_program(task, "float64") is certify_tasks.in_program(
            task, "float64"
        )
        del first
        assert alive() - before == 2
    certify_tasks.forget()
    assert alive() == before


@pytest.mark.parametrize(
    "name",
    ["NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION"],
)
def test_what_changes_products_below_torch_is_refused_on_a_gpu(name, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert library_overrides() == []
    monkeypatch.setenv(name, "1")
    refused = pytest.raises(certify_tasks.EvaluationError, match=f"{name}=1")
    with refused, certify_tasks.exact_program("cuda"):
        pass
    with certify_tasks.exact_program("cpu"):
        pass
    found = environment_checks.overrides()
    assert found.status == "FAIL"
    assert f"{name}=1" in found.value
