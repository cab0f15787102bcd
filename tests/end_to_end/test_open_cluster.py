"""What the attacks of the other tests do to an open cluster, and that it is refused."""

import time

import pytest

from pipeline.run.server_exposure import ExposureError, require_closed
from tests.end_to_end.ray_cluster import cluster
from tests.strangers import answers, drive, listening, machine_addresses, post_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def wait_for(condition, seconds=200):
    """On a busy machine a cluster that has just begun may be late for anybody."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_an_open_cluster_runs_the_code_of_strangers_and_is_refused(tmp_path):
    with cluster(tmp_path, "ray start --head --num-cpus 2", auth="disabled") as running:
        gcs = int(running.gcs.rpartition(":")[2])
        wait_for(lambda: drive("127.0.0.1", gcs, tmp_path / "driven"))
        assert (tmp_path / "driven").exists()
        sockets = listening(running.nodes[0].pid)
        agents = [port for name, _, port in sockets if "DashboardAgent" in name]
        posted = tmp_path / "posted"
        assert any(200 in post_job("127.0.0.1", port, posted) for port in agents)
        wait_for(posted.exists)
        refused = set()
        for address in (running.address, running.client, running.gcs):
            for host in machine_addresses():
                if ":" not in host and answers(host, int(address.rpartition(":")[2])):
                    with pytest.raises(ExposureError, match="runs the code of whoever reaches"):
                        require_closed(ray=address.replace("127.0.0.1", host))
                    refused.add(address.replace("127.0.0.1", host))
        assert {running.address, running.client, running.gcs} <= refused
