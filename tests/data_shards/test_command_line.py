"""Refusals of a command line are one line that names what was typed; settings are read from it."""

from typing import Annotated, Literal

import pydantic
import pytest
import tyro

from data_shards.command_line.nearest import nearest
from data_shards.command_line.parsing import as_typed, parse_subcommand, parse_words
from data_shards.command_line.settings import settings

STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Loop:
    """The loop."""

    batch_size: int = pydantic.Field(default=4, ge=1)
    """Images of a step; a number that is
    long to explain."""
    rate: float = 0.5
    """Learning rate."""
    order: Literal["random", "fixed"] = "random"
    """Order of the samples."""

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise ValueError(f"rate={self.rate} exceeds batch_size={self.batch_size}, order=fixed")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Job:
    """A job."""

    model: tyro.conf.Positional[str]
    """The model."""
    shards: Annotated[str | None, tyro.conf.arg(name="data.shards")] = None
    """URL."""
    resume: bool = False
    """Go on."""
    loop: Loop = Loop()
    """How it trains."""


def parse(*words):
    return parse_words(Job, ["m", *words], prog="job")


def refused(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        parse(*words)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not {"pydantic", "Input should", "http"} & set(line.split())
    return line


def test_settings_are_parsed_and_listed():
    found = parse("--data.shards", "x", "--loop.batch-size", "3", "--resume")
    assert (found.model, found.shards, found.loop.batch_size, found.resume) == ("m", "x", 3, True)
    listed = {one.option: one for one in settings(Job)}
    assert listed["model"].flag == "model"
    assert listed["shards"].flag == "--data.shards"
    assert listed["loop.batch_size"].synopsis == "--loop.batch-size INT"
    assert (
        listed["loop.batch_size"].meaning == "Images of a step; a number that is long to explain."
    )
    assert listed["loop.order"].type == "random|fixed"
    assert listed["resume"].synopsis == "--resume, --no-resume"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--loop.batchsize", "3"], "there is no --loop.batchsize (nearest: --loop.batch-size"),
        (["--shards", "3"], "there is no --shards (nearest: --data.shards"),
        (["--loop.rate", "much"], "--loop.rate: could not convert string to float: 'much'"),
        (["--loop.rate"], "--loop.rate needs FLOAT"),
        (["--loop.batch-size", "0"], "--loop.batch-size 0: must be greater than or equal to 1"),
        (["--loop.rate", "inf"], "--loop.rate inf: must be a finite number"),
        (["--loop.order", "x"], "--loop.order x: must be one of random, fixed"),
        (
            ["--loop.rate", "2"],
            "--loop.rate 2.0 exceeds --loop.batch-size 4, --loop.order fixed",
        ),
    ],
)
def test_a_refusal_names_flag_and_value_as_typed(capsys, words, line):
    assert refused(capsys, *words).startswith(f"refused: {line}")


def test_what_is_missing_or_no_subcommand_is_said(capsys):
    with pytest.raises(SystemExit):
        parse_words(Job, [], prog="job")
    assert capsys.readouterr().err == "refused: model must be given (job --help)\n"
    acts = {"write": lambda: None, "verify": lambda: None}
    with pytest.raises(SystemExit):
        parse_subcommand(acts, ["wriet"], prog="job")
    assert capsys.readouterr().err == (
        "refused: there is no 'wriet' (nearest: write); "
        "the first word must be one of write, verify\n"
    )


def test_names_in_a_message_become_flags_and_nothing_else_does():
    known = settings(Job)
    text = "loop.rate=1 needs loop.order=fixed, resume=False; my_loop.rate=3 and order stay"
    assert as_typed(text, known) == (
        "--loop.rate 1 needs --loop.order fixed, --no-resume; my_loop.rate=3 and order stay"
    )


def test_the_nearest_names_are_at_most_three_and_none_for_nonsense():
    known = [f"--train.{name}" for name in ("epochs", "epoch-x", "epoch-y", "epoch-z", "lr")]
    assert nearest("--train.epoch", known).count("--train.epoch") == 3
    assert nearest("--zzzz", known) == ""


def test_help_shows_defaults_and_whole_sentences(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "--loop.batch-size INT  [4]" in text
    assert "Images of a step; a number that is long to explain." in text
