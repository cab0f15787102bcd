"""Where scheduled evaluations run: processes of this machine, or jobs of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jobs.child_processes import end_processes
from jobs.evaluation.executor import job_client
from pipeline.run.lease import Lease
from pipeline.run.server_exposure import require_closed

logger = logging.getLogger(__name__)

KILLED_CODE = 137
"""Exit code of what ended without saying how."""
_GRACE_S = 20.0


class Submitter(Protocol):
    """Starts evaluations and tells when they have ended."""

    def submit(self, claim: Lease, words: Sequence[str], metadata: Mapping[str, str]) -> str:
        """Start `python WORDS` for an attempt; returns where its output is to be found.

        Raises:
            OSError, RuntimeError: it could not be started.
        """
        ...

    def ended(self, claim: Lease) -> int | None:
        """Exit code of an attempt, None while it runs."""
        ...

    def close(self) -> None:
        """The scheduler ends: stop what cannot go on without it."""
        ...


class Processes:
    """Evaluations as processes of this machine; they outlive a scheduler that is killed.

    Args:
        logs: folder of their output.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[Lease, subprocess.Popen[bytes]] = {}

    def submit(self, claim: Lease, words: Sequence[str], metadata: Mapping[str, str]) -> str:
        """See Submitter."""
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{claim.name}.log"
        with log.open("ab") as output:
            self._running[claim] = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return str(log)

    def ended(self, claim: Lease) -> int | None:
        """See Submitter."""
        code = self._running[claim].poll()
        return code if code is None or code >= 0 else 128 - code

    def close(self) -> None:
        """Ask the processes to stop and wait for them; others may then claim their work."""
        end_processes(self._running.values(), _GRACE_S)


class RayJobs:
    """Evaluations as jobs of a Ray cluster; they go on when the scheduler ends.

    Args:
        address: http(s) address of the cluster's dashboard.
        runtime_env: runtime environment of the jobs.

    Raises:
        ConnectionError: no cluster answers there.
        ExposureError: it runs the code of whoever reaches it.
    """

    def __init__(self, address: str, runtime_env: Mapping[str, Any]) -> None:
        require_closed(ray=address)
        self._client = job_client(address)
        self._address = address
        self._runtime_env = dict(runtime_env)

    def submit(self, claim: Lease, words: Sequence[str], metadata: Mapping[str, str]) -> str:
        """See Submitter. The cluster refuses a second job of the same attempt."""
        self._client.submit_job(
            entrypoint=f"python {shlex.join(words)}",
            submission_id=submission_id(claim),
            runtime_env=self._runtime_env,
            metadata={**metadata, "user": _user()},
        )
        return f"ray job logs --address {self._address} {submission_id(claim)}"

    def ended(self, claim: Lease) -> int | None:
        """See Submitter."""
        try:
            info = self._client.get_job_info(submission_id(claim))
        except OSError as error:  # it may answer again
            logger.warning("%s: %s", self._address, error)
            return None
        except RuntimeError as error:  # it has forgotten the job
            logger.warning("%s: %s", submission_id(claim), error)
            return KILLED_CODE
        if not info.status.is_terminal():
            return None
        if info.status == "SUCCEEDED":
            return 0
        if info.status == "STOPPED":
            return 143
        code = info.driver_exit_code
        return KILLED_CODE if code is None or code < 0 else int(code)

    def close(self) -> None:
        """See Submitter."""


def submission_id(claim: Lease) -> str:
    """Name of the Ray job of an attempt."""
    return f"cra-{claim.name.replace('.', '-')}"


def _user() -> str:
    with contextlib.suppress(KeyError):
        return os.environ["USER"]
    return str(os.getuid())
