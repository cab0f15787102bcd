"""What the ranks of one machine listen on."""

import datetime
import os

from pipeline.config import ClusterConfig
from pipeline.run.distributed import join_process_group, listening_store
from tests.strangers import listening, off_loopback


def test_the_group_and_the_store_of_a_lone_rank_are_on_loopback(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**single, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    before = listening(os.getpid())
    with join_process_group(ClusterConfig(launcher="local", device="cpu")):
        group = listening(os.getpid()) - before
        assert group
        store = listening_store(0, datetime.timedelta(seconds=10))
        ports = {port for _, _, port in listening(os.getpid()) - before}
        assert store.port in ports - {port for _, _, port in group}
        assert off_loopback(listening(os.getpid()) - before) == set()
