"""What the trials of a comparison try: the same questions for every family, drawn by Optuna."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_shards.command_line.parsing import parse_words
from jobs.errors import EvaluationError
from model.networks.registry import parameter_count
from pipeline.command_line.arguments import parse_with_preset
from pipeline.config import RunConfig, replaced, value_of
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_RANGE = 4.0
"""Learning rate and inverse temperature lie within this factor of the preset's."""
_SIZES = {
    "lipnext": ("width", "depth"),
    "sll": ("dense_inner", "dense_layers"),
    "aol": ("kept_channels", "dense_layers"),
    "soc": ("width", "depth"),
    "liresnet": ("width", "depth"),
    "bronet": ("width", "depth"),
    "sortnet": ("width", "depth"),
    "groupsort": ("width", "depth"),
}
"""The two sizes of a family that are halved or doubled."""
_POOLS = ("l2", "flat")
_RANDOM_TRIALS = 4
"""Drawn at random before the tree-structured Parzen estimator has something to learn from."""
_DRAWS = 100


def preset_config(preset: str) -> RunConfig:
    """Settings of a preset and of the words that follow its name.

    Raises:
        EvaluationError: there is no such preset, or an option has no effect. A bad flag or value
            exits with status 2 and says which.
    """
    try:
        return parse_with_preset(
            shlex.split(preset),
            lambda _, default, words: parse_words(RunConfig, words, default=default, prog=preset),
        )
    except PipelineError as error:
        raise EvaluationError(f"{preset}: {error}") from error


class Search:
    """Trials of one preset; the first is the preset itself, and all follow from the scores alone.

    So a comparison that was stopped asks for the same trials again, whose runs are there.

    Args:
        config: settings of the preset.
        most_parameters: values that a network may have; None: any number.

    Raises:
        EvaluationError: Optuna is not installed.
    """

    def __init__(self, config: RunConfig, most_parameters: float | None = None) -> None:
        try:
            import optuna  # an extra: a comparison without trials does without
        except ImportError as error:
            raise EvaluationError(
                "trials need Optuna: pip install certified-pretrain[compare]"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config, self._most = config, most_parameters
        self._space = search_space(self._config)
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=_RANDOM_TRIALS)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._study.enqueue_trial({name: value_of(self._config, name) for name in self._space})

    def ask(self) -> tuple[int, dict[str, Any]]:
        """Number of the next trial, and its values by setting.

        Raises:
            EvaluationError: no values that were drawn make a network.
        """
        from optuna.trial import TrialState

        for _ in range(_DRAWS):
            trial = self._study.ask(self._space)
            if self._fits(trial.params):
                return trial.number, trial.params
            self._study.tell(trial, state=TrialState.FAIL)
        raise EvaluationError(
            f"{self._config.preset}: {_DRAWS} draws made no network that is allowed"
        )

    def tell(self, number: int, score: float) -> None:
        """Say what a trial came to; more is better, NaN counts as none."""
        from optuna.trial import TrialState

        if math.isnan(score):
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, score)

    @property
    def best(self) -> dict[str, Any]:
        """Values of the best trial so far.

        Raises:
            EvaluationError: no trial counts.
        """
        try:
            return self._study.best_params
        except ValueError as error:
            raise EvaluationError(f"{self._config.preset}: no trial held its budget") from error

    def _fits(self, values: Mapping[str, Any]) -> bool:
        config = self._config
        try:
            for name, value in values.items():
                config = replaced(config, name, value)
        except ValueError:
            return False  # such as a width that no patch fits into: another draw takes its place
        return self._most is None or parameter_count(config.model) <= self._most


def search_space(config: RunConfig) -> dict[str, BaseDistribution]:
    """Learning rate, temperature, two sizes and, where it has one, the pool, by setting."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    space: dict[str, BaseDistribution] = {}
    for name in ("optim.lr", "loss.scale"):
        middle = value_of(config, name)
        space[name] = FloatDistribution(middle / _RANGE, middle * _RANGE, log=True)
    for name in _SIZES[config.model.kind]:
        size = value_of(config, f"model.{name}")
        choices = sorted({max(1, size // 2), size, 2 * size})
        space[f"model.{name}"] = CategoricalDistribution(choices)
    if hasattr(config.model, "pool") and config.model.pool in _POOLS:
        space["model.pool"] = CategoricalDistribution(_POOLS)
    return space
