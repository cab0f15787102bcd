"""Starts the ranks on Ray Train and carries their events to the driver."""

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from data_shards.storage.store import Store
from pipeline.config import ClusterConfig
from pipeline.errors import REFUSALS, PipelineError, ProcessDiedError, RunFailedError
from pipeline.launch.control_actor import PAUSE, STOP, ControlActor
from pipeline.launch.event_queue import EventQueue, EventSender
from pipeline.launch.ray_watch import RayServers, wait_for
from pipeline.planner.activation_checkpointing import decided
from pipeline.resilience.signals import (
    Flag,
    Interruption,
)
from pipeline.run.events import Emit, GroupFailed
from pipeline.run.layout import ray_folder
from pipeline.run.ray_session import ray_session
from pipeline.run.step_schedule import world_sizes
from pipeline.run.worker_spec import WorkerSpec
from pipeline.training.worker import run_rank

_POLL_S = 0.2
_ORDERS_S = 1.0
_ANSWER_S = 2.0
_DEAF_S = 15.0
"""After an order to stop: when no rank has asked for orders for so long, no rank is running."""
_SPARE_CPUS = 3
"""Logical CPUs of a local Ray beyond the workers: two evaluation tasks and the controller."""


@contextlib.contextmanager
def cluster_session(cluster: ClusterConfig) -> Iterator[None]:
    """Join the cluster of this Ray job (or of `cluster.address`), or start a local one.

    Raises:
        PipelineError: Ray is not installed, or the cluster cannot be reached.
        ExposureError: the cluster serves strangers.
    """
    cpus = cluster.workers * cluster.cpus_per_worker + _SPARE_CPUS
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(ray_session(cluster.address, num_cpus=cpus))
        except ImportError as error:
            raise PipelineError(
                "Ray is not installed here; install ray[default,train] or use --cluster.launcher "
                "local"
            ) from error
        except ConnectionError as error:
            raise PipelineError(str(error)) from error
        yield


_HEALTH_CHECK = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
_SILENT = 2
"""Multiple of `cluster.hang_timeout_s` after which Ray ends a rank that does not answer: later than
the ranks themselves, who can say more about it."""
_WORKER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # DeepSpeed on torch >= 2.12 warns once per parameter and step.
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


class _ControlPoller(Flag):
    """Worker side of the orders; preemption as Ray Train reports it."""

    def __init__(self, orders: Any) -> None:
        super().__init__()
        self._orders = orders
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def _standing(self) -> frozenset[str]:
        import ray

        standing: frozenset[str] = ray.get(self._orders.standing.remote())
        return standing

    def _listen(self) -> None:
        with contextlib.suppress(Exception):  # their keeper has gone: so will this worker
            while not self._standing():
                time.sleep(_ORDERS_S)
            self.raise_flag()

    def rest(self) -> None:
        """Having returned because of PAUSE, wait for the end; a rank that returns has finished."""
        from ray.train import get_context

        if PAUSE in self._standing():
            self._orders.pause.remote(get_context().get_world_rank())
            while STOP not in self._standing():
                time.sleep(_ORDERS_S)

    def preempted(self) -> bool:
        """See Interruption."""
        from ray.train import get_preemption_info

        return get_preemption_info() is not None


def _rank_entry(settings: dict[str, Any]) -> None:
    """Function that Ray Train runs on every rank."""
    listener = _ControlPoller(settings["orders"])
    run_rank(settings["job"], settings["emit"], listener, recomputing=decided)
    settings["emit"].wait()  # the driver fetches for the last time when the ranks have returned
    listener.rest()


