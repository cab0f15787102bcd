import pytest
import torch

from optim.collectives import Exchange, LocalExchange
from optim.config import OptimConfig
from optim.errors import OptimizerError
from optim.manifolds import ORTHOGONAL
from optim.param_groups import parameter_groups
from optim.zero3_adam import ShardedManifoldAdam
from optim.zero_layout import FlatPartition
from tests.harness import run_ranks
from tests.optim.cases import PROBLEMS, check_everything
from tests.optim.emulation import Emulation, Problem, cut_slots, gradient


@pytest.fixture(scope="module")
def local_digests():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield check_everything(0, 1)
    torch.set_num_threads(threads)


def test_one_process_equals_reference(local_digests):
    assert set(local_digests) == {*PROBLEMS, "repaired"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world_size",
    [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)],
)
def test_ranks_equal_reference_and_one_process(world_size, local_digests):
    digests = run_ranks(check_everything, world_size)
    assert digests[0] == local_digests


class Declared(Exchange):
    """An exchange that only says how many ranks there are, for checks before any collective."""

    def _all_to_all(self, buffer, send, recv, out):
        raise NotImplementedError


def bound(world_size=2, *, expected=("matrix0", "matrix1"), cut=None, flat=None):
    named = Problem((4, 6)).parameters()
    config = OptimConfig()
    optimizer = ShardedManifoldAdam(parameter_groups(named.items(), config), config)
    matrices = {name: named[name] for name in ("matrix0", "matrix1")}
    slots = cut_slots(matrices, cut or world_size)
    flat = torch.zeros(slots[-1].stop) if flat is None else flat
    partition = FlatPartition(flat, slots, ORTHOGONAL, lambda: None)
    optimizer.bind([partition], Declared(0, world_size), expected_matrices=list(expected))
    return optimizer


def test_bind_counts_partitioned_matrices():
    assert bound(2).partitioned_matrices == 2
    assert bound(1).partitioned_matrices == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expected": ("matrix0", "matrix1", "matrix9")}, "missing: matrix9"),
        ({"expected": ("matrix0",)}, "unexpected: matrix1"),
        ({"cut": 1}, r"'matrix0' of 16 elements is not partitioned over 2 ranks"),
        ({"flat": torch.zeros(26, dtype=torch.bfloat16)}, r"is torch\.bfloat16, needs float32"),
        ({"flat": torch.zeros(27)}, "cover 26 elements of a flat of 27"),
        ({"flat": torch.zeros(2, 13)}, "not a contiguous 1-D tensor"),
    ],
)
def test_bind_refuses(arguments, message):
    with pytest.raises(OptimizerError, match=message):
        bound(**arguments)


def test_bind_refuses_a_matrix_claimed_twice():
    named = Problem((4,)).parameters()
    config = OptimConfig()
    optimizer = ShardedManifoldAdam(parameter_groups(named.items(), config), config)
    slots = cut_slots({"matrix0": named["matrix0"]}, 1)
    twice = [FlatPartition(torch.zeros(16), slots, ORTHOGONAL, lambda: None) for _ in range(2)]
    with pytest.raises(OptimizerError, match="claimed twice: matrix0"):
        optimizer.bind(twice, LocalExchange(), expected_matrices=["matrix0"])


def test_step_refuses_what_it_does_not_know():
    named = Problem((4,)).parameters()
    config = OptimConfig()
    optimizer = ShardedManifoldAdam(parameter_groups(named.items(), config), config)
    with pytest.raises(OptimizerError, match=r"bind\(\) was not told of"):
        optimizer.step()
    with pytest.raises(OptimizerError, match=r"call bind\(\) first"):
        list(optimizer.residuals())


def test_step_refuses_a_missing_gradient():
    emulation = Emulation(Problem((4,)), LocalExchange())
    emulation.optimizer.param_groups[0]["params"] = [emulation.partitions[0].flat]
    with pytest.raises(OptimizerError, match=r"no gradient for the partition of .*matrix0"):
        emulation.optimizer.step()


def test_all_partitions_in_the_groups_at_once_give_the_same():
    problem = Problem((6, 5), matrices_per_group=1)
    one_by_one, at_once = (Emulation(problem, LocalExchange()) for _ in range(2))
    one_by_one.run(last=1)
    for group in at_once.optimizer.param_groups:
        group["params"] = [
            p.flat
            for p in at_once.partitions
            if (p.manifold is None) == (group["manifold"] is None)
        ]
    for a, b in zip(one_by_one.partitions, at_once.partitions, strict=True):
        b.flat.grad = torch.cat([gradient_of(slot) for slot in a.slots])
    at_once.optimizer.step()
    for a, b in zip(one_by_one.partitions, at_once.partitions, strict=True):
        assert torch.equal(a.flat, b.flat)


def gradient_of(slot):
    return gradient(slot.name, 0, slot.shape, torch.float64).reshape(-1)


def test_manifold_flag_comes_from_bind_not_from_the_groups():
    """DeepSpeed's universal loader copies group 0 into all groups."""
    problem = Problem((6, 5))
    sound, mangled = (Emulation(problem, LocalExchange()) for _ in range(2))
    for emulation in (sound, mangled):
        emulation.run(last=1)
    for group in mangled.optimizer.param_groups:
        group["manifold"] = None
    for partition, other in zip(mangled.partitions, sound.partitions, strict=True):
        for emulation, part in ((mangled, partition), (sound, other)):
            part.flat.grad = torch.ones_like(part.flat)
            group = emulation.optimizer.param_groups[0]
            group["params"] = [part.flat]
            emulation.optimizer.step()
            group["params"] = []
        assert torch.equal(partition.flat, other.flat)


def test_initialise_starts_the_state_anew():
    emulation = Emulation(Problem((4, 5)), LocalExchange())
    emulation.run(last=3)
    emulation.optimizer.initialise(lambda slot: torch.ones(slot.shape, dtype=torch.float64))
    assert emulation.optimizer.scalar_state() == {"step": 0, "mu_product": 1.0, "reprojections": 0}
    for kind, _, tensor in emulation.optimizer.partitioned_state():
        assert (tensor == (1.0 if kind in ("master", "slow") else 0.0)).all(), kind


def test_scalar_state_refuses_disagreeing_partitions_and_missing_values():
    emulation = Emulation(Problem((4,)), LocalExchange())
    optimizer = emulation.optimizer
    assert optimizer.scalar_state() == {"step": 0, "mu_product": 1.0, "reprojections": 0}
    with pytest.raises(OptimizerError, match="lacks 'mu_product'"):
        optimizer.load_scalar_state({"step": 3})
    optimizer.load_scalar_state({"step": 3, "mu_product": 0.5})
    optimizer.state[emulation.partitions[1].flat]["step"] = 4
    with pytest.raises(OptimizerError, match="disagree in step: 3 and 4"):
        optimizer.scalar_state()
