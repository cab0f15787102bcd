"""A preset takes from the shard set what its images decide, unless the command line says it.

Shape and classes come from the index; the patch follows the shape; images of different sizes are
cropped; the presets that are named by their size alone also take epochs and batch from the number
of samples.
"""

import dataclasses
import math
from collections.abc import Callable, Container
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from data_shards.command_line.parsing import one_line
from data_shards.errors import ShardError
from data_shards.format.shard_index import Header, load_header
from data_shards.storage.store import Store
from model.errors import ModelError
from model.networks.config import NetworkConfig
from pipeline.config import RunConfig, replaced, value_of
from pipeline.errors import PipelineError
from pipeline.presets.lipnext import SIZES

_EPOCHS = (20, 200)
"""Fewest and most epochs of a preset named by its size, unless its own recipe has more."""


_PATIENCE_S = 10.0
"""Of a store that does not answer: somebody waits for the command line to be read."""


def fitted(
    config: RunConfig, url: str, given: Container[str], say: Callable[[str], None]
) -> RunConfig:
    """The preset for the images of a shard set.

    Args:
        config: the preset.
        url: the shard set; only its header is read.
        given: dotted names of the options of the command line, which stay as they are there.
        say: told what is read, where that may take time.

    Raises:
        ShardError: there is no shard set, for a preset that has no shape without one.
        PipelineError: the network of the preset cannot be built for its images.
    """
    if "@" in urlsplit(url).netloc:
        return config  # which refuses credentials, and says where they go
    try:
        store = Store(url, patience_s=_PATIENCE_S)
        if store.local_path() is None:
            say(f"reading the index of {store}")
        header = load_header(store)
    except ShardError:
        if config.preset in SIZES:
            raise
        return config  # its shape is its own; the run is refused where the set is opened
    for option, value in _of_images(config, header, given).items():
        config = replaced(config, option, value)
    facts = {
        name: value
        for name, value in (
            ("input_shape", header.image_shape),
            ("num_classes", header.num_classes),
        )
        if f"model.{name}" not in given and value != getattr(config.model, name)
    }
    tried = [_with_model(config, change) for change in _with_patches(config.model, facts, given)]
    found = [fit for fit in tried if isinstance(fit, RunConfig)]
    if found:
        return found[0]
    size = "x".join(map(str, header.image_shape))
    raise PipelineError(
        f"preset {config.preset!r} does not fit the images of {url}, {size} (channels x height x "
        f"width): {tried[0]}; give another preset, such as lipnext-S, or write the set with "
        "images of another size"
    )


def _of_images(config: RunConfig, header: Header, given: Container[str]) -> dict[str, Any]:
    """Options that follow from the sizes and the number of the images."""
    found: dict[str, Any] = {}
    if header.train_shape is None:
        found["data.stream.crop"] = "random-resized"
        # Only the test split is stored at the network's size: no other one can be certified.
        found["data.train_split"] = "train"
    if config.preset in SIZES:
        split = found.get("data.train_split", config.data.train_split)
        samples = header.splits.get(split, header.splits["train"])
        found["train.global_batch"] = min(
            config.train.global_batch, 2 ** int(math.log2(max(1, samples)))
        )
        least, most = _EPOCHS[0], max(_EPOCHS[1], config.train.epochs)
        passes = SIZES[config.preset].images_seen / max(1, samples)
        found["train.epochs"] = float(min(most, max(least, round(passes))))
    return {
        option: value
        for option, value in found.items()
        if option not in given and value != value_of(config, option)
    }


def _with_patches(
    model: NetworkConfig, facts: dict[str, Any], given: Container[str]
) -> list[dict[str, Any]]:
    """The facts with each patch to try, first the one whose grid is nearest to the preset's."""
    side = getattr(model, "patch", None)
    if side is None or "input_shape" not in facts or "model.patch" in given:
        return [facts]
    shape = facts["input_shape"]
    before = model.input_shape[1] / side
    whole = math.gcd(shape[1], shape[2])
    sides = [patch for patch in range(1, whole + 1) if whole % patch == 0]
    # In a tie the finer grid: its stem needs the smaller width.
    sides.sort(key=lambda patch: (abs(math.log(shape[1] / patch / before)), patch))
    return [{**facts, "patch": patch} for patch in sides]


def _with_model(config: RunConfig, facts: dict[str, Any]) -> RunConfig | str:
    """The preset with another network, or why there is no such network."""
    try:
        return replaced(config, "model", dataclasses.replace(config.model, **facts))
    except ValidationError as error:
        return one_line(error)
    except (ModelError, PipelineError) as error:
        return str(error)
