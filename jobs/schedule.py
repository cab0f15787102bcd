"""Scheduled evaluation: `python -m jobs.schedule --rules SUITE@WHEN ... [--once | --status]`.

Watches the checkpoints of an MLflow store and has each evaluated once by each suite, however many
schedulers run and however often they are killed (`jobs.scheduling.claims`). Each poll considers
every checkpoint, so what came while no scheduler ran is caught up by the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger
from pydantic import ValidationError
from rich.console import Console

from data_shards.command_line.parsing import parse_words
from data_shards.command_line.progress import ProgressBar
from data_shards.untrusted.json_input import parse_object
from data_shards.untrusted.terminal import PlainConsole
from jobs.child_processes import exit_on_sigterm
from jobs.errors import EvaluationError
from jobs.scheduling.backlog import Backlog, BacklogEntry
from jobs.scheduling.claimed_evaluation import Options, command
from jobs.scheduling.claims import ClaimPhase, Claims
from jobs.scheduling.config import ScheduleConfig, arguments, log_folder
from jobs.scheduling.launchers import Processes, RayJobs, Submitter
from jobs.scheduling.status_page import page
from pipeline.run.lease import Lease, LeaseError
from pipeline.run.server_exposure import ExposureError, require_closed
from pipeline.tracking.checkpoint_query import CheckpointQuery

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
_INTERVAL = re.compile(r"(\d+)([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_TICK_S = 1.0


def trigger(when: str, config: ScheduleConfig) -> Any:
    """Return the trigger of a rule.

    Raises:
        EvaluationError: it is neither `checkpoint`, nor an interval, nor a cron expression.
    """
    if when == CHECKPOINT:
        return IntervalTrigger(seconds=config.poll_s)
    if match := _INTERVAL.fullmatch(when):
        return IntervalTrigger(**{_UNITS[match[2]]: int(match[1])})
    try:
        return CronTrigger.from_crontab(when, timezone=config.timezone)
    except (ValueError, KeyError) as error:
        raise EvaluationError(
            f"rule time {when!r} is neither `checkpoint`, nor an interval such as 30m, nor a cron "
            f"expression such as '0 3 * * *' in the time zone {config.timezone!r}: {error}"
        ) from error


def rules_by_time(config: ScheduleConfig) -> dict[str, list[str]]:
    """Return the suites by the time at which they are due."""
    found: dict[str, list[str]] = {}
    for rule in config.rules:
        suite, _, when = rule.partition("@")
        found.setdefault(when.strip() or CHECKPOINT, []).append(suite)
    return found


class Scheduler:
    """Looks for open evaluations, claims and starts them, and sees to it that they end.

    Args:
        config: the schedule.
        claims: the shared folder.
        backlog: what is to be evaluated.
        submitter: where evaluations run.
    """

    def __init__(
        self, config: ScheduleConfig, claims: Claims, backlog: Backlog, submitter: Submitter
    ) -> None:
        self._config = config
        self._claims = claims
        self._backlog = backlog
        self._submitter = submitter
        self._open: dict[tuple[str, str], BacklogEntry] = {}
        self._running: dict[Lease, BacklogEntry] = {}
        self._beaten: dict[Lease, float] = {}
        self._told: set[tuple[str, str]] = set()
        self.failures = 0

    @property
    def waiting(self) -> int:
        """Evaluations that are under way or wait for their turn."""
        return len(self._open) + len(self._running)

    def look(self, suites: Sequence[str]) -> None:
        """Queue what is open; a store that does not answer is asked again the next time."""
        try:
            entries = self._backlog.look(suites)
        except Exception as error:  # the scheduler outlives whatever MLflow or the store raise
            logger.warning("cannot look for checkpoints: %s: %s", type(error).__name__, error)
            return
        for entry in entries:
            name = (entry.checkpoint.model_id, entry.suite)
            self._open.pop(name, None)
            if entry.phase is ClaimPhase.OPEN:
                self._open[name] = entry
            elif entry.phase is ClaimPhase.FAILED and name not in self._told:
                self._told.add(name)
                logger.warning("%s: %s", entry.checkpoint.artifact_url, entry.note)

    def tick(self) -> None:
        """See what has ended, keep the rest alive, start what is next."""
        try:
            self._supervise()
            while self._open and len(self._running) < self._config.parallel:
                self._start(self._open.pop(next(iter(self._open))))
        except OSError as error:
            logger.warning("%s: %s", self._claims.store, error)

    def close(self) -> None:
        """Stop what cannot go on without this process, and say so at once."""
        self._submitter.close()
        self._supervise()

    def _supervise(self) -> None:
        for claim in list(self._running):
            code = self._submitter.ended(claim)
            if code is None:
                self._keep(claim)
                continue
            entry = self._running.pop(claim)
            self._claims.end(claim, code)  # if it could not do so itself
            self.failures += code != 0
            say = logger.info if code == 0 else logger.warning
            say("%s ended with exit code %d", _describe(entry), code)

    def _keep(self, claim: Lease) -> None:
        """A process that is being started cannot renew its claim itself."""
        now = time.monotonic()
        if now - self._beaten.get(claim, 0.0) >= self._config.lease_s / 4:
            self._claims.beat(claim)
            self._beaten[claim] = now

    def _start(self, entry: BacklogEntry) -> None:
        claim, checkpoint = entry.next, entry.checkpoint
        facts = {
            "suite": entry.suite,
            "run": checkpoint.run_name,
            "step": str(checkpoint.step),
            "artifact": checkpoint.artifact_url,
        }
        if entry.config is None or not self._claims.take(claim, facts):
            return  # another scheduler was faster
        options = Options(
            claims=self._config.claims_url,
            claim=claim.name,
            lease_s=self._config.lease_s,
            entry=self._config.entry,
        )
        try:
            log = self._submitter.submit(claim, command(options, arguments(entry.config)), facts)
        except (OSError, RuntimeError) as error:
            self._claims.end(claim, 1)
            self.failures += 1
            logger.warning("%s could not be started: %s", _describe(entry), error)
            return
        self._running[claim] = entry
        logger.info("%s: attempt %s, log: %s", _describe(entry), claim.name, log)


def _describe(entry: BacklogEntry) -> str:
    return f"{entry.suite} of {entry.checkpoint.run_name} step {entry.checkpoint.step}"


def run_once(scheduler: Scheduler, config: ScheduleConfig) -> int:
    """Evaluate all that is open now; returns 1 if an evaluation failed."""
    scheduler.look(config.suites)
    total = scheduler.waiting
    with ProgressBar("evaluating checkpoints", total, unit="evaluations") as bar:
        while True:
            scheduler.tick()
            if not scheduler.waiting:
                return 1 if scheduler.failures else 0
            bar.reach(total - scheduler.waiting, total)
            time.sleep(_TICK_S)


def run_forever(scheduler: Scheduler, config: ScheduleConfig, claims: Claims) -> None:
    """Apply the rules until the process is asked to stop."""
    clock = BlockingScheduler(
        # One thread: the scheduler is never in two places at once.
        executors={"default": ThreadPoolExecutor(1)},
        job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1},
        timezone=config.timezone,
    )
    for when, suites in rules_by_time(config).items():
        due = _due_now(when, config, claims)
        first = {"next_run_time": datetime.now(timezone.utc)} if due else {}
        clock.add_job(
            _apply, trigger(when, config), args=(scheduler, claims, when, suites), **first
        )
    clock.add_job(scheduler.tick, IntervalTrigger(seconds=_TICK_S))
    try:
        clock.start()
    finally:
        if clock.running:
            clock.shutdown(wait=True)


def _apply(scheduler: Scheduler, claims: Claims, when: str, suites: Sequence[str]) -> None:
    scheduler.look(suites)
    if when != CHECKPOINT:
        claims.store.write(_mark(when), json.dumps({"when": when, "at": time.time()}).encode())


def _due_now(when: str, config: ScheduleConfig, claims: Claims) -> bool:
    """Whether a time has passed while no scheduler ran."""
    if when == CHECKPOINT:
        return True
    if not claims.store.exists(_mark(when)):
        return _INTERVAL.fullmatch(when) is not None
    try:
        mark = claims.store.read_object(_mark(when))
        last = datetime.fromtimestamp(mark["at"], timezone.utc)
        due = trigger(when, config).get_next_fire_time(last, last)
        if due is None:
            raise ValueError(f"the rule has no time after {last}")
    except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
        logger.warning("%s/%s: %s; the rule is applied now", claims.store, _mark(when), error)
        return True
    return bool(due <= datetime.now(timezone.utc))


def _mark(when: str) -> str:
    return f"rule.{hashlib.sha256(when.encode()).hexdigest()[:8]}"


def _watched(config: ScheduleConfig) -> tuple[str, ...]:
    """Names of the experiments whose checkpoints are evaluated; none: all."""
    return (config.tracking.experiment,) if config.tracking.experiment else ()


def _run(config: ScheduleConfig, console: Console) -> int:
    for when in rules_by_time(config):
        trigger(when, config)
    require_closed(ray=config.address, mlflow=config.tracking.uri)
    claims = Claims(config.claims_url, lease_s=config.lease_s, attempts=config.attempts)
    watch = CheckpointQuery(config.tracking.uri, _watched(config), config.models)
    backlog = Backlog(config, claims, watch)
    if config.status:
        page(console, config, claims, backlog.look(config.suites))
        return 0
    claims.require_exclusive()
    submitter: Submitter = Processes(log_folder())
    if config.address:
        submitter = RayJobs(config.address, parse_object(config.runtime_env, "runtime_env"))
    scheduler = Scheduler(config, claims, backlog, submitter)
    try:
        if config.once:
            return run_once(scheduler, config)
        run_forever(scheduler, config, claims)
        return 0
    finally:
        scheduler.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the scheduler; returns 0, 1 after a failed evaluation, 2 for bad input, 130 or 143."""
    console = PlainConsole()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    exit_on_sigterm()
    try:
        return _run(parse_words(ScheduleConfig, argv, prog="python -m jobs.schedule"), console)
    except (EvaluationError, LeaseError, ExposureError, ValidationError, ConnectionError) as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


if __name__ == "__main__":
    sys.exit(main())
