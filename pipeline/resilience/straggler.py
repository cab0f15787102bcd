"""How fast each rank computes, and which one is slower than the others for long.

Measured is the forward pass of modules that own parameters and contain none that do, from after
DeepSpeed has gathered these to before it releases them: no rank waits for another there, so a rank
on a throttled device or a crowded machine stands out although all take the same time per step. One
micro-batch per record is measured, which costs two clock readings per module.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_RECORDS = 5
_SECONDS = 30.0
"""For how many records in a row, and how long, a rank is slow before it is named."""


class Stopwatch:
    """Seconds that the modules of a network take for one forward pass.

    Args:
        root: whose next call after a reading is measured; its parameters are on no device yet,
            or partitioned. Hooks of others that gather them must be there already.
        device: where it computes.
    """

    def __init__(self, root: nn.Module, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stamps: list[Any] = []
        self._running = self._done = False
        self._hooks = [
            root.register_forward_pre_hook(self._begin),
            root.register_forward_hook(self._end),
        ]
        for module in _leaves(root):
            self._hooks += [
                module.register_forward_pre_hook(self._stamp),
                # Before the hook that releases the parameters.
                module.register_forward_hook(self._stamp, prepend=True),
            ]

    def close(self) -> None:
        """Measure no more."""
        for hook in self._hooks:
            hook.remove()

    def read(self) -> float:
        """Seconds of the pass measured since the last reading, 0 if there was none."""
        stamps, self._stamps, self._done = self._stamps, [], False
        pairs = list(zip(stamps[::2], stamps[1::2], strict=True))
        if not self._cuda:
            return float(sum(stop - start for start, stop in pairs))
        if stamps:
            # The last event of the pass: when it has come, so have the others.
            stamps[-1].synchronize()
        return float(sum(start.elapsed_time(stop) for start, stop in pairs) / 1000)

    def _begin(self, *_: Any) -> None:
        self._running = not self._done
        if self._running:
            self._stamps = []  # of a pass that has failed

    def _end(self, *_: Any) -> None:
        self._running, self._done = False, True

    def _stamp(self, *_: Any) -> None:
        if not self._running:
            return
        if self._cuda:
            # On the stream: a clock of the host would measure the queueing of kernels.
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._stamps.append(event)
        else:
            self._stamps.append(time.perf_counter())


def _leaves(root: nn.Module) -> list[nn.Module]:
    """Modules that own parameters and contain no other that does."""

    def owns(module: nn.Module) -> bool:
        return next(module.parameters(recurse=False), None) is not None

    return [
        module
        for module in root.modules()
        if owns(module) and not any(owns(m) for m in module.modules() if m is not module)
    ]


class StragglerDetector:
    """Compares the ranks.

    Args:
        ratio: to the median from which on a rank counts as slow.
        clock: seconds.
    """

    def __init__(self, ratio: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ratio, self._clock = ratio, clock
        self._slow: int | None = None
        self._since = 0.0
        self._records = 0
        self._named = False

    def compare(self, seconds: Sequence[float]) -> dict[str, float]:
        """Metrics of a record: the slowest rank and its ratio to the (lower) median.

        Args:
            seconds: of every rank; none are compared where a rank has measured nothing.
        """
        if len(seconds) < 2 or min(seconds) <= 0:
            return {}
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        # The low one: of two ranks the mean would hide half of the difference.
        ratio = seconds[rank] / statistics.median_low(seconds)
        slow = rank if ratio > self._ratio else None
        # Another rank, or none: counting begins anew.
        if slow != self._slow:
            self._slow, self._since, self._records, self._named = slow, self._clock(), 0, False
        self._records += 1
        return {"perf/slowest_rank": float(rank), "perf/slowest_ratio": ratio}

    def straggler(self) -> int | None:
        """The slow rank in the one record after which it is to be named."""
        long = self._records >= _RECORDS and self._clock() - self._since >= _SECONDS
        if self._slow is None or self._named or not long:
            return None
        self._named = True
        return self._slow
