import gzip
import json

import pytest
import torch

from data_shards.storage.store import Store
from pipeline.training.profiler import profiled


def train(folder, steps, loop):
    weight = torch.randn(30, 30, requires_grad=True)
    with profiled(Store(folder), steps, first=100, device=torch.device("cpu")) as stepped:
        for _ in range(loop):
            (weight @ weight).sum().backward()
            stepped()
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# Kineto says on stderr, not as a warning, that memory was allocated before it began.
def test_a_trace_holds_the_steps_asked_for_and_says_what_they_held(tmp_path):
    assert train(tmp_path, 2, loop=12) == ["step-00000105.trace.json.gz", "step-00000105.txt"]
    with gzip.open(tmp_path / "profile/step-00000105.trace.json.gz") as stream:
        events = json.load(stream)["traceEvents"]
    products = [e for e in events if e.get("name") == "aten::mm" and "dur" in e]
    assert len(products) == 2 * 3  # the product and its two gradients, of two steps
    table = (tmp_path / "profile/step-00000105.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU Mem" in table


@pytest.mark.parametrize(("steps", "loop"), [(0, 12), (2, 3)])
def test_nothing_is_written_for_no_steps_or_a_run_that_ends_before(tmp_path, steps, loop):
    assert train(tmp_path, steps, loop) == []
