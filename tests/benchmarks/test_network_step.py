import pytest
import torch

from benchmarks import network_step
from benchmarks.network_step import Setting, gpu_rows, kernel_rows, product_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_a_block_and_of_its_kernels(dtype, monkeypatch):
    monkeypatch.setattr(network_step, "CALLS", 2)
    setting = Setting(32, CPU, 512, dtype)
    products, passed, plain = product_rows(setting, 1)
    assert passed["times its products"] == passed["seconds"] / products["seconds"]
    assert plain["times its products"] == plain["seconds"] / products["seconds"]
    copy, *kernels = kernel_rows(setting, 1)
    assert copy["share of a copy's rate %"] == pytest.approx(100)
    assert copy["GB/s"] * 1e9 * copy["seconds"] == pytest.approx(2 * 512 * 32 * dtype.itemsize)
    assert [row["what"].split(",")[0] for row in kernels] == [
        "shift",
        "shift back",
        "beta-Abs",
        "gradient of beta-Abs and bias",
    ]
    moved = [row["GB/s"] * 1e9 * row["seconds"] for row in kernels]
    size, signs = 512 * 32 * dtype.itemsize, 512 * 16
    assert moved == pytest.approx([size / 2, size / 2, size + signs, 2 * size + signs])


def test_without_a_gpu_its_rows_say_so():
    rows = gpu_rows(4096, 32768, CPU, 1)
    assert [row["seconds"] for row in rows] == ["not run"] * 4
    assert rows[0]["what"] == "block, C=4096, 32768 tokens, bfloat16, on a GPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_on_the_device():
    rows = gpu_rows(256, 2048, torch.device("cuda"), 1)
    assert len(rows) == 16
    assert all(row["seconds"] > 0 for row in rows)
