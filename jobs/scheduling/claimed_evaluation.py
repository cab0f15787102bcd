"""One scheduled evaluation: `python -m jobs.scheduling.claimed_evaluation --claim NAME -- ARGS`.

Keeps its claim alive while it evaluates, records only while the claim holds, and says how it ended.
The scheduler starts it; it goes on when the scheduler dies.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

import tyro

from jobs.child_processes import exit_on_sigterm
from jobs.scheduling.claims import LOST_CODE, Claims
from pipeline.run.lease import Holding, Lease


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an evaluation has to know of its schedule.

    Attributes:
        claims: URL of the folder of claims.
        claim: name of the attempt.
        lease_s: lease of a claim in seconds.
        entry: function of the evaluation, module:function.
    """

    claims: str
    claim: str
    lease_s: float
    entry: str


def command(options: Options, evaluation: Sequence[str]) -> list[str]:
    """Return the command of an evaluation, without the interpreter."""
    flags = ("--claims", options.claims, "--claim", options.claim)
    lease = ("--lease-s", repr(options.lease_s), "--entry", options.entry)
    return ["-m", "jobs.scheduling.claimed_evaluation", *flags, *lease, "--", *evaluation]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the evaluation; returns its exit code, 75 if the claim was lost."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    options = tyro.cli(Options, args=words[:split], prog="jobs.scheduling.claimed_evaluation")
    exit_on_sigterm()
    claims, claim = Claims(options.claims, lease_s=options.lease_s), Lease.parse(options.claim)
    holding = Holding(claims, claim, lost=_lost)
    code = 1
    try:
        with holding():
            code = resolve_name(options.entry)(words[split + 1 :], before_record=holding.renew)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    finally:
        claims.end(claim, code)
    return code


def _lost(why: str) -> None:
    """End at once: the thread that evaluates must not record anything any more."""
    print(f"{why}: this attempt ends without a record", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(LOST_CODE)


if __name__ == "__main__":
    sys.exit(main())
