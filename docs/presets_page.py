"""Writes docs/reference/presets.md: `python -m docs.presets_page`.

A test holds the page against the presets, so it is written anew with every change of them.
"""

from pathlib import Path

from pipeline.command_line.run_help import PRESET_COLUMNS, preset_row, sorted_presets

PAGE = Path(__file__).parent / "reference" / "presets.md"
_HEAD = """\
# Presets

`python -m pipeline.pretrain --list` prints this table, and `python -m docs.presets_page` writes
this page from the same presets. What is made on first use needs no `--data.shards`: digits are
those of scikit-learn, synthetic images are procedural, and Fashion-MNIST is read from Debian's
package `dataset-fashion-mnist`. `--data.shards` replaces shape, classes and data of any preset;
`lipnext-S` to `-XL` also take patch, epochs and batch from the set.

`-L32W1024` is the depth and width of a LipNeXt, `-mlp` a hidden layer in the head, `linfdist` an
l-infinity-distance net; `-2_255` is the l-infinity radius, 2/255, that a published recipe trains
for. [Families](../explanation/families.md) describes the networks.
"""


def page() -> str:
    """The page."""
    rows = [preset_row(name) for name in sorted_presets()]
    lines = [PRESET_COLUMNS, ("---",) * len(PRESET_COLUMNS), *((f"`{r[0]}`", *r[1:]) for r in rows)]
    return "\n".join([_HEAD, *(f"| {' | '.join(line)} |" for line in lines), ""])


if __name__ == "__main__":
    PAGE.write_text(page())
