"""Which death is charged to which budget, and what is left of Ray when its servers die."""

import signal
import socket
import threading
from unittest import mock

import pytest
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError, ProcessDiedError, RunFailedError
from pipeline.launch import ray_launcher, ray_watch
from pipeline.launch.control_actor import ControlActor
from pipeline.launch.ray_failures import (
    BudgetedFailures,
    Failure,
    GroupKeeper,
    classify,
    describe,
)
from pipeline.launch.ray_launcher import _clear_error
from pipeline.launch.ray_watch import RayServers, wait_for
from pipeline.resilience.oom import TooLargeError


def dead(preempted=False):
    return RayActorError(error_msg="The actor died unexpectedly.", preempted=preempted)


def task_error():
    return RayTaskError("create_group", "Traceback:\nRuntimeError: connection closed", "cause")


def died_in_start(cause):
    error = WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize.")
    error.__cause__ = cause
    return ControllerError(error)


CASES = {
    "training": (WorkerGroupError("", {0: dead()}), Failure.TRAINING),
    "in the start": (died_in_start(dead()), Failure.STARTING),
    "a moment later": (ControllerError(dead()), Failure.STARTING),
    "a peer of the dead": (ControllerError(task_error()), Failure.STARTING),
    "spot in training": (
        WorkerGroupError("", {0: dead(), 1: WorkerHealthCheckFailedError("", dead(True))}),
        Failure.PREEMPTED,
    ),
    "spot in the start": (died_in_start(dead(True)), Failure.PREEMPTED),
    "no room": (ControllerError(WorkerGroupStartupTimeoutError(2)), Failure.ROOM),
    "never room": (ControllerError(InsufficientClusterResourcesError("x")), Failure.FATAL),
}


@pytest.mark.parametrize("case", CASES)
def test_what_ray_reports_is_told_apart(case):
    error, failure = CASES[case]
    assert classify(error) is failure


def policy(told, failures=2, preemptions=1):
    counter = ControlActor()
    config = FailureConfig(max_failures=failures, max_preemption_failures=preemptions)
    return BudgetedFailures(config, counter.fail, told.append)


def test_deaths_in_the_start_and_in_training_share_a_budget():
    told = []
    decide = policy(told).make_decision
    order = ["in the start", "training", "a peer of the dead"]
    decisions = [decide(CASES[case][0]) for case in order]
    assert decisions == [FailureDecision.RETRY] * 2 + [FailureDecision.RAISE]
    assert [event.restarts_left for event in told] == [1, 0, -1]
    assert told[2].error == "the ranks could not all be started: RuntimeError: connection closed"


def test_of_the_dead_and_those_that_they_took_along_the_dead_are_named():
    crash = RuntimeError("Connection closed by peer\nmore")
    told = describe(WorkerGroupError("", {0: crash}))
    assert told == "rank 0: RuntimeError: Connection closed by peer"
    told = describe(WorkerGroupError("", {0: crash, 1: dead()}))
    assert told == "rank 1: The actor died unexpectedly."


def test_room_is_waited_for_and_nodes_that_are_taken_have_their_own_budget():
    told = []
    decide = policy(told, failures=0).make_decision
    for _ in range(3):
        assert decide(CASES["no room"][0]) is FailureDecision.RETRY
    assert not told
    assert decide(CASES["spot in the start"][0]) is FailureDecision.RETRY
    assert decide(CASES["spot in training"][0]) is FailureDecision.RAISE
    assert policy(told, failures=-1).make_decision(CASES["training"][0]) is FailureDecision.RETRY
    assert [event.restarts_left for event in told] == [0, -1, None]


def test_a_cluster_that_can_never_have_room_ends_at_once():
    told = []
    assert policy(told, -1).make_decision(CASES["never room"][0]) is FailureDecision.RAISE


def test_lack_of_memory_is_charged_and_not_told_for_it_is_given_back():
    told = []
    decide = policy(told, 1).make_decision
    assert decide(WorkerGroupError("", {1: TooLargeError("half")})) is FailureDecision.RETRY
    assert not told


def test_what_is_left_of_a_group_that_half_started_gives_its_room_back():
    kept, group = [], mock.Mock()
    keeper = GroupKeeper(kept.append)
    keeper.after_worker_group_start(group)
    state = group.get_worker_group_state()
    assert kept == [state.placement_group_handle.placement_group]
    keeper.before_worker_group_start(mock.Mock())  # it was never shut down
    state.shutdown.assert_called_once_with()
    keeper.after_worker_group_start(group)
    keeper.after_worker_group_shutdown(mock.Mock())
    keeper.before_worker_group_start(mock.Mock())
    state.shutdown.assert_called_once_with()


