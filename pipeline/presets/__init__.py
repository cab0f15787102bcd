"""Named runs as functions; the command line changes values, never structure."""

import difflib
from collections.abc import Callable

from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.presets import linf, lipnext, liresnet, sll, soc

PRESETS: dict[str, Callable[[], RunConfig]] = {
    **lipnext.PRESETS,
    **soc.PRESETS,
    **sll.PRESETS,
    **linf.PRESETS,
    **liresnet.PRESETS,
}


def run_preset(name: str) -> RunConfig:
    """Configuration of a named run.

    Raises:
        PipelineError: no preset has this name.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise PipelineError(f"unknown preset {name!r}{hint}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]()