@contextlib.contextmanager
def _pump(
    events: Any, handle: Emit, orders: Any, stop: Interruption, lost: threading.Event
) -> Iterator[None]:
    """Hand the events to `handle` on a thread, in order, to the last one.

    The same thread passes a request to stop on to the workers, and stops them if `handle` raises.

    Args:
        events: the actor that holds them.
        handle: gets them.
        orders: the actor that holds the orders.
        stop: of this process.
        lost: Ray answers no more; nothing is waited for.

    Raises:
        BaseException: what `handle` has raised.
    """
    import ray

    done = threading.Event()
    failures: list[BaseException] = []

    def drain() -> None:
        try:
            ordered = 0.0
            while True:
                final = done.is_set()
                if stop.stop_requested() and not ordered:
                    ordered = time.monotonic()
                    orders.give.remote(STOP)
                if ordered and not final and time.monotonic() > ordered + _DEAF_S:
                    _stop_if_no_rank_polls(orders, lost)
                for event in _answer(events.take.remote(), lost) or ():
                    handle(event)
                if final:
                    return
                done.wait(_POLL_S)
        except BaseException as error:
            failures.append(error)
            orders.give.remote(STOP)  # a run that nobody records any more must not go on

    thread = threading.Thread(target=drain, name="events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if not lost.is_set():
            ray.kill(events)
    if failures:
        raise failures[0]


def _answer(pending: Any, lost: threading.Event) -> Any:
    """What a call returns; None if Ray is lost before."""
    import ray

    while not lost.is_set():
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            return ray.get(pending, timeout=_ANSWER_S)
    return None


def _stop_if_no_rank_polls(orders: Any, lost: threading.Event) -> None:
    """End this process as a second SIGTERM would, if no rank is there that could hear of one.

    They may wait for a cluster that is full, or for a node that was lost.
    """
    if (_answer(orders.silence_s.remote(), lost) or 0.0) > _DEAF_S:
        os.kill(os.getpid(), signal.SIGTERM)


def fit(job: WorkerSpec, handle: Emit, stop: Interruption, servers: RayServers) -> None:
    """Train `job` on Ray Train workers; `handle` gets the events of rank 0 in this process.

    Once `stop` is requested the workers keep a checkpoint and return. `servers` are those of Ray,
    which somebody looks at meanwhile (`watched`).

    Raises:
        PipelineError: a rank refused its input; its message.
        ProcessDiedError: processes died more often than `cluster.max_failures`, or Ray is lost.
        RuntimeError: a rank failed otherwise; with its traceback.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside this process: on another node they would be lost with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here}
    events = ray.remote(EventQueue).options(**options).remote()
    orders = ray.remote(ControlActor).options(**options).remote()
    settings = {"job": job, "emit": EventSender(events), "orders": orders}
    with _pump(events, handle, orders, stop, servers.lost):
        while not _trained(job, settings, servers):
            if stop.stop_requested():
                return


def _trained(job: WorkerSpec, settings: dict[str, Any], servers: RayServers) -> bool:
    """Let a controller of Ray Train train the job; False if it has died and may be replaced.

    Raises:
        PipelineError, ProcessDiedError, RuntimeError: as `fit`.
    """
    import ray
    from ray.exceptions import RayActorError, RaySystemError
    from ray.train import TrainingFailedError

    from pipeline.launch.ray_failures import free, one_line

    run = Store(job.run_url)
    # Ray Train would silently continue from a folder of the same name, so each has its own.
    name = ray_folder(uuid.uuid4().hex[:8])
    trainer = _trainer(job, run, name, settings)
    try:
        wait_for(trainer.fit, servers)
        return True
    except TrainingFailedError as error:
        servers.require_after(error)
        raise _clear_error(error, job.config.cluster) from None
    except (RayActorError, RaySystemError) as error:  # nobody but the driver waits for it
        servers.require_after(error)
        orders, limit = settings["orders"], job.config.cluster.max_failures
        left = None if limit < 0 else limit - ray.get(orders.fail.remote())
        died = f"the controller of Ray Train has ended: {one_line(error)}"
        settings["emit"](GroupFailed(died, left))
        if left is not None and left < 0:
            raise ProcessDiedError(f"{died}; {_spent(job.config.cluster)}") from None
        free(ray.get(orders.room.remote()))
        return False
    finally:
        with contextlib.suppress(OSError):  # a few empty folders: they end no run
            run.remove(name, recursive=True)


def _trainer(job: WorkerSpec, run: Store, name: str, settings: dict[str, Any]) -> Any:
    """Ray's trainer for the ranks of a job, of fixed or elastic size."""
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from pipeline.launch.ray_elastic import RESIZE_S, START_TIMEOUT_S, DividingPolicy
    from pipeline.launch.ray_failures import BudgetedFailures, BudgetedTrainer, GroupKeeper
    from pipeline.launch.rendezvous import GroupConfig

    cluster = job.config.cluster
    sizes = world_sizes(cluster, job.config.train)
    elastic = len(sizes) > 1
    use_gpu = _use_gpu(cluster, sizes[0])
    filesystem, path = run.arrow()
    scaling = ScalingConfig(
        num_workers=(sizes[0], sizes[-1]) if elastic else cluster.workers,
        elastic_resize_monitor_interval_s=RESIZE_S,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        label_selector=cluster.placement or None,
    )
    budget = FailureConfig(
        max_failures=cluster.max_failures, max_preemption_failures=cluster.max_preemptions
    )
    trainer = BudgetedTrainer(
        _rank_entry,
        train_loop_config=settings,
        torch_config=GroupConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=cluster.collective_timeout_s
        ),
        scaling_config=scaling,
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=budget,
            worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    orders = settings["orders"]
    trainer.failures = BudgetedFailures(
        budget, lambda: int(ray.get(orders.fail.remote())), settings["emit"]
    )
    trainer.keeper = GroupKeeper(lambda room: orders.keep.remote(room))
    if cluster.hang_timeout_s:
        # Who stands still after the last step keeps no other rank waiting: only Ray can tell.
        os.environ[_HEALTH_CHECK] = str(_SILENT * cluster.hang_timeout_s)
    if elastic:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
        grace_s = cluster.collective_timeout_s
        trainer.scaling = DividingPolicy(scaling, sizes, orders, grace_s)
    return trainer


def _use_gpu(cluster: ClusterConfig, workers: int) -> bool:
    """True if every one of (at least) `workers` ranks can have a GPU of the cluster.

    Raises:
        PipelineError: GPUs were asked for and the cluster has too few; or too few CPUs.
    """
    import ray

    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    need = workers * cluster.cpus_per_worker
    if cpus < need:
        raise PipelineError(
            f"{workers} workers x cluster.cpus_per_worker={cluster.cpus_per_worker} need {need} "
            f"CPUs; the Ray cluster has {cpus:g}"
        )
    if cluster.device == "cuda" and gpus < workers:
        raise PipelineError(
            f"cluster.device=cuda: {workers} workers but the Ray cluster has {gpus:g} GPUs"
        )
    return cluster.device != "cpu" and gpus >= workers


def _clear_error(error: Any, cluster: ClusterConfig) -> Exception:
    """What ended the run: a rank's refusal, deaths in one line, or the whole story of a crash."""
    from pipeline.launch.ray_failures import DEATHS, STARTING, Failure, classify, describe

    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        for cause in (failure, failure.__cause__):
            if isinstance(cause, REFUSALS):
                kind = RunFailedError if isinstance(cause, RunFailedError) else PipelineError
                return kind(str(cause))
    failures = failures or [getattr(error, "controller_failure", error)]
    if all(isinstance(failure, DEATHS + STARTING) for failure in failures):
        if classify(error) is Failure.PREEMPTED:
            spent = f"no restart is left of cluster.max_preemptions={cluster.max_preemptions}"
        else:
            spent = _spent(cluster)
        return ProcessDiedError(f"{describe(error)}; {spent}")
    return RuntimeError(str(error))


def _spent(cluster: ClusterConfig) -> str:
    return f"no restart is left of cluster.max_failures={cluster.max_failures}"
