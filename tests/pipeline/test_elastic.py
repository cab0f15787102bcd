"""Which numbers of ranks a run may have, and that healthy ranks are paused before a resize."""

from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig

from pipeline.config import ClusterConfig, TrainConfig
from pipeline.errors import PipelineError
from pipeline.launch import ray_elastic
from pipeline.launch.control_actor import PAUSE, STOP, ControlActor
from pipeline.launch.ray_elastic import DividingPolicy
from pipeline.run.step_schedule import world_sizes

GRACE_S = 100.0


def run(workers, least, batch=64, accumulation=1):
    return (
        ClusterConfig(workers=workers, min_workers=least),
        TrainConfig(global_batch=batch, accumulation=accumulation),
    )


def test_sizes_divide_the_batch():
    assert world_sizes(*run(8, 0)) == (8,)
    assert world_sizes(*run(8, 2)) == (2, 4, 8)
    assert world_sizes(*run(6, 2, batch=36, accumulation=2)) == (2, 3, 6)


@pytest.mark.parametrize(
    ("workers", "least", "message"),
    [
        (8, 3, r"cluster.min_workers=3: .*=64 .* divisible by 4, 8 of 3 to 8 ranks"),
        (7, 2, r"cluster.workers=7: .* divisible by 2, 4 of 2 to 7 ranks"),
        (2, 4, r"cluster.min_workers=4 exceeds cluster.workers=2"),
    ],
)
def test_a_size_that_does_not_is_refused(workers, least, message):
    with pytest.raises(PipelineError, match=message):
        world_sizes(*run(workers, least))


class Actor:
    """Calls the methods of an object as Ray calls those of an actor."""

    def __init__(self, target):
        self._target = target

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._target, name))


@pytest.fixture
def policy(monkeypatch):
    """A policy for 2, 4 or 8 ranks, and what the cluster has: nodes with CPUs, seconds."""
    room, clock = {}, SimpleNamespace(now=0.0)
    monkeypatch.setattr(ray_elastic.ray, "get", lambda value: value)
    monkeypatch.setattr(ray_elastic, "time", SimpleNamespace(monotonic=lambda: clock.now))
    orders = ControlActor()
    scaling = ScalingConfig(num_workers=(2, 8), elastic_resize_monitor_interval_s=0)
    made = DividingPolicy(scaling, (2, 4, 8), Actor(orders), GRACE_S)
    monkeypatch.setattr(made, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(made, "_get_reserved_resources", lambda: room)
    return SimpleNamespace(policy=made, orders=orders, room=room, clock=clock)


def running(case, ranks):
    state = SimpleNamespace(start_time=0.0, num_workers=ranks)
    decision = case.policy.make_decision_for_running_worker_group(state, None)
    return getattr(decision, "num_workers", None)


def test_a_group_gets_the_largest_size_that_divides(policy):
    for cpus, ranks in (([7.0], 4), ([5.0, 3.0], 8), ([1.0], None), ([20.0], 8)):
        policy.room.clear()
        policy.room.update({str(i): {"CPU": cpu} for i, cpu in enumerate(cpus)})
        decision = policy.policy.make_decision_for_non_running_worker_group()
        assert getattr(decision, "num_workers", None) == ranks


def test_ranks_are_paused_before_a_resize_and_not_for_nothing(policy):
    policy.room["a"] = {"CPU": 5.0}
    assert running(policy, 4) is None, "five ranks do not divide the batch"
    assert policy.orders.standing() == frozenset()
    policy.room["b"] = {"CPU": 4.0}
    assert running(policy, 4) is None
    assert policy.orders.standing() == {PAUSE}
    for rank in range(4):
        assert running(policy, 4) is None
        policy.orders.pause(rank)
    assert running(policy, 4) == 8
    assert policy.orders.standing() == frozenset(), "the new ranks are not paused"


def test_ranks_that_do_not_pause_in_time_are_resized_all_the_same(policy):
    policy.room["a"] = {"CPU": 8.0}
    assert running(policy, 4) is None
    policy.clock.now = GRACE_S + 1
    assert running(policy, 4) == 8


def test_a_pause_ends_with_its_ranks(policy):
    policy.room["a"] = {"CPU": 8.0}
    assert running(policy, 4) is None
    policy.orders.give(STOP)
    decision = policy.policy.make_decision_for_non_running_worker_group()
    assert decision.num_workers == 8
    assert policy.orders.standing() == {STOP}
    assert policy.orders.paused() == 0
