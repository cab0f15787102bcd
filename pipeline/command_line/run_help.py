"""What a person reads of the settings of a run: short help, all help, the table of presets."""

import dataclasses
import math
import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from data_shards.command_line.help_page import (
    help_console,
    show_examples,
    show_groups,
    show_setting,
)
from data_shards.command_line.settings import Group, Setting, groups
from data_shards.untrusted.terminal import PlainConsole
from model.artifact.artifact import parameter_shapes
from model.networks.registry import FAMILIES
from pipeline.command_line.arguments import DEFAULT_PRESET, take_preset
from pipeline.config import RunConfig
from pipeline.losses.registry import LOSSES
from pipeline.presets.registry import PRESETS, run_preset

PROG = "python -m pipeline.pretrain"
OFTEN = (
    "data.shards",
    "data.train_split",
    "data.stream.workers",
    "train.epochs",
    "train.global_batch",
    "train.precision",
    "train.accumulation",
    "train.seed",
    "optim.lr",
    "loss.kind",
    "loss.eps",
    "model.width",
    "model.depth",
    "checkpoint.every_steps",
    "cluster.launcher",
    "cluster.workers",
    "tracking.uri",
    "storage",
    "name",
    "resume",
)
"""The settings that people change."""
EXAMPLES = {
    f"{PROG} digits": "trains and certifies the digits, in minutes on two CPU cores",
    f"{PROG} cifar10-L32W1024 --data.shards s3://bucket/cifar10 --name first": (
        "trains a published network on a shard set"
    ),
    f"{PROG} --resume --name first --extend-to-epochs 900": (
        "goes on with a run, with its own settings, to more epochs"
    ),
}
_MORE = {
    "--list": "the presets, with network, parameters, data and norm",
    "--help-all": "every setting, in groups",
    "--config FILE": "settings from a YAML or TOML file; every run writes one, config.yaml",
    "--print-config": "print the resulting settings as such a file and end",
}


def show_short_help(arguments: Sequence[str]) -> None:
    """Print the settings that people change, with the values of the preset."""
    config = _config(arguments)
    console = help_console()
    _show_head(console)
    console.print(f"\nsettings that are changed most, with those of {config.preset}", style="bold")
    known = {one.option: one for group in run_groups(config) for one in group.settings}
    for option in OFTEN:
        if option in known:  # not every network has a width and a depth
            show_setting(console, known[option])
    _show_more(console)


def show_all_help(arguments: Sequence[str]) -> None:
    """Print every setting, with the values of the preset."""
    config = _config(arguments)
    console = help_console()
    _show_head(console)
    show_groups(console, run_groups(config))
    _show_more(console)


def run_groups(config: RunConfig) -> list[Group]:
    """The settings of a run with those of a configuration as defaults."""
    return [
        dataclasses.replace(group, settings=tuple(map(_with_losses, group.settings)))
        for group in groups(RunConfig, config)
    ]


def _with_losses(one: Setting) -> Setting:
    """The type of a loss names one kind; a command line may name any."""
    return dataclasses.replace(one, type="|".join(LOSSES)) if one.option == "loss.kind" else one


def _config(arguments: Sequence[str]) -> RunConfig:
    _, preset = take_preset(arguments)
    return run_preset(DEFAULT_PRESET if preset is None else preset)


def _show_head(console: Console) -> None:
    console.print(f"usage: {PROG} [PRESET] [--setting value ...]", soft_wrap=True)
    console.print("\nTrain a network with certified radii and certify the result.")
    show_examples(console, EXAMPLES)


def _show_more(console: Console) -> None:
    console.print("\nmore", style="bold")
    for flag, meaning in _MORE.items():
        console.print(f"  {flag}", style="cyan")
        console.print(f"      {meaning}", soft_wrap=True)


PRESET_COLUMNS = ("preset", "network", "parameters", "input", "classes", "norm", "data")


def show_presets() -> None:
    """Print the presets: network, parameters, data and norm."""
    table = Table(box=None)
    for column in PRESET_COLUMNS:
        table.add_column(column, no_wrap=True, overflow="ignore")
    for name in sorted_presets():
        table.add_row(*preset_row(name))
    console = PlainConsole()
    console.print_whole(table)


def sorted_presets() -> list[str]:
    """Names of the presets, with soc-5 before soc-10."""
    return sorted(PRESETS, key=_by_numbers)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Names in the order of the numbers in them: soc-5 before soc-10."""
    parts = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def preset_row(name: str) -> tuple[str, ...]:
    """PRESET_COLUMNS of a preset."""
    config = run_preset(name)
    model = config.model
    values = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    made = config.data.source != "none"
    return (
        name,
        model.kind,
        f"{values / 1e6:,.1f} M" if values >= 1e6 else f"{values / 1e3:,.0f} k",
        "x".join(map(str, model.input_shape)),
        str(model.num_classes),
        FAMILIES[model.kind].network.norm,
        "made on first use" if made else "--data.shards",
    )
