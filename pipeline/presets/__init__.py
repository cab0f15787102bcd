"""Named runs as functions; the command line changes values, never structure."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from model.errors import known_names
from pipeline.config import RunConfig, replaced
from pipeline.errors import NoEffectError, PipelineError
from pipeline.losses.registry import LOSSES, another_loss, option_names, require_options
from pipeline.presets import fashion_mnist, linf, lipnext, liresnet, sll, soc
from pipeline.presets.fit_to_data import fitted

PRESETS: dict[str, Callable[[], RunConfig]] = {
    **lipnext.PRESETS,
    **soc.PRESETS,
    **sll.PRESETS,
    **linf.PRESETS,
    **liresnet.PRESETS,
    **fashion_mnist.PRESETS,
}


def run_preset(name: str) -> RunConfig:
    """Configuration of a named run.

    Raises:
        PipelineError: no preset has this name.
    """
    if name not in PRESETS:
        raise PipelineError(f"unknown preset {name!r}; {known_names(name, PRESETS)}")
    return PRESETS[name]()


DEFAULT_PRESET = "digits"
CHOICES = f"Presets: {', '.join(PRESETS)}. Losses (--loss.kind): {', '.join(LOSSES)}."
"""What the entries say of the names that a command line can hold."""
_LOSS = "loss."

Parsed = TypeVar("Parsed")


def parse_with_preset(
    arguments: Sequence[str], parse: Callable[[str, RunConfig, list[str]], Parsed]
) -> Parsed:
    """Parse a command line whose first word may be a preset, on top of that preset.

    `--data.shards` fits the network to the images (`fit_to_data`). `--loss.kind` exchanges the
    preset's loss; options that both losses have keep their values. An
    option of the preset that a flag leaves without effect goes back to its default; one that was
    given is refused.

    Args:
        arguments: the words.
        parse: (name of the preset, its settings, the other words) -> what the entry makes of them.

    Raises:
        PipelineError: unknown preset or loss, an option of another loss or one without effect. A
            bad flag or value exits with status 2 and says which.
        ShardError: there is no shard set at `--data.shards`, from which the preset takes its shape.
    """
    name, words = DEFAULT_PRESET, list(arguments)
    if words and not words[0].startswith("-"):
        name = words.pop(0)
    given = dict(_options(words))

    def on_top_of(config: RunConfig) -> Parsed:
        try:
            return parse(name, config, words)
        except NoEffectError as error:
            if error.option in given:
                raise
            settled = replaced(config, error.option, error.default)
        return on_top_of(settled)  # every turn settles one option, so this ends

    preset = _with_loss(run_preset(name), given)
    if (shards := given.get("data.shards")) and "data.unindexed_samples" not in given:
        preset = fitted(preset, shards, given)
    return on_top_of(preset)


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
