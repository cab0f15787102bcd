"""Entry: `python -m pipeline.pretrain [PRESET] [--setting value ...]`.

Parses, prepares, launches, shows. Exit codes: 0 done, 1 failed, 2 refused before anything was
trained, 124 hung without Ray, 130 or 143 stopped (`docs/reference/exit-codes.md`).
"""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from pydantic import ValidationError
from rich.console import Console

from data_shards.command_line.parsing import as_typed, one_line, parse_words
from data_shards.command_line.settings import settings
from pipeline.command_line.arguments import DEFAULT_PRESET, parse_with_preset
from pipeline.command_line.run_help import PROG, show_all_help, show_presets, show_short_help
from pipeline.config import RunConfig
from pipeline.driver.console import lenient_console
from pipeline.driver.monitor import RunMonitor
from pipeline.driver.preflight import prepare
from pipeline.driver.session import run_session
from pipeline.errors import REFUSALS, PipelineError, ProcessDiedError, RunFailedError
from pipeline.planner.activation_checkpointing import decided
from pipeline.presets.registry import run_preset
from pipeline.resilience.oom import fit_here, fit_in_memory
from pipeline.resilience.signals import StopSignal
from pipeline.run.config_file import to_yaml
from pipeline.run.distributed import join_process_group
from pipeline.run.events import Emit, Event, Hung
from pipeline.tracking.client import import_mlflow
from pipeline.training.worker import run_rank

_SIGNALS = 128
"""Exit codes above are those of signals."""
_PRINT, _HELP = "--print-config", ("-h", "--help")


def parse(arguments: Sequence[str]) -> RunConfig:
    """Configuration from the command line.

    Raises:
        PipelineError: unknown preset or loss, or an option without effect. A bad flag or value
            exits with status 2 and says which.
    """
    return parse_with_preset(
        arguments,
        lambda name, preset, words: parse_words(RunConfig, words, default=preset, prog=PROG),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the entry; returns the exit code."""
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    stop = StopSignal()
    stop.install()
    with lenient_console() as console:
        return _main(sys.argv[1:] if arguments is None else arguments, console, stop)


def _main(arguments: Sequence[str], console: Console, stop: StopSignal) -> int:
    config = None
    try:
        if _asked(arguments):
            return 0
        config = parse([word for word in arguments if word != _PRINT])
        if _PRINT in arguments:
            sys.stdout.write(to_yaml(config))
            return 0
        _run(config, console, stop)
    except (RunFailedError, ProcessDiedError) as error:
        message = _one_message(error, config)
        _say(console, "failed", message + _way_on(config))
        return 1
    except (*REFUSALS, ValidationError) as error:
        _say(console, "refused", _one_message(error, config))
        return 2
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except SystemExit as stopped:
        if config is None:  # the parser's own
            raise
        code = _signal_status(stopped.code)
        if code == _SIGNALS + signal.SIGINT:
            console.print("interrupted")
        else:
            console.print("stopped by a signal" + _way_on(config))
        return code
    return 0


def _way_on(config: RunConfig | None) -> str:
    """What a person can do after a run that has ended early."""
    continuable = config is None or config.continuable
    return "; --resume goes on after the newest checkpoint" if continuable else ""


def _asked(arguments: Sequence[str]) -> bool:
    """Show what the command line asks to read instead of training."""
    if "--list" in arguments:
        show_presets()
    elif "--help-all" in arguments:
        show_all_help([word for word in arguments if word != "--help-all"])
    elif any(word in arguments for word in _HELP):
        show_short_help([word for word in arguments if word not in _HELP])
    else:
        return False
    return True


def _signal_status(code: object) -> int:
    """The status that a shell gives a process which a signal has ended.

    `StopSignal` exits with it. While Ray starts, its own handlers stand there: that of SIGTERM
    exits with the number of the signal, that of SIGINT with 0.
    """
    if code == signal.SIGTERM:
        return _SIGNALS + signal.SIGTERM
    return code if isinstance(code, int) and code > _SIGNALS else _SIGNALS + signal.SIGINT


def _say(console: Console, what: str, message: str) -> None:
    console.print(f"{what}:", style="bold red", end=" ")
    console.print(message, soft_wrap=True)


def _one_message(error: Exception, config: RunConfig | None) -> str:
    """The error in one line, its settings named as they are typed."""
    known = settings(RunConfig, config or run_preset(DEFAULT_PRESET))
    if isinstance(error, ValidationError):
        return one_line(error, known)
    return as_typed(str(error), known)


def _run(config: RunConfig, console: Console, stop: StopSignal) -> None:
    if config.cluster.launcher == "ray":
        _run_on_ray(config, console, stop)
    else:
        _run_here(config, console, stop)


def _run_on_ray(config: RunConfig, console: Console, stop: StopSignal) -> None:
    from pipeline.launch.ray_launcher import cluster_session, fit
    from pipeline.launch.ray_watch import watched

    with contextlib.ExitStack() as stack:
        preparing = prepare(config, world_size=config.cluster.workers, waiting=_once(console))
        with console.status("preparing"):
            prepared = stack.enter_context(preparing)
        # While Ray's processes start, of which this one waits for most.
        ahead = functools.partial(_import_ahead, prepared.tracking.uri)
        threading.Thread(target=ahead, name="mlflow-import", daemon=True).start()
        stack.enter_context(cluster_session(config.cluster))
        stop.install()  # once more: ray.init has put a handler of its own there
        servers = stack.enter_context(watched())
        with run_session(prepared, console) as monitor, stop.deferred():
            servers.on_loss = monitor.fail
            fit_in_memory(
                lambda job: fit(job, monitor.handle, stop, servers),
                monitor.stamp(prepared.job),
                stop,
            )


def _import_ahead(uri: str) -> None:
    """Import MLflow; what is wrong with it is told by whoever connects."""
    with contextlib.suppress(Exception):
        import_mlflow(uri)


def _run_here(config: RunConfig, console: Console, stop: StopSignal) -> None:
    """Train in this process, or as one of torchrun's ranks: rank 0 prepares, shows and records."""
    with join_process_group(config.cluster) as world:
        job = None
        with contextlib.ExitStack() as stack:
            emit: Emit = _ignore
            error = None
            if world.rank == 0:
                try:
                    preparing = prepare(config, world_size=world.size, waiting=_once(console))
                    prepared = stack.enter_context(preparing)
                    monitor = stack.enter_context(run_session(prepared, console))
                    job, emit = monitor.stamp(prepared.job), _last_words(monitor)
                except REFUSALS as refusal:
                    error = str(refusal)
            if told := world.share(error):  # of the settings: no rank has done anything yet
                raise PipelineError(told)
            with stop.deferred():
                shared = world.share(job)
                fit_here(
                    lambda: run_rank(shared, emit, stop, recomputing=decided), ranks=world.size
                )


def _once(console: Console) -> Callable[[str], None]:
    """Prints the first thing it is told: who holds the run that is waited for."""
    told = threading.Event()

    def show(held: str) -> None:
        if not told.is_set():
            console.print(f"{held}: waiting", soft_wrap=True)
            told.set()

    return show


def _last_words(monitor: RunMonitor) -> Emit:
    """As `RunMonitor.handle`; after a hang, which ends this process hard, the run is failed."""

    def emit(event: Event) -> None:
        monitor.handle(event)
        if isinstance(event, Hung):
            monitor.fail()

    return emit


def _ignore(event: Event) -> None:
    """Ranks other than 0 emit nothing."""


if __name__ == "__main__":
    sys.exit(main())
