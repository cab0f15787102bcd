"""From words to the settings of a run: a preset, a file or an existing run, and flags on top."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_shards.command_line.parsing import one_line
from data_shards.command_line.settings import settings
from data_shards.errors import ShardError
from data_shards.storage.store import Store
from data_shards.untrusted.terminal import PlainConsole
from pipeline.config import RunConfig, replaced
from pipeline.errors import NoEffectError, PipelineError
from pipeline.losses.registry import LOSSES, another_loss, option_names, require_options
from pipeline.presets.fit_to_data import fitted
from pipeline.presets.registry import run_preset
from pipeline.run import layout
from pipeline.run.config_file import newest_run, read_file, stored_config
from pipeline.run.ray_job import default_storage

DEFAULT_PRESET = "digits"
CONFIG = "--config"
_PRESET = "--preset"
_LOSS = "loss."
_KINDS = ("model", "loss")
"""Parts whose fields depend on their `kind`."""

Parsed = TypeVar("Parsed")


def parse_with_preset(
    arguments: Sequence[str], parse: Callable[[str, RunConfig, list[str]], Parsed]
) -> Parsed:
    """Parse a command line on top of a preset, a file (`--config`) or an existing run (`--resume`).

    The preset is the first word or `--preset`; `--data.shards` fits its network to the images
    (`pipeline.presets.fit_to_data`). `--loss.kind` exchanges the loss; options that both
    losses have keep their values. An option below the command line that a flag leaves without
    effect goes back to its default; one that was given is refused.

    Args:
        arguments: the words.
        parse: (name of the preset, settings, the other words) -> what the entry makes of them.

    Raises:
        PipelineError: unknown preset or loss, a file or run that cannot be used, an option of
            another loss.
        ShardError: there is no shard set at `--data.shards`, from which a preset takes its shape.
        NoEffectError: an option without effect.
        SystemExit: with status 2, after one line on a flag or a value that cannot be used.
    """
    words, preset = take_preset(arguments)
    words, place = take_value(words, CONFIG)
    given = dict(_options(words))
    base = _base(preset, place, words, given)

    def on_top_of(config: RunConfig) -> Parsed:
        try:
            return parse(config.preset, config, words)
        except NoEffectError as error:
            if error.option in given:
                raise
            settled = replaced(config, error.option, error.default)
        return on_top_of(settled)  # every turn settles one option, so this ends

    return on_top_of(_with_loss(base, given))


def take_preset(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The other words, and the preset that the first word or `--preset` names.

    Raises:
        PipelineError: they name two.
    """
    words = list(arguments)
    first = words.pop(0) if words and not words[0].startswith("-") else None
    words, flag = take_value(words, _PRESET)
    if first is not None and flag not in (None, first):
        raise PipelineError(f"{_PRESET} {flag}: the first word names the preset {first!r}")
    return words, first if flag is None else flag


def take_value(words: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """The other words, and the value of a flag; of several the last.

    Raises:
        PipelineError: the flag has none.
    """
    rest, value, left = [], None, iter(words)
    for word in left:
        name, equals, after = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        value = after if equals else next(left, "")
        if not value or (not equals and value.startswith("--")):
            raise PipelineError(f"{flag} needs a value")
    return rest, value


def _base(
    preset: str | None, place: str | None, words: Sequence[str], given: Mapping[str, str]
) -> RunConfig:
    """The settings below those of the command line."""
    if place is not None:
        return _of_file(place, preset)
    if "--resume" in words:
        return _of_run(preset, given)
    found = run_preset(DEFAULT_PRESET if preset is None else preset)
    shards = given.get("data.shards")
    if not shards or "data.unindexed_samples" in given:
        return found
    return fitted(found, shards, given, PlainConsole(stderr=True, soft_wrap=True).print)


def _of_run(preset: str | None, given: Mapping[str, str]) -> RunConfig:
    """The settings of the run that is to be continued.

    Raises:
        PipelineError: there is none, or it is of another preset.
    """
    storage = Store(given.get("storage") or default_storage())
    try:
        name = given.get("name") or newest_run(storage, preset)
        run = storage.child(name)
        if not run.exists(layout.CONFIG):
            raise PipelineError(f"--resume: there is no run {run.url}")
        stored = stored_config(run)
    except (OSError, ShardError) as error:
        raise PipelineError(f"--resume: {type(error).__name__}: {error}") from error
    if preset not in (None, stored.preset):
        raise PipelineError(f"preset {preset!r}: run {name} is of preset {stored.preset!r}")
    return dataclasses.replace(
        stored,
        name=name,
        storage=given.get("storage", ""),
        train=dataclasses.replace(stored.train, stop_after=0),  # of one execution
        profile=0,
        resume=True,
        start_or_resume=False,
        wait_for_lease=False,
        accept_changes=False,
        extend_to_epochs=0,
    )


def _of_file(place: str, preset: str | None) -> RunConfig:
    """The settings of a file; what it leaves out is that of its preset.

    Raises:
        PipelineError: it cannot be used; the message names the place and the setting.
    """
    body = read_file(place)
    named = body.get("preset", preset or DEFAULT_PRESET)
    if preset not in (None, named):
        raise PipelineError(f"preset {preset!r}: {place} is of preset {named!r}")
    below = run_preset(str(named))
    adapter = TypeAdapter(RunConfig)
    try:
        return adapter.validate_python(_merged(adapter.dump_python(below, mode="json"), body))
    except ValidationError as error:
        raise PipelineError(f"{place}: {one_line(error, settings(RunConfig, below))}") from error
    except NoEffectError as error:
        raise PipelineError(f"{place}: {error}") from error


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, the second ones winning; of another kind of part nothing stays."""
    merged = dict(below)
    for name, value in above.items():
        old = below.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            another = name in _KINDS and value.get("kind", old["kind"]) != old["kind"]
            value = value if another else _merged(old, value)
        merged[name] = value
    return merged


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Dotted names of the options that a command line gives, with the word after each."""
    for word, after in itertools.pairwise([*words, ""]):
        if word.startswith("--"):
            flag, equals, value = word.removeprefix("--").partition("=")
            path, dot, name = flag.replace("-", "_").rpartition(".")
            yield path + dot + name.removeprefix("no_"), value if equals else after


def _with_loss(config: RunConfig, given: dict[str, str]) -> RunConfig:
    """The preset with the loss that is asked for, whose options have to be its own."""
    kind = given.get("loss.kind", config.loss.kind)
    loss = config.loss if kind == config.loss.kind else another_loss(config.loss, kind)
    # A name that no loss has is left to the parser, which suggests the one that was meant.
    known = {name for one in LOSSES.values() for name in option_names(one)}
    asked = (name.removeprefix(_LOSS) for name in given if name.startswith(_LOSS))
    require_options(kind, [name for name in asked if name in known])
    return replaced(config, "loss", loss)
