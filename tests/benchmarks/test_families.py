import subprocess
import sys

import torch

from benchmarks import families, family_peers
from benchmarks.family_peers import Peer
from model.networks.linf import sortnet

SOURCE = """
import absent_module
import torch
from torch import nn

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = 2 * torch.ones(1).cuda()

    def forward(self, x):
        return self.factor * x
"""


def build():
    import model

    twice = vars(model)["Twice"]()
    return lambda x: twice(x).sum()


def test_a_peer_may_have_modules_of_our_names(tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "model.py").write_text(SOURCE)
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, "-C", str(folder), *command], check=True)
    peer = Peer("owner/net", build, absent=("absent_module",))
    assert len(family_peers.commit(tmp_path, peer)) >= 7
    forward = family_peers.load(tmp_path, peer)
    assert sys.modules["model.networks.linf.sortnet"] is sortnet
    assert not str(sys.modules["model"].__file__).startswith(str(tmp_path))
    assert "absent_module" not in sys.modules
    pair = families.Pair("layer", (2, 4, 8, 8), lambda: lambda x: x.square().sum(), peer)
    assert float(forward(torch.ones(2, 4))) == 16
    found = families.measure(pair, forward, 3)
    assert found["ours CPU s"] > 0
    assert found["target"].startswith("<= 1.1: ")


def test_what_is_not_at_hand_is_not_run(tmp_path):
    rows = families.table(tmp_path, 1)
    assert all(row["public"].startswith("not run: ") for row in rows)
    assert {row["public"] for row in rows} >= {"not run: a CUDA extension"}
