"""Exit codes: 2 says that nothing was trained, 1 that a run which had begun has failed."""

from unittest import mock

import pytest

from data_shards.errors import ShardError
from model.errors import ModelError
from pipeline import pretrain
from pipeline.errors import PipelineError, ProcessDiedError, RunFailedError, failing
from pipeline.run.events import Started
from pipeline.run.worker_spec import WorkerSpec
from tests.harness import run_command, run_ranks
from tests.pipeline.small_runs import Undisturbed, rank_world, small_run, small_shards


@pytest.mark.parametrize("kind", [PipelineError, ShardError, ModelError])
def test_a_refusal_is_one_until_the_run_has_begun(kind):
    begun = mock.Mock()
    for begun.return_value, expected in ((False, kind), (True, RunFailedError)):
        with pytest.raises(expected, match="why") as found, failing(begun):
            raise kind("why")
        assert type(found.value) is expected


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (PipelineError("why"), 2, "refused: why"),
        (RunFailedError("why"), 1, "failed: why; --resume"),
        (ProcessDiedError("why"), 1, "failed: why; --resume"),
    ],
)
def test_codes_of_the_entry(monkeypatch, capsys, error, code, word):
    monkeypatch.setattr(pretrain, "_run", mock.Mock(side_effect=error))
    assert pretrain.main(["digits"]) == code
    assert word in capsys.readouterr().out


FLAGS = (
    *("--cluster.launcher", "local", "--train.global-batch", "48", "--train.epochs", "1"),
    *("--train.warmup-epochs", "0", "--model.width", "24", "--model.depth", "1"),
    *("--checkpoint.no-evaluate", "--cluster.device", "cpu"),
)


@pytest.mark.slow
@pytest.mark.integration
def test_a_loss_that_is_not_finite_fails_a_run_and_refuses_none(tmp_path):
    flags = [*FLAGS, "--train.max-skipped", "0", "--optim.lr", "1e30", "--storage", str(tmp_path)]
    done = run_command("pipeline.pretrain", "digits", *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: step" in done.stdout
    assert "refused" not in done.stdout


def on_two_ranks(rank, world_size, folder, shards):
    """A disk that is full at the last checkpoint, as every rank sees it."""
    from pipeline.checkpoint import async_saver
    from pipeline.training import worker

    events = []
    with (
        rank_world(rank, world_size),
        mock.patch.object(
            async_saver, "write_snapshot", side_effect=OSError(28, "No space left on device")
        ),
    ):
        try:
            worker.run_rank(
                WorkerSpec(small_run(), folder, shards, {}), events.append, Undisturbed()
            )
        except Exception as error:
            return type(error), str(error), [type(e) for e in events[:1]]


@pytest.mark.distributed
def test_a_full_disk_at_the_last_checkpoint_fails_on_every_rank(tmp_path):
    shards = small_shards(tmp_path / "shards")
    ranks = run_ranks(on_two_ranks, 2, str(tmp_path / "run"), shards)
    assert {rank[0] for rank in ranks} == {RunFailedError}
    assert all("No space left" in rank[1] for rank in ranks)
    assert ranks[0][2] == [Started]
