"""Ray: the only file of this room that imports it. Starts the workers and carries their events."""

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from data_shards.store import Store
from pipeline.config import ClusterConfig
from pipeline.errors import REFUSALS, PipelineError
from pipeline.events import Emit, Event
from pipeline.interruption import Flag, Interruption
from pipeline.worker import Job, run_rank

_POLL_S = 0.2
_ORDERS_S = 1.0
_SPARE_CPUS = 3
"""Logical CPUs of a local Ray beyond the workers: two evaluation tasks and the controller."""


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """Join the cluster of this Ray job (or of `cluster.address`), or start a local one.

    Raises:
        PipelineError: Ray is not installed, or the cluster cannot be reached.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        # A plain ray.init() writes a token into the home directory, which then changes the
        # authentication of every later cluster of this account. Here nobody else can connect.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning
    try:
        import ray
    except ImportError as error:
        raise PipelineError(
            "Ray is not installed here; install ray[default,train] or use --cluster.launcher local"
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        cpus = cluster.workers * cluster.cpus_per_worker + _SPARE_CPUS
        options.update(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
        )
    try:
        ray.init(**({"address": address} if address else {}), **options)
    except ConnectionError as error:
        raise PipelineError(f"no Ray cluster answers at {address!r}") from error
    try:
        yield
    finally:
        ray.shutdown()


_WORKER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # DeepSpeed on torch >= 2.12 warns once per parameter and step.
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


class _Post:
    """Worker side of the event queue; sending never waits."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __call__(self, event: Event) -> None:
        self._actor.put_nowait.remote(event)


class _Orders(Flag):
    """Worker side of the driver's orders; preemption as Ray Train reports it."""

    def __init__(self, orders: Any) -> None:
        super().__init__()
        threading.Thread(target=self._listen, args=(orders,), name="orders", daemon=True).start()

    def _listen(self, orders: Any) -> None:
        with contextlib.suppress(Exception):  # the queue has gone: so will this worker
            while not orders.qsize():
                time.sleep(_ORDERS_S)
            self.raise_flag()

    def preempted(self) -> bool:
        """See Interruption."""
        from ray.train import get_preemption_info

        return get_preemption_info() is not None


def _rank_entry(settings: dict[str, Any]) -> None:
    """Function that Ray Train runs on every rank."""
    run_rank(settings["job"], settings["emit"], _Orders(settings["orders"]))


@contextlib.contextmanager
def _pump(events: Any, handle: Emit, orders: Any, stop: Interruption) -> Iterator[None]:
    """Hand the events of the queue to `handle` on a thread, in order, to the last one.

    The same thread passes a request to stop on to the workers.
    """
    done = threading.Event()
    failures: list[BaseException] = []

    def drain() -> None:
        try:
            ordered = False
            while True:
                final = done.is_set()
                if stop.stop_requested() and not ordered:
                    ordered = True
                    orders.put_nowait("stop")
                for event in events.get_nowait_batch(events.qsize()):
                    handle(event)
                if final:
                    return
                done.wait(_POLL_S)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=drain, name="events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        events.shutdown(force=True)
        orders.shutdown(force=True)
    if failures:
        raise failures[0]


def fit(job: Job, handle: Emit, stop: Interruption) -> None:
    """Train `job` on Ray Train workers; `handle` gets the events of rank 0 in this process.

    Once `stop` is requested the workers keep a checkpoint and return.

    Raises:
        PipelineError: a rank refused its input; its message.
        RuntimeError: a rank failed otherwise; with its traceback.
    """
    from ray.train import (
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    cluster = job.config.cluster
    use_gpu = _use_gpu(cluster)
    events, orders = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
    resources = {"CPU": cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    run = Store(job.run_url)
    filesystem, path = run.arrow()
    # Ray Train would silently continue from a folder of the same name, so each has its own.
    name = f"ray-{uuid.uuid4().hex[:8]}"
    trainer = TorchTrainer(
        _rank_entry,
        train_loop_config={"job": job, "emit": _Post(events.actor), "orders": orders},
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=cluster.collective_timeout_s
        ),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            label_selector=cluster.placement or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    with _pump(events, handle, orders, stop):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _clear_error(error) from None
        finally:
            run.remove(name, recursive=True)


def _use_gpu(cluster: ClusterConfig) -> bool:
    """True if every rank can have a GPU of the cluster.

    Raises:
        PipelineError: GPUs were asked for and the cluster has too few; or too few CPUs.
    """
    import ray

    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    need = cluster.workers * cluster.cpus_per_worker
    if cpus < need:
        raise PipelineError(
            f"cluster.workers={cluster.workers} x cpus_per_worker={cluster.cpus_per_worker} need "
            f"{need} CPUs; the Ray cluster has {cpus:g}"
        )
    if cluster.device == "cuda" and gpus < cluster.workers:
        raise PipelineError(
            f"cluster.device=cuda: {cluster.workers} workers but the Ray cluster has {gpus:g} GPUs"
        )
    return cluster.device != "cpu" and gpus >= cluster.workers


def _clear_error(error: Exception) -> Exception:
    """The message of the rank that refused its input, or the whole story of a crash."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        for cause in (failure, failure.__cause__):
            if isinstance(cause, REFUSALS):
                return PipelineError(str(cause))
    return RuntimeError(str(error))
