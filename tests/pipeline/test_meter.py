import math
import threading

import pytest

from model.groupsort import GroupSortConfig
from pipeline.config import ClusterConfig, RunConfig, TrainConfig
from pipeline.events import Metrics, Started
from pipeline.flops import peak_flops, training_flops
from pipeline.meter import Meter
from pipeline.presets import run_preset
from pipeline.system import SystemMetrics


class Clock:
    """Args: now: seconds."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def meter_of(clock, used=0.0, **cluster):
    config = RunConfig(
        preset="digits",
        model=run_preset("digits").model,
        train=TrainConfig(precision="bf16"),
        cluster=ClusterConfig(**cluster),
    )
    return Meter(config, used, clock)


def metrics(images_per_s=100.0):
    return Metrics(1, {"train/images_per_s": images_per_s}, 0)


def test_flops_of_the_billion_network_are_those_that_the_paper_implies():
    """2,399 images/s on 8 devices with 196 tokens are 379 TFLOP/s per device, folded."""
    network = run_preset("imagenet-L32W4096").model
    tokens = math.prod(network.grid)
    flops = training_flops(network) * 196 / tokens
    assert flops * 2399 / 8 / 1e12 == pytest.approx(379, rel=0.01)


def test_flops_follow_a_hand_count():
    network = run_preset("digits").model
    tokens, width = math.prod(network.grid), network.width
    products = 6 * 2 * tokens * width**2 * network.depth
    stem, head = 4 * tokens * network.stem_channels * width, 6 * width * 10
    assert training_flops(network) == products + stem + head


def test_flops_of_another_family_are_not_guessed():
    network = GroupSortConfig(input_shape=(1, 8, 8), num_classes=10, width=16, depth=2)
    assert training_flops(network) is None


def test_the_peak_follows_device_and_precision():
    assert peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("cpu", "fp32") is None


def test_device_hours_count_from_the_start_and_over_restarts():
    clock = Clock()
    meter = meter_of(clock, used=1.0, price_per_device_hour=3.0)
    clock.now += 100  # before the ranks run nothing is used
    assert meter.started(Started({}, 0, 10, devices=4, device="cpu")) == {
        "device": "cpu",
        "devices": "4",
    }
    clock.now += 900
    found = meter.values(metrics())
    assert found["cost/device_hours"] == pytest.approx(2.0)
    assert found["cost/total"] == pytest.approx(6.0)
    clock.now += 900
    meter.started(Started({}, 5, 10, devices=2, device="cpu"))  # restarted with fewer
    clock.now += 1800
    assert meter.values(metrics())["cost/device_hours"] == pytest.approx(4.0)


def test_utilisation_is_of_one_device():
    meter = meter_of(Clock())
    meter.started(Started({}, 0, 10, devices=4, device="NVIDIA H200"))
    rate = 100.0 * training_flops(run_preset("digits").model) / 4
    found = meter.values(metrics())
    assert found["perf/tflops_per_device"] == pytest.approx(rate / 1e12)
    assert found["perf/mfu"] == pytest.approx(rate / 989.4e12)
    assert "cost/total" not in found


def test_utilisation_of_an_unknown_device_needs_its_peak():
    for peak, known in ((0.0, False), (0.5, True)):
        meter = meter_of(Clock(), peak_tflops=peak)
        meter.started(Started({}, 0, 10))
        assert ("perf/mfu" in meter.values(metrics())) == known


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
