import math
import threading
from typing import cast

import pytest
import torch

from model.networks.linf.groupsort import GroupSortConfig
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network
from pipeline.config import ClusterConfig, RunConfig
from pipeline.driver.goodput import UsageMetrics
from pipeline.driver.system_metrics import SystemMetrics
from pipeline.planner.meta_pass import training_flops
from pipeline.presets.registry import run_preset
from pipeline.run.events import Metrics, Started
from pipeline.training import device_flops
from pipeline.training.device_flops import measured_flops, peak_flops


class Clock:
    """Args: now: seconds."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Record:
    """Rows of (step, values), as the tracker keeps them."""

    def __init__(self, *rows):
        self.rows = list(rows)

    def __call__(self, name, until=None):
        values = [
            values[name]
            for step, values in self.rows
            if name in values and (until is None or step <= until)
        ]
        return values[-1] if values else None


def meter_of(clock, record=None, **cluster):
    flops = training_flops(run_preset("digits"))
    return UsageMetrics(ClusterConfig(**cluster), "bf16", flops, record or Record(), clock)


def metrics(images_per_s=100.0, step=1, productive_s=0.0):
    return Metrics(step, {"train/images_per_s": images_per_s}, 0, productive_s)


def test_flops_of_the_billion_network_are_those_that_the_paper_implies():
    """2,399 images/s on 8 devices with 196 tokens are 379 TFLOP/s per device, folded."""
    run = run_preset("imagenet-L32W4096")
    network = cast(LipNeXtConfig, run.model)
    per_image = training_flops(run) * 196 / math.prod(network.grid)
    assert per_image * 2399 / 8 / 1e12 == pytest.approx(379, rel=0.01)


def test_flops_follow_a_hand_count():
    run = run_preset("digits")
    network = cast(LipNeXtConfig, run.model)
    tokens, width = math.prod(network.grid), network.width
    products = 6 * 2 * tokens * width**2 * network.depth
    stem, head = 4 * tokens * network.stem_channels * width, 6 * tokens * width * 10
    assert training_flops(run) == products + stem + head


def test_flops_of_another_family_are_counted():
    network = GroupSortConfig(input_shape=(1, 8, 8), num_classes=10, width=16, depth=2)
    matrices = [p.numel() for p in build_network(network).parameters() if p.ndim == 2]
    first = 64 * 16  # its input needs no gradient
    assert training_flops(RunConfig(preset="", model=network)) == 6 * sum(matrices) - 2 * first


def test_flops_of_distances_are_none():
    assert training_flops(run_preset("digits-sortnet-mlp")) is None


def test_the_peak_follows_device_and_precision():
    assert peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("cpu", "fp32") is None


def test_device_hours_count_from_the_start_and_over_restarts():
    clock = Clock()
    usage = meter_of(clock, Record((7, {"cost/device_hours": 1.0})), price_per_device_hour=3.0)
    clock.now += 100  # before the ranks run nothing is used
    assert usage.started(Started({}, 0, 10, devices=4, device="cpu")) == {
        "device": "cpu",
        "devices": "4",
        "mfu_of": "unknown",
    }
    clock.now += 900
    found = usage.values(metrics())
    assert found["cost/device_hours"] == pytest.approx(2.0)
    assert found["cost/total"] == pytest.approx(6.0)
    clock.now += 900
    usage.started(Started({}, 5, 10, devices=2, device="cpu"))  # restarted with fewer
    clock.now += 1800
    assert usage.values(metrics())["cost/device_hours"] == pytest.approx(4.0)


def test_utilisation_is_of_one_device():
    usage = meter_of(Clock())
    usage.started(Started({}, 0, 10, devices=4, device="NVIDIA H200"))
    rate = 100.0 * training_flops(run_preset("digits")) / 4
    found = usage.values(metrics())
    assert found["perf/tflops_per_device"] == pytest.approx(rate / 1e12)
    assert found["perf/mfu"] == pytest.approx(rate / 989.4e12)
    assert "cost/total" not in found


def test_utilisation_of_an_unknown_device_needs_its_peak():
    for peak, known in ((0.0, False), (0.5, True)):
        usage = meter_of(Clock(), peak_tflops=peak)
        usage.started(Started({}, 0, 10))
        assert ("perf/mfu" in usage.values(metrics())) == known


def test_utilisation_of_an_unknown_device_may_be_of_what_it_reaches():
    usage = meter_of(Clock())
    assert usage.started(Started({}, 0, 10, measured_flops=1e9))["mfu_of"] == "measured"
    assert usage.values(metrics())["perf/mfu"] == pytest.approx(
        100 * training_flops(run_preset("digits")) / 1e9
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_device_reaches_is_measured(precision):
    assert 1e7 < measured_flops(torch.device("cpu"), precision) < 1e15


def test_products_are_enlarged_until_one_takes_long_enough(monkeypatch):
    """So that a slow device is not kept busy, and a fast one is not measured by its latency."""
    seconds = {256: 1e-3, 512: 2e-3, 1024: 5e-3}
    sizes = []

    def product_seconds(left, right):
        sizes.append(len(left))
        return seconds[len(left)]

    monkeypatch.setattr(device_flops, "product_seconds", product_seconds)
    assert measured_flops(torch.device("cpu"), "fp32") == 2 * 1024**3 / 5e-3
    assert sizes == [256] * 3 + [512] * 3 + [1024] * 3


def run_for(usage, clock, record, steps, *, seconds=10.0, productive_s=8.0):
    """Steps of ten seconds, of which eight count."""
    for step in steps:
        clock.now += seconds
        record.rows.append((step, usage.values(metrics(step=step, productive_s=productive_s))))
    return record("perf/goodput")


def test_goodput_loses_start_up_waits_and_what_is_done_again():
    clock, record = Clock(), Record()
    usage = meter_of(clock, record)
    clock.now += 20  # start-up
    usage.started(Started({}, 0, 10))
    assert run_for(usage, clock, record, [1, 2, 3]) == pytest.approx(24 / 50)
    clock.now += 30  # a hang; the newest checkpoint is that of step 1
    assert usage.time() == {"perf/elapsed_s": 80, "perf/goodput": pytest.approx(24 / 80)}
    usage.started(Started({}, 1, 10))
    assert run_for(usage, clock, record, [2, 3, 4]) == pytest.approx(32 / 110)
    usage.back_to(2)  # a roll-back
    assert run_for(usage, clock, record, [3]) == pytest.approx(24 / 120)


def test_goodput_goes_on_in_the_next_execution():
    clock, record = Clock(), Record()
    usage = meter_of(clock, record)
    usage.started(Started({}, 0, 10))
    run_for(usage, clock, record, [1, 2])
    clock.now += 15  # it stands still, the machine is sampled, and somebody kills it
    record.rows.append((2, usage.time()))
    clock.now += 1000  # nobody runs it
    usage = meter_of(clock, record)
    clock.now += 5
    usage.started(Started({}, 1, 10))
    assert run_for(usage, clock, record, [2]) == pytest.approx(16 / 50)
    assert record("perf/elapsed_s") == 50
    usage.stop()
    assert usage.time() == {}


def test_the_load_of_the_machine_is_sampled_until_closed():
    rows, enough = [], threading.Event()

    def log(values):
        rows.append(values)
        if len(rows) == 2:
            enough.set()

    system = SystemMetrics(log, interval_s=0.01)
    assert enough.wait(20)
    system.close()
    assert "system-metrics" not in {thread.name for thread in threading.enumerate()}
    for row in rows:
        assert 0 <= row["system/cpu_utilization_percentage"] <= 100
        assert row["system/system_memory_usage_megabytes"] > 0
