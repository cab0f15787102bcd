"""A Ray cluster of several nodes on this machine, apart from any other, and its command line."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import psutil

from tests.strangers import process_tree

ROOT = Path(__file__).resolve().parents[2]
MAKE = "make cluster"
_START_S = 300


def free_ports(number):
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Cluster:
    """A running cluster."""

    address: str
    gcs: str
    client: str
    environment: dict[str, str]
    folder: Path
    nodes: list[subprocess.Popen]

    def start(self, command, *flags):
        """Run a `ray start` of the shell, or `make cluster`, until the cluster ends.

        Every node has a folder of its own: a second node of this machine would unpack the working
        directory of a job anew, under the feet of the first.
        """
        place = self.folder / str(len(self.nodes))
        agent, metrics = free_ports(2)
        flags = ("--object-store-memory", "150000000", "--temp-dir", str(place), *flags)
        flags += ("--dashboard-agent-listen-port", str(agent))
        flags += ("--metrics-export-port", str(metrics))
        if command.startswith(MAKE):  # with this interpreter's environment as it is
            installed = f"VENV={sys.prefix} --assume-old={sys.prefix}/run.stamp"
            words = [command, installed, f'RAY_FLAGS="{" ".join(flags)}"']
        else:
            words = [command, "--block", *flags]
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            self.nodes.append(
                subprocess.Popen(
                    ["bash", "-c", " ".join(words)],
                    cwd=ROOT,
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def run(self, command, timeout=800):
        """Run a command of the shell against the cluster; its exit code and output."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return done.returncode, done.stdout

    @property
    def token(self):
        """The token of the cluster's account."""
        return (Path(self.environment["HOME"]) / ".ray/auth_token").read_text()

    def jobs(self):
        """Details of all submitted jobs, by submission id."""
        from ray.job_submission import JobSubmissionClient

        headers = {"Authorization": f"Bearer {self.token}"}
        jobs = JobSubmissionClient(self.address, headers=headers).list_jobs()
        return {job.submission_id: job for job in jobs if job.submission_id}  # else a driver

    def wait_for_nodes(self, number):
        """Wait until so many nodes are alive."""
        code = (
            "import ray; ray.init(log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
        )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            command = f'RAY_ADDRESS={self.gcs} {sys.executable} -c "{code}" 2>/dev/null'
            if self.run(command)[1].strip() == str(number):
                return
            if self.nodes[-1].poll() is not None:
                break
        raise TimeoutError((self.folder / f"node-{len(self.nodes) - 1}.log").read_text())

    def end(self):
        """End every process of the cluster; Ray itself takes half a minute for some."""
        processes = [process for node in self.nodes for process in process_tree(node.pid)]
        for node in reversed(self.nodes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGTERM)
        for process in psutil.wait_procs(processes, timeout=3)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for node in self.nodes:
            node.wait(30)


@contextlib.contextmanager
def cluster(home, head="ray start --head --num-cpus 5", auth="token"):
    """Start a head node by a command of the shell, for the account whose home is given."""
    port, dashboard, client = free_ports(3)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": auth,
        "RAY_worker_niceness": "0",  # 15 would starve them on a busy machine
        "RAY_prestart_worker_first_driver": "0",  # of five, which import for seconds, one is used
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    if not head.startswith(MAKE):  # which makes it
        _make_token(home / ".ray")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        running = Cluster(
            address=f"http://127.0.0.1:{dashboard}",
            gcs=f"127.0.0.1:{port}",
            client=f"ray://127.0.0.1:{client}",
            environment=environment,
            folder=Path(folder),
            nodes=[],
        )
        flags = ["--port", str(port), "--dashboard-port", str(dashboard)]
        flags += ["--ray-client-server-port", str(client)]
        try:
            # A node must not take the address of a cluster for the one that it begins.
            running.start(head if head.startswith(MAKE) else f"env -u RAY_ADDRESS {head}", *flags)
            _wait_for_head(running)
            yield running
        finally:
            running.end()


def _make_token(folder):
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "auth_token").touch(mode=0o600)
    (folder / "auth_token").write_text(secrets.token_hex(32))


def _wait_for_head(running):
    """Wait until the dashboard knows the head node: another one could not join before."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, LookupError, TypeError):
            headers = {"Authorization": f"Bearer {running.token}"}
            request = Request(f"{running.address}/api/v0/nodes", headers=headers)
            with urlopen(request, timeout=20) as answer:
                if json.load(answer)["data"]["result"]["result"]:
                    return
        if running.nodes[0].poll() is not None:
            break
        time.sleep(0.5)
    raise TimeoutError((running.folder / "node-0.log").read_text())
