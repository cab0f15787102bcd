"""Which checkpoints go: by hand, by properties, and in a folder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.storage.store import Store
from pipeline.checkpoint.reader import committed
from pipeline.checkpoint.retention import Candidate, retain, surplus
from pipeline.config import CheckpointConfig
from pipeline.run.layout import COMMIT, PINNED, written_checkpoint


def steps(*numbers, size=1_000_000_000):
    return [Candidate(number, size) for number in numbers]


@pytest.mark.parametrize(
    ("policy", "gone"),
    [
        ({"keep_last": 0}, []),
        ({"keep_last": 2}, [10, 20, 30]),
        ({"keep_last": 1, "keep_every": 20}, [10, 30]),
        ({"keep_last": 9}, []),
        ({"keep_last": 0, "budget_gb": 2.5}, [10, 20, 30]),
        # 20 and 40 are kept for their steps alone: they go before 30 does.
        ({"keep_last": 3, "keep_every": 20, "budget_gb": 3}, [10, 20]),
        ({"keep_last": 0, "budget_gb": 0.1}, [10, 20, 30, 40]),
    ],
)
def test_by_hand(policy, gone):
    assert surplus(steps(10, 20, 30, 40, 50), CheckpointConfig(**policy)) == gone


def test_the_best_and_the_pinned_stay():
    found = [
        Candidate(10, 1, score=0.3, pinned=True),
        Candidate(20, 1, score=0.8),
        Candidate(30, 1, score=0.7),
        Candidate(40, 1),
        Candidate(50, 1),
    ]
    assert surplus(found, CheckpointConfig(keep_last=1)) == [30, 40]
    assert surplus(found, CheckpointConfig(keep_last=1, keep_best=2)) == [40]
    assert surplus(found, CheckpointConfig(keep_last=1, keep_best=0)) == [20, 30, 40]


def test_what_might_be_the_best_stays_within_the_budget():
    found = [Candidate(10, 10**9, pending=True), *steps(20, 30)]
    assert surplus(found, CheckpointConfig(keep_last=1)) == [20]
    assert surplus(found, CheckpointConfig(keep_last=1, keep_best=0)) == [10, 20]
    assert surplus(found, CheckpointConfig(keep_last=1, budget_gb=1.5)) == [10, 20]


@given(
    st.sets(st.integers(1, 60), min_size=1),
    st.integers(0, 6),
    st.integers(0, 7),
    st.integers(0, 3),
    st.floats(0, 12),
    st.randoms(use_true_random=False),
)
def test_the_newest_and_the_pinned_never_go(numbers, last, every, best, budget, random):
    found = [
        Candidate(n, 10**9, random.choice([None, random.random()]), random.random() < 0.2)
        for n in numbers
    ]
    policy = CheckpointConfig(keep_last=last, keep_every=every, keep_best=best, budget_gb=budget)
    gone = surplus(found, policy)
    kept = [c for c in found if c.step not in gone]
    assert max(numbers) not in gone
    assert not any(c.pinned for c in found if c.step in gone)
    if budget and len(kept) > budget:
        assert all(c.pinned or c.step == max(numbers) for c in kept)
    if not last and not budget:
        assert gone == []


def test_in_a_folder(tmp_path):
    run = Store(tmp_path)
    for step in (10, 20, 30, 40):
        folder = run.child(written_checkpoint(step, 1))
        folder.write(COMMIT, b"{}")
        folder.write("rank-00000-of-00001.safetensors", b"x" * step)
    run.write(f"checkpoints/step-00000010/{PINNED}", b"")
    for torn in (15, 45):
        run.write(f"checkpoints/step-{torn:08d}/writer-0001/rank-00000-of-00001.safetensors", b"x")
    run.write("artifacts/step-00000020/artifact.json", b"{}")
    assert retain(run, CheckpointConfig(keep_last=1), {20: 0.1, 30: 0.9}) == [20]
    found = list(committed(run))
    assert found == [40, 30, 10]
    # The torn one that is newer than all others may be under way.
    assert [name[-2:] for name in run.ls("checkpoints")] == ["10", "30", "40", "45"]
    assert run.exists("artifacts/step-00000020/artifact.json")


def test_what_people_and_tools_leave_there_is_no_checkpoint_and_stays(tmp_path):
    run = Store(tmp_path)
    names = ["step-00000010", "step-00000020", "step-00000030"]
    strays = ["step-backup", "step-00000090.bak", "step-000000040", "step-5"]
    for name in names + strays:
        run.write(f"checkpoints/{name}/writer-0001/{COMMIT}", b"{}")
    run.write("checkpoints/.DS_Store", b"")
    assert retain(run, CheckpointConfig(keep_last=1), {}) == [10, 20]
    assert list(committed(run)) == [30]
    assert set(run.ls("checkpoints")) == {
        f"checkpoints/{name}" for name in [*strays, ".DS_Store", "step-00000030"]
    }
