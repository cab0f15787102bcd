"""The worker as it is, on two ranks: determinism, precisions, refusals, the artifact it keeps."""

import contextlib
import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch

from data_shards.format.shard_index import load_index
from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream
from model.artifact.artifact import read_artifact
from model.networks.registry import build_network
from optim.config import OptimConfig
from optim.manifolds import ORTHOGONAL, manifold_of
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from optim.zero3_adam import TENSOR_KINDS
from pipeline.config import CheckpointConfig, TrainConfig
from pipeline.losses import emma
from pipeline.losses.emma import emma_loss
from pipeline.run.events import CheckpointFailed, Metrics, Skipped
from pipeline.run.worker_spec import WorkerSpec
from pipeline.training.device_flops import DTYPES
from pipeline.training.zero3 import Zero3
from tests.harness import run_ranks
from tests.pipeline.small_runs import (
    observed_run,
    rank_world,
    same_bits,
    small_run,
    small_shards,
    whole_state,
)

pytestmark = pytest.mark.distributed

STEPS = 14
BATCH = 24
POISONED = 5
# The last step follows a Lookahead synchronisation (12) and a polar projection (10), not closely.
OPTIM = OptimConfig(lr=1e-2, eps=1e-5, lookahead_steps=6, polar_every=5)


def config(every_steps=0, **train):
    """14 steps, over two ends of an epoch of 136 samples."""
    epochs = (STEPS - 0.5) * BATCH / 136
    settings = {"global_batch": BATCH, "epochs": epochs, "warmup_epochs": 0, **train}
    return small_run(
        optim=OPTIM,
        train=TrainConfig(**settings),
        checkpoint=CheckpointConfig(every_steps=every_steps),
    )


def audited(every):
    return dataclasses.replace(
        config(), optim=dataclasses.replace(OPTIM, polar_every=0, audit_every=every)
    )


FORM = "bf16, X^T G"
CASES = {
    "plain": config(),
    "again": config(),
    "another seed": config(seed=1),
    "kept often": config(every_steps=3),
    "bf16": config(precision="bf16"),
    FORM: dataclasses.replace(
        config(precision="bf16"), optim=dataclasses.replace(OPTIM, gradient="trivialized")
    ),
    "fp16": config(precision="fp16"),
    "fp16 without the arithmetic": config(precision="fp16"),
    "fp16 scaled over the edge": config(precision="fp16", loss_scale=1e9, max_skipped=2),
    "poisoned": config(every_steps=1, max_skipped=0),
    "poisoned bf16": config(every_steps=1, precision="bf16", accumulation=2, max_skipped=0),
    "poisoned value": config(every_steps=1, max_skipped=0),
    "poisoned once": config(),
    # After a sound gradient the first Euclidean update exceeds the range of fp32.
    "absurd rate": dataclasses.replace(
        config(every_steps=1), optim=dataclasses.replace(OPTIM, euclidean_lr_factor=3.35e40)
    ),
    "artifacts cannot be written": config(every_steps=1),
    "audited": audited(2),
    "disturbed": audited(4),
    "singular": audited(4),
}


@contextlib.contextmanager
def fp16_arithmetic(present):
    """The answer of DeepSpeed's accelerator, whatever this machine has."""
    from deepspeed.accelerator import get_accelerator

    device = type(get_accelerator())
    with mock.patch.object(device, "is_fp16_supported", return_value=present):
        yield


@contextlib.contextmanager
def poisoned_loss(rank, call, *, gradient):
    """The loss is NaN at one call on rank 1; its gradient too, or the value alone."""
    calls = []

    def loss(*arguments):
        calls.append(None)
        value = emma_loss(*arguments)
        if rank != 1 or len(calls) != call:
            return value
        return value * math.nan if gradient else value + math.nan

    with mock.patch.object(emma, "emma_loss", loss):
        yield


@contextlib.contextmanager
def scaled_matrix(factor):
    """Before step 6 every rank's slice of one matrix and of its slow copy is scaled."""
    genuine = Zero3.step

    def step(engine, *arguments, **options):
        if engine.optimizer.scalar_state()["step"] == 5:
            for kind, partition, flat in engine.optimizer.partitioned_state():
                if kind in ("master", "slow") and partition.manifold is not None:
                    slot = partition.slots[1]
                    flat.data[slot.offset : slot.stop] *= factor
        return genuine(engine, *arguments, **options)

    with mock.patch.object(Zero3, "step", step):
        yield


def surroundings(name, rank):
    """What is bent while a case runs."""
    if name in ("disturbed", "singular"):
        return scaled_matrix(1.01 if name == "disturbed" else 0.0)
    if name.startswith("poisoned"):
        call = 2 * POISONED - 1 if "bf16" in name else POISONED
        return poisoned_loss(rank, call, gradient="value" not in name)
    if name.startswith("fp16"):
        return fp16_arithmetic("without" not in name)
    return contextlib.nullcontext()


