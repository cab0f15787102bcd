import json

import pytest

from data_shards import bench
from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from data_shards.streaming.sampler import Cursor
from tests.data_shards.test_index import rewrite_header


def test_figures_of_a_stream(synthetic_set):
    index = load_index(str(synthetic_set))
    config = StreamConfig(cache_bytes=0, workers=1)
    found = bench.measure(index, config, batch=16, steps=7, step_ms=20, cursor=Cursor(seed=1))
    assert found.steps == 7
    assert found.images == 7 * 16
    assert found.images_per_s < 16 / 0.02  # a step takes 20 ms
    size = index.rows.size[index.select("train")]
    per_image = 1e6 * found.mb_per_s / found.images_per_s
    assert size.min() <= per_image <= size.max()
    assert 0 <= found.stall_ms <= found.stall_ms_p95 <= found.stall_ms_max
    assert found.cpu_ms_per_image > 0
    assert found.first_batch_s > 0
    assert (found.damaged, found.retries) == (0, 0)
    traffic = index.files.traffic  # with the first batch and what was read ahead
    assert traffic.bytes >= 8 * 16 * size.min()
    assert 0 < traffic.requests <= traffic.bytes / size.min()
    assert found.requests_per_image * found.images <= traffic.requests


def test_command(synthetic_set, capsys):
    url = str(synthetic_set)
    bench.main([url, "--batch", "8", "--steps", "3", "--workers", "2", "--flip", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 24
    assert figures["index_s"] > 0
    bench.main([url, "--batch", "8", "--steps", "2"])
    assert "images/s" in capsys.readouterr().out


def test_images_that_differ_in_shape_are_cropped(synthetic_set, tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    for path in synthetic_set.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rewrite_header(folder, train_shape=None)
    bench.main([str(folder), "--batch", "8", "--steps", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["images"] == 16


def test_refusals(synthetic_set, tmp_path):
    index = load_index(str(synthetic_set))
    with pytest.raises(ShardError, match="0 steps of 0"):
        bench.measure(index, StreamConfig(), steps=0, cursor=Cursor(seed=0))
    with pytest.raises(SystemExit, match="no shard set at"):
        bench.main([str(tmp_path)])
