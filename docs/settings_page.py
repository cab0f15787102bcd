"""Writes docs/reference/settings.md: `python -m docs.settings_page`.

A test holds the page against the configuration, so it is written anew with every change of it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.calibrate import Request as CalibrateRequest
from data_shards.command_line.settings import Group, groups
from jobs.comparison.config import CompareConfig
from jobs.evaluation.config import EvaluationConfig
from jobs.mlflow_views import ViewsConfig
from jobs.predict import PredictConfig
from jobs.report import ReportConfig
from jobs.scheduling.config import ScheduleConfig
from model.networks.registry import FAMILIES
from pipeline.command_line.arguments import DEFAULT_PRESET
from pipeline.config import RunConfig
from pipeline.losses.registry import LOSSES
from pipeline.plan import Request as PlanRequest
from pipeline.presets.registry import run_preset

PAGE = Path(__file__).parent / "reference" / "settings.md"
_HEAD = """\
# Settings

Every flag of the entries, with its default and its meaning. `python -m docs.settings_page` writes
this page from the configuration, and a test keeps it current.

In a file for `--config` (YAML or TOML) the same settings are nested by their dots, with `_` for
`-`: `--train.global-batch 64` is `train: {global_batch: 64}`. A switch such as
`--checkpoint.evaluate` is turned off with `--checkpoint.no-evaluate`, in a file with `false`.

| `pipeline.pretrain` also takes | |
|---|---|
| `PRESET`, `--preset PRESET` | named run whose settings the others change; see `--list` |
| `--config FILE` | a file; what it leaves out is that of its preset, the command line wins |
| `--print-config` | prints the resulting settings as such a file and ends |
| `--list` | the presets, with network, parameters, input, classes, norm and data |
| `--help`, `--help-all` | the settings that people change; all of them |
"""
ENTRIES: dict[str, type] = {
    "jobs.evaluate_cra": EvaluationConfig,
    "jobs.schedule": ScheduleConfig,
    "jobs.predict": PredictConfig,
    "jobs.report": ReportConfig,
    "jobs.compare": CompareConfig,
    "jobs.mlflow_views": ViewsConfig,
}
"""Entries with settings of their own."""
ALSO = {"pipeline.plan": PlanRequest, "benchmarks.calibrate": CalibrateRequest}
"""Entries that take the settings of a run beside their own."""


def page() -> str:
    """The page."""
    # The default store is shown as it is typed: relative to where one stands.
    return "\n".join([_HEAD, *_run(), *_entries()]).replace(f"///{Path.cwd()}/", "///")


def _run() -> Iterator[str]:
    yield "## `pipeline.pretrain`"
    yield "\nNetworks and losses have settings of their own, by `model.kind` and `loss.kind`.\n"
    preset = run_preset(DEFAULT_PRESET)
    for group in groups(RunConfig, RunConfig(preset=preset.preset, model=preset.model)):
        kinds: dict[str, Any] = {"model": networks(), "loss": LOSSES}.get(group.name, {})
        for kind, configuration in kinds.items():
            (own,) = groups(configuration)
            yield from _table(f"{group.name}, kind {kind}", own, prefix=f"{group.name}.")
        if not kinds:
            yield from _table(group.name, group)


def networks() -> dict[str, type]:
    """Configuration of each family of networks."""
    return {kind: family.config for kind, family in FAMILIES.items()}


def _entries() -> Iterator[str]:
    for entry, configuration in {**ALSO, **ENTRIES}.items():
        yield f"## `{entry}`\n"
        if entry in ALSO:
            yield "Takes all settings of `pipeline.pretrain`, and these:\n"
        for group in groups(configuration):
            yield from _table(group.name, group)
    yield "`jobs.gate`, `pipeline.doctor` and those of `data_shards`: see their `--help`.\n"


def _table(title: str, group: Group, prefix: str = "") -> Iterator[str]:
    if title:
        yield f"### {title}\n"
    if group.meaning:
        yield f"{group.meaning}\n"
    yield "| setting | value | default | meaning |"
    yield "|---|---|---|---|"
    for one in group.settings:
        flag = one.flag.replace("--", f"--{prefix}", 1)
        value = one.type.replace("|", " \\| ")
        default = f"`{one.default}`" if one.default else ""
        yield f"| `{flag}` | {value} | {default} | {one.meaning.replace('|', chr(92) + '|')} |"
    yield ""


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