def run_cases(rank, world_size, folder, shards):
    outcomes = {}
    with rank_world(rank, world_size):
        for name, case in CASES.items():
            if name == "artifacts cannot be written" and rank == 0:
                Store(f"{folder}/{name}").write("artifacts", b"a file where a folder is due")
            with surroundings(name, rank):
                outcomes[name] = observed_run(
                    WorkerSpec(case, f"{folder}/{name}", shards, {"run": name})
                )
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def shards(folder):
    return small_shards(folder / "shards")


@pytest.fixture(scope="module")
def outcomes(folder, shards):
    """By case, the outcomes of the two ranks, which share no order of a set, as on two machines."""
    ranks = run_ranks(run_cases, 2, str(folder), shards, timeout=200, fresh=True)
    return {name: [rank[name] for rank in ranks] for name in CASES}


def start(outcomes, name):
    return whole_state([rank.start for rank in outcomes[name]])


def end(outcomes, name):
    return whole_state([rank.end for rank in outcomes[name]])


def test_the_seed_decides_everything(outcomes):
    plain, again, other = (outcomes[name][0] for name in ("plain", "again", "another seed"))
    assert list(plain.losses) == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) for loss in plain.losses.values())
    assert plain.losses[STEPS] < 0.6 * plain.losses[1]
    assert again.losses == plain.losses
    assert same_bits(end(outcomes, "plain"), end(outcomes, "again"))
    assert again.kept[STEPS].digest == plain.kept[STEPS].digest
    assert not set(other.losses.values()) & set(plain.losses.values())
    assert not same_bits(start(outcomes, "plain"), start(outcomes, "another seed"))


@pytest.mark.parametrize(("name", "seed"), [("plain", 0), ("another seed", 1)])
def test_the_first_gradient_is_that_of_the_first_global_batch(outcomes, shards, name, seed):
    """Computed here in one piece, from the seed alone: initial values, order, mean over ranks."""
    case = CASES[name]
    network = build_network(case.model)
    network.initialise(seed)
    cursor = Cursor(seed=seed)
    with SampleStream(
        load_index(shards), case.data.stream, split="train", global_batch=BATCH, cursor=cursor
    ) as stream:
        batch = next(stream)
    logits, rates = network.logits_and_rates(batch.images / 255, batch.labels, case.loss.eps)
    emma_loss(logits, rates, batch.labels, case.loss.eps, case.loss.scale).backward()
    masters = start(outcomes, name)
    got = whole_state([rank.gradients for rank in outcomes[name]])
    for key, p in network.named_parameters():
        master, gradient = torch.from_numpy(masters[f"master/{key}"]), torch.from_numpy(got[key])
        torch.testing.assert_close(master, p.detach().flatten(), rtol=1e-6, atol=1e-7)
        difference = (gradient - p.grad.flatten()).norm() / p.grad.norm()
        assert difference < 1e-4, f"{key} differs by {difference:.1e} of its norm"


def test_only_rank_0_reports(outcomes):
    assert outcomes["plain"][1].events == []


def test_keeping_checkpoints_and_artifacts_changes_nothing(outcomes):
    plain, often = outcomes["plain"][0], outcomes["kept often"][0]
    assert list(plain.kept) == [STEPS]
    assert list(often.kept) == [3, 6, 9, 12, STEPS]
    assert often.losses == plain.losses
    assert same_bits(end(outcomes, "plain"), end(outcomes, "kept often"))
    assert often.kept[STEPS].digest == plain.kept[STEPS].digest
    assert len({kept.digest for kept in often.kept.values()}) == 5


@pytest.mark.parametrize(("case", "bits"), [("bf16", 8), (FORM, 8), ("fp16", 11)])
def test_sixteen_bit_training_follows_fp32(outcomes, case, bits):
    rounding = 2.0**-bits
    run, plain = outcomes[case][0], outcomes["plain"][0]
    assert run.error == ""
    # Masters start from the float64 values, not from the 16-bit weights.
    masters, expected = start(outcomes, case), start(outcomes, "plain")
    names = [key.removeprefix("master/") for key in masters if key.startswith("master/")]
    for name in names:
        assert masters[f"master/{name}"].dtype == np.float32
        assert masters[f"master/{name}"].tobytes() == expected[f"master/{name}"].tobytes()
    # The working weights are the masters, rounded, at every time.
    dtype = DTYPES[CASES[case].train.precision]
    for state in (masters, end(outcomes, case)):
        for name in names:
            rounded = torch.from_numpy(state[f"master/{name}"]).to(dtype).float()
            assert torch.equal(torch.from_numpy(state[f"working/{name}"]), rounded), name
    # fp32 masters stay on the manifold; those of 16 bits would be 2e-2 away.
    assert len(run.residuals) == 5
    assert max(run.residuals.values()) < 5e-6
    assert run.losses.keys() == plain.losses.keys()
    for step, loss in run.losses.items():
        assert abs(loss - plain.losses[step]) < 16 * rounding
    assert run.losses != plain.losses  # or 16 bits were not used at all