def test_how_a_run_ended_is_said_in_one_line():
    cluster = ClusterConfig(max_failures=2)
    found = _clear_error(CASES["training"][0], cluster)
    assert isinstance(found, ProcessDiedError)
    assert str(found).splitlines() == [
        "rank 0: The actor died unexpectedly.; no restart is left of cluster.max_failures=2"
    ]
    assert isinstance(_clear_error(CASES["in the start"][0], cluster), ProcessDiedError)
    taken = str(_clear_error(CASES["spot in training"][0], cluster))
    assert "cluster.max_preemptions=-1" in taken
    for error in (PipelineError("no"), RunFailedError("no")):
        found = _clear_error(WorkerGroupError("", {1: error}), cluster)
        assert (type(found), str(found)) == (type(error), "no")
    crash = _clear_error(WorkerGroupError("whole story", {1: KeyError("x")}), cluster)
    assert not isinstance(crash, ProcessDiedError)
    assert "whole story" in str(crash)


@pytest.fixture
def servers(tmp_path):
    """Two that listen, as a raylet and a GCS do; closing one is its death."""
    with socket.socket(socket.AF_UNIX) as raylet, socket.socket() as gcs:
        raylet.bind(str(tmp_path / "raylet"))
        gcs.bind(("127.0.0.1", 0))
        for one in (raylet, gcs):
            one.listen()
        address = f"127.0.0.1:{gcs.getsockname()[1]}"
        yield RayServers(str(tmp_path / "raylet"), address), {"raylet": raylet, "GCS": gcs}


@pytest.mark.parametrize("name", ["raylet", "GCS"])
def test_a_call_is_not_waited_for_when_a_server_has_died(servers, name, monkeypatch):
    """And what else waits for Ray ends with the process, when the failure has been recorded."""
    monkeypatch.setattr(ray_watch, "_PAUSE_S", 0.05)
    monkeypatch.setattr(ray_watch, "_SILENT_S", dict.fromkeys(ray_watch._SILENT_S, 0.2))
    found, sockets = servers
    monkeypatch.setattr(RayServers, "of_this_process", lambda: found)
    never, order, ended = threading.Event(), [], threading.Event()

    def end(why):
        order.append(why)
        ended.set()
        never.wait(60)  # as a process that has ended

    monkeypatch.setattr(ray_watch, "_end", end)
    with ray_watch.watched(end_s=0.1):
        found.on_loss = lambda: order.append("recorded")
        threading.Timer(0.1, sockets[name].close).start()
        with pytest.raises(ProcessDiedError, match=f"{name}.* has died"):
            wait_for(lambda: never.wait(60), found)
        assert ended.wait(60)
    assert order[0] == "recorded"
    assert "has died" in order[1]
    never.set()


def test_a_call_ends_as_it_ends(servers):
    wait_for(lambda: None, servers[0])
    with pytest.raises(KeyError):
        wait_for(lambda: {}["x"], servers[0])


class Controllers:
    """Ray Train's controllers: each ends as the next item says."""

    def __init__(self, monkeypatch, ends):
        self.ends, self.freed, self.orders = list(ends), [], ControlActor()
        monkeypatch.setattr(ray_launcher, "_trainer", lambda *_: mock.Mock(fit=self.fit))
        monkeypatch.setattr("ray.get", lambda answer: answer)
        monkeypatch.setattr("ray.util.remove_placement_group", self.freed.append)
        remote = {name: mock.Mock(remote=getattr(self.orders, name)) for name in ("fail", "room")}
        self.told = []
        self.settings = {"orders": mock.Mock(**remote), "emit": self.told.append}

    def fit(self):
        end = self.ends.pop(0)
        if end is not None:
            raise end


def test_a_controller_that_dies_is_replaced_within_the_budget(servers, monkeypatch, tmp_path):
    monkeypatch.setattr(ray_watch, "_PAUSE_S", 0.0)
    cluster = ClusterConfig(max_failures=1)
    job = mock.Mock(run_url=str(tmp_path), config=mock.Mock(cluster=cluster))
    controllers = Controllers(monkeypatch, [ActorDiedError(), None])
    controllers.orders.keep("a placement group")
    trained = [ray_launcher._trained(job, controllers.settings, servers[0]) for _ in range(2)]
    assert trained == [False, True]
    assert controllers.freed == ["a placement group"]
    controllers.ends = [ActorDiedError()]
    with pytest.raises(ProcessDiedError, match=r"controller.*\n?.*cluster.max_failures=1"):
        ray_launcher._trained(job, controllers.settings, servers[0])
    assert [event.restarts_left for event in controllers.told] == [0, -1]
    controllers.ends = [ActorDiedError()]
    servers[1]["raylet"].close()
    monkeypatch.setattr(ray_watch, "_PAUSE_S", 0.3)
    with pytest.raises(ProcessDiedError, match="raylet of this machine has died"):
        ray_launcher._trained(job, controllers.settings, servers[0])


def test_signals_of_rays_own_handlers_have_the_status_of_a_shell():
    from pipeline.pretrain import _signal_status

    found = [_signal_status(code) for code in (15, 143, 130, 0, None, "text", 1)]
    assert found == [143, 143, 130, 130, 130, 130, 130]
    assert signal.SIGTERM.value == 15
