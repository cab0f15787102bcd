"""Named runs as functions, whose settings the command line changes."""

from collections.abc import Callable

from data_shards.command_line.nearest import nearest
from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.presets import fashion_mnist, linf, lipnext, liresnet, sll, soc

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
        near = nearest(name, PRESETS)
        raise PipelineError(f"unknown preset {name!r}{near}; --list shows all {len(PRESETS)}")
    return PRESETS[name]()
