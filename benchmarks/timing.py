"""Timing on shared machines: contestants take turns, processor time counts, the median is told."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call: processor time of this process on a CPU, wall time on a GPU.

    Processor time leaves out what other processes take; with one thread it is the time that the
    call would need alone, but for shared caches.
    """
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    budget_s: float = 20.0,
) -> dict[str, float]:
    """Median seconds per call by name, after one call to warm up.

    Args:
        contestants: What is called in turn.
        device: Where the work runs.
        repeats: Turns.
        budget_s: A contestant retires after this long.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for work in contestants.values():
        work()
    for _ in range(repeats):
        for name, work in contestants.items():
            if sum(times[name]) < budget_s:
                times[name].append(seconds(work, device))
    return {name: statistics.median(values) for name, values in times.items()}


def paired(
    first: Callable[[], object],
    second: Callable[[], object],
    unit: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
) -> tuple[float, float, float]:
    """How much longer one call takes than another that follows it: smallest, median, largest.

    In units of the median time of a third. One call of each warms up.
    """
    for work in (first, second, unit):
        work()
    differences, units = [], []
    for _ in range(repeats):
        differences.append(seconds(first, device) - seconds(second, device))
        units.append(seconds(unit, device))
    scale = statistics.median(units)
    low, high = min(differences), max(differences)
    return low / scale, statistics.median(differences) / scale, high / scale