@pytest.mark.parametrize(("precision", "bits"), [("bf16", 8), ("fp16", 11)])
def test_the_optimizer_gets_the_gradient_of_fp32(outcomes, precision, bits):
    """So the loss scale of fp16 is divided out: it is 1024. Sums over the ranks are in fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for rank in (0, 1):
        expected = outcomes["plain"][rank].gradients
        got = outcomes[precision][rank].gradients
        assert got.keys() == expected.keys()
        assert len(got) == 11
        for name, gradient in got.items():
            assert gradient.dtype == np.float32
            error = np.linalg.norm(gradient - expected[name]) / np.linalg.norm(expected[name])
            # Some tensors' gradients are small differences of large terms.
            assert error < 32 * 2.0**-bits, name
        sums = torch.from_numpy(np.concatenate(list(got.values())))
        assert (sums.to(dtype).float() != sums).float().mean() > 0.2, "the sums have 16 bits"


def test_the_optimizer_gets_what_it_asks_for_of_each_matrix(outcomes):
    """X^T G of what blocks hold, from the bfloat16 copies of X; else G."""
    gradients = {n: whole_state([rank.gradients for rank in outcomes[n]]) for n in ("plain", FORM)}
    asked = 0
    for key, gradient in gradients["plain"].items():
        expected, found = torch.from_numpy(gradient), torch.from_numpy(gradients[FORM][key])
        if key.endswith((".R", ".M")):
            asked += 1
            X = torch.from_numpy(start(outcomes, "plain")[f"master/{key}"])
            X, G = (tensor.view(CASES[FORM].model.width, -1) for tensor in (X, expected))
            expected = (X.mT @ G).flatten()
        error = (found - expected).norm() / expected.norm()
        assert error < 32 * 2.0**-8, key
    assert asked == 4


def test_fp16_needs_fp16_arithmetic(outcomes):
    for rank in outcomes["fp16 without the arithmetic"]:
        assert "train.precision=fp16" in rank.error
        assert "no fp16 arithmetic; use bf16 or fp32" in rank.error
        assert rank.events == []


@pytest.mark.parametrize(
    ("name", "step"),
    [("poisoned", POISONED), ("poisoned bf16", POISONED), ("poisoned value", POISONED)],
)
def test_what_is_not_finite_stops_all_ranks_before_the_update(outcomes, name, step):
    for rank in outcomes[name]:
        assert "a loss or gradient is not finite on at least one rank" in rank.error
        assert f"step {step}:" in rank.error
        assert same_bits(rank.before, rank.end)
        assert rank.end["scalar/step"] == step - 1
    first = outcomes[name][0]
    assert list(first.losses) == list(range(1, step))
    assert list(first.kept) == list(range(1, step))


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_counted(outcomes):
    first, second = outcomes["poisoned once"]
    plain = outcomes["plain"][0]
    assert not first.error + second.error
    assert [e.step for e in first.events if isinstance(e, Skipped)] == [POISONED]
    assert first.losses.keys() == plain.losses.keys() - {POISONED}
    before = range(1, POISONED)
    assert [first.losses[s] for s in before] == [plain.losses[s] for s in before]
    assert first.end["scalar/step"] == STEPS - 1
    skipped = {e.step: e.values["train/skipped"] for e in first.events if isinstance(e, Metrics)}
    assert skipped == {step: float(step >= POISONED) for step in range(1, STEPS + 1)}


def test_too_many_skipped_steps_in_a_row_stop_the_run(outcomes):
    for rank in outcomes["fp16 scaled over the edge"]:
        assert "step 3: a loss or gradient is not finite" in rank.error
        assert "the 3. time in a row (train.max_skipped=2)" in rank.error
        assert same_bits(rank.start, rank.end)
    first = outcomes["fp16 scaled over the edge"][0]
    assert [e.step for e in first.events if isinstance(e, Skipped)] == [1, 2]
    assert not first.losses
    assert not first.kept


def test_weights_that_are_not_finite_are_never_kept(outcomes, folder):
    """Only rank 0 sees them; all stop, and a restart would do the step again."""
    for rank in outcomes["absurd rate"]:
        assert "rank 0: tensor" in rank.error
        assert "not finite" in rank.error
        assert rank.end["scalar/step"] == 1
    assert not outcomes["absurd rate"][0].kept
    assert not (folder / "absurd rate/checkpoints").exists()


def test_training_goes_on_when_nothing_can_be_kept(outcomes, folder):
    """A full disk: each attempt is reported, the run fails at its end, no bit differs."""
    name = "artifacts cannot be written"
    first, second = outcomes[name]
    assert [e.step for e in first.events if isinstance(e, CheckpointFailed)] == list(
        range(1, STEPS + 1)
    )
    assert first.losses == outcomes["plain"][0].losses
    for rank in (first, second):
        assert f"rank 0: step {STEPS} is not kept" in rank.error
        assert "artifacts" in rank.error
    assert not list((folder / name).glob("checkpoints/*/*/commit.json"))


def orthogonality(outcome):
    """By step: residual_max, reprojections."""
    return {
        event.step: tuple(
            event.values[f"orthogonality/{name}"] for name in ("residual_max", "reprojections")
        )
        for event in outcome.events
        if isinstance(event, Metrics) and "orthogonality/residual_max" in event.values
    }


def test_orthogonality_is_recorded_at_its_interval(outcomes):
    calm = orthogonality(outcomes["audited"][0])
    assert list(calm) == [2, 4, 6, 8, 10, 12, 14]
    assert all(residual < 1e-4 and count == 0 for residual, count in calm.values())
    assert orthogonality(outcomes["plain"][0]) == {}


def test_a_disturbed_matrix_is_found_repaired_and_counted(outcomes):
    """X becomes 1.01 X, so the residual 0.0201 sqrt(20)."""
    found = orthogonality(outcomes["disturbed"][0])
    assert [count for _, count in found.values()] == [0, 1, 1]
    assert found[8][0] == pytest.approx(0.0201 * math.sqrt(20), rel=1e-3)
    assert found[12][0] < 1e-4
    for rank in outcomes["disturbed"]:
        assert rank.error == ""
        assert rank.end["scalar/reprojections"] == 1
        assert max(rank.residuals.values()) < 1e-4


def test_a_singular_matrix_stops_all_ranks_by_name(outcomes):
    for rank in outcomes["singular"]:
        assert rank.error.startswith("step 8: parameter 'blocks.")
        assert "does not converge: residual ||X^T X - I||_F 4.47 at the start" in rank.error
    assert list(outcomes["singular"][0].losses) == [1, 2, 3, 4, 5, 6, 7]


def reference_network(state):
    """The averaged network of the plain definition, from the state of the ranks, in float64."""
    network = build_network(CASES["plain"].model)
    named = dict(network.named_parameters())
    optimizer = ReferenceManifoldAdam(parameter_groups(named.items(), OPTIM), OPTIM)
    averaged = {}
    for name, p in named.items():
        with torch.no_grad():
            p.copy_(torch.from_numpy(state[f"master/{name}"]).view_as(p))
        for kind in TENSOR_KINDS:
            if f"{kind}/{name}" in state:
                value = torch.from_numpy(state[f"{kind}/{name}"]).view_as(p)
                optimizer.state[p][kind] = value
        averaged[name] = optimizer.averaged(p)
    network.double()
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(averaged[name])
    return network


def test_the_artifact_is_the_reference_average(outcomes):
    kept = outcomes["plain"][0].kept[STEPS]
    state = end(outcomes, "plain")
    expected = reference_network(state)
    artifact = read_artifact(Store(kept.artifact_url).open)
    assert artifact.info.digest == kept.digest
    assert artifact.info.context == {"run": "plain", "step": STEPS}
    assert artifact.info.class_names == tuple("0123456789")
    stored = {name: p.detach() for name, p in artifact.network.named_parameters()}
    matrices = 0
    for name, p in expected.named_parameters():
        # Half a unit in the last place of float32, and the round-off of float64.
        torch.testing.assert_close(
            stored[name].double(), p, rtol=2.0**-24, atol=1e-12, msg=f"{name} differs"
        )
        master = torch.from_numpy(state[f"master/{name}"]).view_as(p)
        assert (stored[name] - master).abs().max() > 1e-4, f"{name} is the master"
        if manifold_of(p) is not None:
            matrices += 1
            # Rounding changes X by at most 2^-24 |X|, so X^T X by 2^-23 sqrt(n).
            residual = ORTHOGONAL.residual(stored[name])
            assert residual <= 2.0**-23 * math.sqrt(p.shape[0])
            assert artifact.info.orthogonality_residuals[name] == residual
    assert matrices == 5
    assert kept.residual == max(artifact.info.orthogonality_residuals.values())
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits, factors = artifact.network.logits_and_margin_factors(images)
    true_logits, true_factors = expected.logits_and_margin_factors(images.double())
    torch.testing.assert_close(logits.double(), true_logits, rtol=0, atol=5e-6)
    torch.testing.assert_close(factors.double(), true_factors, rtol=0, atol=5e-6)


def test_cases_are_what_they_say():
    assert CASES["plain"] == CASES["again"]
    assert dataclasses.replace(CASES["plain"], train=CASES["bf16"].train) == CASES["bf16"]
