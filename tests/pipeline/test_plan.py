"""The planner: its figures against a real run, and what it refuses."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.plan import PUBLISHED
from benchmarks.plan import planned as planned_row
from model.networks.lipnext.config import LipNeXtConfig
from optim.config import OptimConfig
from pipeline.config import ClusterConfig, TrainConfig, ZeroConfig
from pipeline.errors import PipelineError
from pipeline.plan import main, parse, sweep, swept
from pipeline.planner import estimate as estimation
from pipeline.planner import memory as budget
from pipeline.planner.calibration import Measured
from pipeline.planner.estimate import estimate, memory, setting_of, weights_of
from pipeline.planner.meta_pass import LiveBytes, run_meta_pass, training_flops
from pipeline.planner.step_time import StepTime, device_of
from pipeline.training.schedules import StepContext
from tests.harness import run_ranks
from tests.pipeline.small_runs import rank_world, small_run

pytestmark = pytest.mark.integration

STEPS = 3  # not right after a synchronisation, where exports have less to do
MICRO = 8
BILLION = ("imagenet-L32W4096", "--optim.retraction", "fast", "--optim.gradient", "trivialized")


@pytest.fixture(scope="module", autouse=True)
def one_pass_of_each():
    """The same pass does not run again for another number of devices: it takes a second."""
    known = {}

    def run_once(config, *, micro_batch):
        asked = config.to_json(), micro_batch
        if asked not in known:
            known[asked] = run_meta_pass(config, micro_batch=micro_batch)
        return known[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimation, "run_meta_pass", run_once)
        yield


def planned_run(world_size, persist_below=0, **train):
    """0.9 MB per tensor and rank: everything else is small beside the matrices."""
    return small_run(
        model=LipNeXtConfig(input_shape=(1, 8, 8), num_classes=10, patch=1, width=256, depth=3),
        optim=OptimConfig(lookahead_steps=2, polar_every=1, audit_every=0),
        train=TrainConfig(global_batch=MICRO * world_size, epochs=1, warmup_epochs=0, **train),
        zero=ZeroConfig(reduce_bucket_size=4 * 256**2),
        cluster=ClusterConfig(launcher="local", device="cpu", persist_below=persist_below),
    )


class Observed(LiveBytes):
    """Also counts what collectives move: bytes of whole tensors, by operator."""

    def __init__(self):
        super().__init__()
        self.moved = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and "_base_" in name:
            whole = max(a.nbytes for a in args[:2] if isinstance(a, torch.Tensor))
            self.moved[name] = self.moved.get(name, 0) + whole
        return super().__torch_dispatch__(func, types, args, kwargs)


def observe(rank, world_size, train):
    """Bytes of one rank: always, and beyond that in each phase; what it sent in one step."""
    from pipeline.training.worker import build_engine

    config = planned_run(world_size, **train)
    peaks = {"forward and backward": 0, "optimizer step": 0}
    with rank_world(rank, world_size) as world, Observed() as held:
        engine = build_engine(config, world=world, micro_batch=MICRO)
        engine.initialise(0)
        optimizer: Any = engine.optimizer
        step = optimizer.step

        def observed_step():
            gc.collect()  # what refers to itself is freed at any time, which no plan knows
            peaks["forward and backward"] = max(peaks["forward and backward"], held.peak)
            held.peak = held.live
            step()
            peaks["optimizer step"] = max(peaks["optimizer step"], held.peak)
            held.peak = held.live

        optimizer.step = observed_step
        for number in range(STEPS):
            gc.collect()
            held.peak = held.live
            held.moved, engine.optimizer.exchange.bytes_sent = {}, 0
            images = torch.zeros(1, MICRO, 1, 8, 8, dtype=torch.uint8)
            labels = torch.zeros(1, MICRO, dtype=torch.int64)
            engine.step(zip(images, labels, strict=True), StepContext(number, 0.1, 1.0, 0.1))
        always, sent, moved = held.live, engine.optimizer.exchange.bytes_sent, held.moved
        held.peak = held.live
        for _ in engine.optimizer.export():
            pass
        peaks["export"] = held.peak
        state = sum(tensor.nbytes for _, _, tensor in engine.optimizer.partitioned_state())
    found = {phase: peak - always for phase, peak in peaks.items()}
    return {**found, "always": always}, moved, sent, state


@pytest.mark.distributed
@pytest.mark.parametrize(
    "train",
    [
        pytest.param({"precision": "fp32"}, id="fp32"),
        pytest.param(
            {"precision": "bf16", "activation_checkpointing": "all"},
            id="bf16, recomputing",
            marks=pytest.mark.slow,
        ),
        pytest.param({"persist_below": -1}, id="whole during a step", marks=pytest.mark.slow),
    ],
)
def test_memory_and_traffic_are_those_of_a_real_run(train):
    config = planned_run(2, **train)
    weights, largest = weights_of(config)
    setting = setting_of(config, weights, largest=largest, ranks=2)
    components = memory(weights, setting, run_meta_pass(config, micro_batch=MICRO))
    ranks = run_ranks(observe, 2, train)
    phases = ("forward and backward", "optimizer step", "export")
    for phase in ("always", *phases):
        measured = max(found[phase] for found, *_ in ranks)
        assert budget.phase_size(components, phase) == pytest.approx(measured, rel=0.1), phase
    measured = max(found["always"] + max(found[p] for p in phases) for found, *_ in ranks)
    assert budget.peak(components) == pytest.approx(measured, rel=0.02)

    sent = budget.traffic(weights, setting, accumulation=1, lookahead_steps=0, polar_every=0)
    _, moved, _, _ = ranks[0]
    gathered = sum(size for name, size in moved.items() if "allgather" in name)
    assert (sent.forward + sent.backward) * 2 == pytest.approx(gathered, rel=0.1)
    reduced = sum(size for name, size in moved.items() if "reduce_scatter" in name)
    assert sent.reduce * 2 == pytest.approx(reduced, rel=0.02)
    # The last step retracts the fast and the slow copy: 28 bytes instead of 20.
    measured = sum(row[2] for row in ranks)
    assert 2 * sent.manifold * 28 / 20 == pytest.approx(measured, rel=0.02)
    state = sum(row[3] for row in ranks)
    assert budget.checkpoint_bytes(weights, lookahead=True) == pytest.approx(state, rel=0.01)


def test_flops_counted_are_the_least_plus_what_is_folded_and_recomputed():
    config = planned_run(1)
    least = training_flops(config)
    fold = 3 * 2 * 256**3  # M R^T once forward, two products backward
    images = 8  # more tokens than channels
    seen = run_meta_pass(config, micro_batch=images)
    assert seen.flops == pytest.approx(images * least + 3 * fold, rel=1e-3)
    assert seen.pinned_weight_bytes == 0  # a block keeps its weights as parameters
    again = run_meta_pass(planned_run(1, activation_checkpointing="all"), micro_batch=images)
    assert again.pinned_weight_bytes == 0
    # Of a block's six products one is repeated, and M R^T.
    repeated = 3 * (2 * images * 64 * 256**2 + fold / 3)
    assert again.flops == pytest.approx(seen.flops + repeated, rel=1e-6)
    assert again.activation_bytes < seen.activation_bytes


def test_more_ranks_hold_and_own_less():
    config = planned_run(64)
    one, many = (
        estimate(config, ranks=n, device=device_of("H100", precision="fp32", nodes=1), images=6400)
        for n in (2, 64)
    )
    always = budget.phase_size(one.components, "always")
    assert budget.phase_size(many.components, "always") < always / 4
    assert many.sent.manifold < one.sent.manifold
    assert one.sent.zero3 < many.sent.zero3 < 2.1 * one.sent.zero3
    # Of 7 matrices 4 and 1, and the slices of all.
    assert 4 <= one.time.manifold_products / many.time.manifold_products < 5


def run_plan(capsys, *arguments):
    code = main(arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_billion_in_json_without_a_gpu(capsys):
    code, out, _ = run_plan(
        capsys, "imagenet-L32W4096", "--nodes", "2", "--price-per-gpu-hour", "3", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert found["parameters"] == pytest.approx(1.09e9, rel=0.01)
    assert found["devices"] == 16
    assert found["counts"]["rank_batch"] == 64
    assert found["fits"]
    assert found["cost"] == pytest.approx(3 * found["device_hours"])
    assert found["checkpoint_bytes"] == pytest.approx(20 * found["parameters"], rel=0.01)
    # 20 N / W bytes, of which a sixteenth stays; Lookahead's share is 4 / 6, retraction's 8 / 200.
    assert found["sent_per_rank_step"]["manifold"] == pytest.approx(
        20.7 * found["parameters"] / 16 * 15 / 16, rel=0.01
    )
    verified = found["verification"]
    assert (verified["images"], verified["gflops"], verified["processes"]) == (50_000, 20, 1)
    assert len(verified["matrices"]) == 65
    assert all(step["s"] == step["operations"] / 20e9 for step in verified["matrices"])
    assert verified["total_s"] > verified["bounds_s"] > 65 * verified["matrices"][0]["s"]
    assert verified["memory_peak"] < 1.2e9


def test_a_run_that_keeps_nothing_needs_no_room_for_it(capsys):
    code, out, _ = run_plan(capsys, "digits", "--checkpoint.none", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["checkpoint_bytes"] == found["artifact_bytes"] == 0
    assert set(found["host"]) == {"data read ahead"}
    assert "none is written" in run_plan(capsys, "digits", "--checkpoint.none")[1]


def test_what_cannot_fit_is_refused_with_its_reason_and_a_way_out(capsys):
    large = ("synthetic", "--images", "80000", "--gpus", "2", "--train.global-batch", "8192",
             "--model.depth", "8", "--memory-gb", "0.6")  # fmt: skip
    code, out, err = run_plan(capsys, *large)
    assert code == 2
    assert "verification of the certificate" in out
    assert "all bounds, 1 x 20 GFLOP/s" in " ".join(out.split())
    assert "the largest component is activations (forward and backward)" in err
    assert "What fits: --train.accumulation " in err or "What fits: --train.activation" in err
    change = err.split("What fits: ")[1].split(" (")[0].split()
    code, _, err = run_plan(capsys, *large, *change)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digist",), "nearest: digits"),
        (("digits", "--gpus", "7"), "not divisible by"),
        (("digits", "--device", "TPU"), "--device TPU: not one of B200"),
        (("digits", "--device", "TPU", "--tflops", "9"), "give --memory-gb as well"),
        (("digits", "--nodes", "0"), "--nodes 0: at least 1"),
        (("digits", "--sweep", "8,x"), "--sweep 8,x"),
        (("digits", "--efficiency", "2"), "--efficiency 2.0 must be in (0, 1]"),
        (("digits", "--measured", "none.json"), "--measured none.json: No such file"),
        (("digits", "--measured", "README.md"), "--measured README.md: "),
        (("digits", "--measured", "a.json", "--device", "H100"), "the file has its own"),
        (("digits", "--sweep", "0"), "--sweep 0: 0 devices, at least 1"),
        (("digits", "--sweep", "8,-8"), "-8 devices, at least 1"),
        (("digits", "--tflops", "inf"), "--tflops inf: a number that is not negative"),
        (("digits", "--images", "-1"), "--images -1: a number that is not negative"),
        (("digits", "--device", "V100", "--train.precision", "bf16"), "have no bf16"),
        (("synthetic",), "give --data.shards, or --images"),
        (
            ("digits", "--cluster.launcher", "local", "--train.processor-seconds", "9"),
            "--train.processor-seconds 9: a plan counts",
        ),
    ],
)
def test_bad_input_is_refused_and_named(capsys, arguments, words):
    code, _, err = run_plan(capsys, *arguments)
    assert code == 2
    assert words in err


@pytest.mark.parametrize(("increment", "more"), [("full", False), ("tf32", True), ("bf16", True)])
def test_reduced_precision_of_the_increment_is_planned_for(increment, more):
    config = parse(["digits", "--optim.increment", increment]).run
    weights, largest = weights_of(config)
    setting = setting_of(config, weights, largest=largest, ranks=2)
    assert setting.rounds_factors is more


def test_a_sweep_is_a_table_with_a_row_for_each_number():
    header, rule, *rows = sweep(swept(parse(["digits", "--sweep", "1,2,4"])))
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 2", "| 4"]
    assert header.count("|") == rule.count("|") == rows[0].count("|")


def test_the_page_on_scaling_says_what_the_planner_says():
    page = (Path(__file__).resolve().parents[2] / "docs/explanation/scaling.md").read_text()
    header, _, few, many = sweep(swept(parse([*BILLION, "--sweep", "8,512"])))
    for line in (header, few, many):
        assert line in page


@pytest.mark.slow
def test_the_billion_trains_as_fast_as_the_page_says():
    def images_per_s(ranks, *options):
        (found,) = swept(parse([*BILLION, *options, "--sweep", str(ranks)]))
        return found.images_per_s, found.epoch_s / 60

    (eight, minutes), (many, _) = images_per_s(8), images_per_s(64)
    large = ("--train.global-batch", "4096")
    (eight_large, _), (many_large, _) = images_per_s(8, *large), images_per_s(64, *large)
    page = (Path(__file__).resolve().parents[2] / "docs/explanation/scaling.md").read_text()
    assert f"{minutes:.1f} minutes an epoch" in page
    assert f"{many / eight / 8:.0%} of linear" in page
    assert f"{many_large / eight_large / 8:.0%} of linear" in page


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.network}-{row.devices}")
def test_published_measurements_are_met_within_a_fifth(row):
    assert planned_row(row).total == pytest.approx(row.seconds, rel=0.2)


def test_a_ring_uses_all_adapters_of_a_node_and_an_exchange_its_own():
    one, two, many = (device_of("H100", precision="bf16", nodes=n) for n in (1, 2, 64))
    assert one.gather_gbps == one.exchange_gbps == pytest.approx(0.8 * 3600)
    assert two.exchange_gbps == many.exchange_gbps == pytest.approx(0.8 * 400)
    assert two.gather_gbps == pytest.approx(0.8 * 3600)  # NVLink is the slower one
    assert many.gather_gbps == pytest.approx(0.8 * 3200 * 511 / 504)
    assert one.latency_s < two.latency_s < many.latency_s


def test_as_few_blocks_are_recomputed_as_fit():
    words = [*BILLION, "--model.depth", "6"]
    wide = parse(words).estimate(8)
    memory_gb = 0.85 * wide.peak / (1 - budget.RESERVE) / 1e9
    request = parse([*words, "--memory-gb", f"{memory_gb:.2f}"])
    narrow = request.estimate(8)
    assert wide.meta_pass.recomputed == 0
    assert 0 < narrow.meta_pass.recomputed < narrow.meta_pass.blocks == 6
    assert narrow.fits
    assert narrow.peak < wide.peak
    assert narrow.time.passes > wide.time.passes
    # The ranks of a run decide by the same function.
    train = replace(request.run.train, activation_checkpointing=narrow.meta_pass.recomputed - 1)
    fewer = replace(request.run, train=train)
    assert not estimate(fewer, ranks=8, device=narrow.device, images=request.data()[0]).fits
    # Where it is not left to the planner, all are.
    none = parse([*words, f"--memory-gb={memory_gb}", "--train.activation-checkpointing", "none"])
    assert none.estimate(8).meta_pass.recomputed == 6


def test_a_sweep_says_where_scaling_ends(capsys):
    workers = ("--data.stream.workers", "64")
    code, out, _ = run_plan(capsys, "digits", *workers, "--sweep", "8,64", "--memory-gb", "0.001")
    assert code == 2  # nothing fits
    assert "| bound |" in out
    assert out.rstrip().splitlines()[-1].startswith("Scaling ends at 8 devices: 64 make")


def test_collectives_keep_more_memory_on_more_ranks():
    few, many = swept(parse(["imagenet-L32W4096", "--sweep", "8,512"]))
    assert few.room - many.room == 504 * 2_000_000


def pieces(**changes):
    values = {
        "hardware": "", "date": "", "device": "cpu", "precision": "fp32", "increment": "full",
        "ranks": 2, "nodes": 1,
        "width": 192, "tokens": 64, "memory_gb": 8.0, "working_flops": 4e10, "single_flops": 2e10,
        "pass_efficiency": 0.5, "step_efficiency": 0.25, "exchange_gbps": 2.0, "gather_gbps": 4.0,
        "scatter_gbps": 8.0, "latency_s": 1e-3, "decode_rate": 1e4, "overlap": False, **changes,
    }  # fmt: skip
    return Measured(**values)


def planned(capsys, tmp_path, found, *options):
    path = tmp_path / "measured.json"
    path.write_text(found.to_json())
    code, out, err = run_plan(
        capsys, "digits", "--gpus", "2", "--measured", str(path), "--json", *options
    )
    return (json.loads(out) if out else {}), code, err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("40000000000.0", "Infinity"), "working_flops"),
        (lambda text: text.replace("0.25", "NaN"), "step_efficiency"),
        (lambda text: "[" * 100_000, "maximum recursion"),
        (lambda text: text + " " * (16 << 20), "the limit is 16,777,216"),
    ],
)
def test_what_was_measured_is_checked_before_it_is_believed(capsys, tmp_path, change, words):
    path = tmp_path / "measured.json"
    path.write_text(change(pieces().to_json()))
    code, _, err = run_plan(capsys, "digits", "--gpus", "2", "--measured", str(path))
    assert code == 2
    assert f"--measured {path}: " in err
    assert words in err


def test_what_was_measured_replaces_data_sheets(capsys, tmp_path):
    plan, code, _ = planned(capsys, tmp_path, pieces())
    time, sent = plan["step_s"], plan["sent_per_rank_step"]
    assert code == 0
    assert time["passes"] == time["products"] == pytest.approx(plan["flops_per_rank_step"] / 2e10)
    gathered = (sent["forward"] + sent["backward"]) * 8 / 4e9
    reduced, starts = sent["reduce"] * 8 / 8e9, sent["gathers"] * 1e-3
    assert time["zero3"] == pytest.approx(gathered + reduced + starts)
    exchanged = sent["manifold"] * 8 / 2e9 + 5e-3 * sent["rounds"]
    assert time["manifold_traffic"] == pytest.approx(exchanged)
    # Nothing runs beside anything.
    names = ("passes", "zero3", "data", "manifold_products", "manifold_traffic")
    assert time["total"] == pytest.approx(sum(time[name] for name in names))
    sources = plan["device"]["sources"]
    assert sources["exchange_gbps"] == "measured on 2 ranks of 1 node(s)"
    assert sources["working_flops"] == "measured at width 192, 64 tokens"


def test_options_win_over_what_was_measured(capsys, tmp_path):
    options = ("--tflops", "1", "--link-gbps", "9", "--efficiency", "0.3", "--memory-gb", "7")
    plan, *_ = planned(capsys, tmp_path, pieces(), *options)
    device = plan["device"]
    assert (device["working_flops"], device["memory_gb"]) == (1e12, 7)
    assert device["exchange_gbps"] == device["gather_gbps"] == device["scatter_gbps"] == 9
    assert device["pass_efficiency"] == device["step_efficiency"] == 0.3
    assert device["sources"]["working_flops"] == "--tflops"
    assert device["sources"]["latency_s"].startswith("measured")


def test_one_node_says_nothing_of_a_network_that_is_slower(capsys, tmp_path):
    fast = pieces(exchange_gbps=2000.0, overlap=True)
    plan, *_ = planned(capsys, tmp_path, fast, "--nodes", "2", "--gpus", "1")
    assert plan["device"]["exchange_gbps"] == pytest.approx(0.8 * 400)
    assert plan["device"]["gather_gbps"] == 4
    time = plan["step_s"]
    beside = max(time["passes"], time["zero3"], time["data"])
    assert time["total"] == pytest.approx(beside + time["manifold"])


def test_what_was_not_measured_is_not_made_up(capsys, tmp_path):
    _, code, err = planned(capsys, tmp_path, pieces(ranks=1, exchange_gbps=0.0))
    assert code == 2
    assert "measure with more, or give --link-gbps" in err
    _, code, err = planned(capsys, tmp_path, pieces(precision="bf16"))
    assert code == 2
    assert "--measured is of --train.precision bf16, the run is of fp32" in err
    _, code, err = planned(capsys, tmp_path, pieces(), "--optim.increment", "tf32")
    assert code == 2
    assert "--measured is of --optim.increment full, the run is of tf32" in err


def test_provenance_is_printed(capsys, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(pieces().to_json())
    _, out, _ = run_plan(capsys, "digits", "--gpus", "2", "--measured", str(path))
    assert "nothing: one after" in out
    assert "measured at width" in out


def test_rounds_exchange_beside_products_where_they_can():
    time = StepTime(1.0, 0.5, 0.2, 0.8, 0.4, 4, overlap=True)
    assert time.manifold == pytest.approx(0.8 + 0.4 / 4)
    assert time.total == pytest.approx(1.9)
    assert replace(time, overlap=False).total == pytest.approx(2.9)


def test_a_device_known_by_its_values_alone():
    device = device_of("TPU", precision="bf16", nodes=2, tflops=100, memory_gb=16, link_gbps=100)
    assert device.working_flops == 1e14
    with pytest.raises(PipelineError, match="--tflops"):
        device_of("TPU", precision="bf16", nodes=1)
