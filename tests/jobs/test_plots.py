import dataclasses
import io
import itertools

import matplotlib.image
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.backends.backend_agg import FigureCanvasAgg

from data_shards.untrusted.terminal import PlainConsole
from jobs.evaluation.sample_records import CURVE_EPS
from jobs.figures import plot_style
from jobs.figures.plots import bounds_png, cra_png, radius_histogram_png
from model.certification.eps import eps_value
from pipeline.run.evaluation_summary import (
    AttackScores,
    ColumnScores,
    EvaluationSummary,
    LayerRow,
    report,
)

pytestmark = pytest.mark.integration

RATIOS = ("36/255", "72/255", "108/255", "255/255")
RNG = np.random.default_rng(0)
CORRECT = RNG.random(360) < 0.97
RADIUS = np.where(CORRECT, RNG.normal(0.55, 0.2, 360).clip(0), 0.1)
RADIUS = np.where(np.arange(360) < 3, 0, RADIUS.clip(1e-3))


def column(radius, program, vacuous=False):
    certified = np.where(CORRECT, radius, 0)
    counts = {ratio: int((certified > eps_value(ratio)).sum()) for ratio in RATIOS}
    return ColumnScores(
        program=program,
        lipschitz=1.0,
        unit_roundoff=0.0,
        clean=float(CORRECT.mean()),
        certified=counts,
        cra={ratio: count / 360 for ratio, count in counts.items()},
        mean_radius=float(certified.mean()),
        vacuous=vacuous,
        largest_error=0.0,
        largest_error_ball=0.0,
        curve=tuple((eps, float((certified > eps).mean())) for eps in CURVE_EPS["l2"]),
    )


def summary(depth=4, vacuous=False, attack=True):
    names = ["stem.weight", *(f"blocks.{i}.{m}" for i in range(depth) for m in "RM")]
    upper = 1 + 10.0 ** RNG.uniform(-8, -5, len(names))
    sound = column(RADIUS, "float64")
    scores = AttackScores(
        suite="strong",
        methods=("pgd", "apgd_ce"),
        steps=100,
        restarts=1,
        samples=360,
        clipped=True,
        accuracy={ratio: (value + sound.clean) / 2 for ratio, value in sound.cra.items()},
        inside_radius_samples=357,
        inside_radius_flips=0,
    )
    return EvaluationSummary(
        norm="l2",
        eval_key="k",
        artifact_url="a",
        artifact_digest="0123456789abcdef",
        shards_url="s",
        dataset="digits-test",
        index_digest="i",
        split="test",
        out_url="o",
        step=1460,
        samples=360,
        columns={
            "nominal": column(RADIUS * 1.01, "float32"),
            "sound": sound,
            "deployed": column(RADIUS * 0.7, "float32", vacuous),
        },
        per_class=(),
        orthogonality_residual=1e-7,
        network_bound=1.0000052,
        observed_lipschitz=0.91,
        layers=tuple(LayerRow(n, u, 1 - 1e-8) for n, u in zip(names, upper, strict=True)),
        attack=scores if attack else None,
        certificate_digest="d",
        family="lipnext",
    )


def with_cra(cra, accuracy):
    result = summary()
    columns = {n: dataclasses.replace(c, cra=cra) for n, c in result.columns.items()}
    attack = dataclasses.replace(result.attack, accuracy=accuracy)
    return dataclasses.replace(result, columns=columns, attack=attack)


def with_radii(*ratios):
    """A table of other radii."""
    return with_cra(dict.fromkeys(ratios, 0.9), dict.fromkeys(ratios, 0.92))


def with_little():
    """Hardly anything is proved, and hardly anything withstands the attack."""
    return with_cra(dict.fromkeys(RATIOS, 0.01), dict.fromkeys(RATIOS, 0.02))


@pytest.fixture
def drawn(monkeypatch):
    """The figures behind the PNG bytes, drawn."""
    figures = []

    def draw(figure):
        FigureCanvasAgg(figure).draw()
        figures.append(figure)
        return b""

    monkeypatch.setattr(plot_style, "png", draw)
    return figures


def words(figure):
    """Every text that is seen, with its box in pixels."""
    (axes,) = figure.axes
    (legend,) = figure.legends
    low, high = sorted(axes.get_xlim())
    ticks = [
        label
        for axis, inside in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if min(inside) <= place <= max(inside)
    ]
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks]
    texts += legend.get_texts()
    assert low < high
    return [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text().strip()]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


HISTOGRAM = {"radius": RADIUS, "correct": CORRECT}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: cra_png(summary()),
        lambda: radius_histogram_png(summary(), **HISTOGRAM),
        lambda: bounds_png(summary(depth=96)),
        *(
            pytest.param(draw, marks=pytest.mark.slow)
            for draw in (
                lambda: cra_png(summary(vacuous=True, attack=False)),
                lambda: cra_png(with_little()),
                lambda: cra_png(with_radii("1/255", "36/255")),
                lambda: radius_histogram_png(with_little(), **HISTOGRAM),
                lambda: bounds_png(summary(depth=4)),
                lambda: bounds_png(summary(depth=200)),
            )
        ),
    ],
)
def test_no_two_texts_overlap_and_all_lie_in_the_figure(drawn, draw):
    draw()
    (figure,) = drawn
    seen = words(figure)
    assert len(seen) > 10
    for (one, box), (other, second) in itertools.combinations(seen, 2):
        assert not box.overlaps(second), (one, other)
    for text, box in seen:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text


def test_columns_and_attack_are_named_and_the_band_lies_between_them(drawn):
    result = summary()
    cra_png(result)
    (figure,) = drawn
    assert legend_of(figure) == [
        "cra_nominal (float32)",
        "cra_sound (float64)",
        "cra_deployed (float32)",
        "under attack (strong)",
        "not known",
    ]
    (axes,) = figure.axes
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    sound = dict(result.columns["sound"].curve)
    # At 0.6 the proof says the curve, the attack what it reached at the last radius before.
    near = corners[np.abs(corners[:, 0] - 0.6) < 1e-3][:, 1]
    assert near.min() == pytest.approx(100 * sound[0.6], abs=0.5)
    assert near.max() == pytest.approx(100 * result.attack.accuracy["108/255"])
    texts = [text.get_text() for text in axes.texts]
    assert "not known" in texts
    for ratio in RATIOS:
        assert f"{ratio}\n{100 * result.columns['sound'].cra[ratio]:.1f} %" in texts
        assert f"{100 * result.attack.accuracy[ratio]:.1f} %" in texts


def test_a_vacuous_column_is_a_word_and_no_curve(drawn):
    cra_png(summary())
    cra_png(summary(vacuous=True))
    with_curve, without = drawn
    assert "cra_deployed (float32): vacuous" in legend_of(without)

    def points(figure):
        return sum(len(line.get_xdata()) for line in figure.axes[0].lines)

    assert points(with_curve) - points(without) == len(CURVE_EPS["l2"])


def test_the_histogram_counts_every_sample_once(drawn):
    radius = RADIUS.copy()
    radius[5] = np.inf
    radius_histogram_png(summary(), radius=radius, correct=CORRECT)
    (figure,) = drawn
    assert legend_of(figure) == [
        f"correct prediction: {CORRECT.sum()}",
        f"wrong prediction: {(~CORRECT).sum()}",
        "radius 0: 3",
        "infinite radius: 1",
    ]
    heights = sum(patch.get_height() for patch in figure.axes[0].patches)
    assert heights == 359


def test_bounds_are_drawn_at_their_values_in_the_order_of_the_layers(drawn):
    result = summary(depth=2)
    rows = (*result.layers[:-1], LayerRow("head", 0.25, 0.25))
    bounds_png(dataclasses.replace(result, layers=rows))
    (figure,) = drawn
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.name for row in rows]
    assert axes.yaxis_inverted()
    assert "distance of the proved norm from 1" in axes.get_xlabel()  # what the axis says
    assert "a perfectly orthogonal matrix has norm 1" in axes.get_xlabel()
    above, below, gap = axes.collections[1:]
    np.testing.assert_allclose(above.get_offsets()[:, 0], [row.upper - 1 for row in rows[:-1]])
    np.testing.assert_allclose(below.get_offsets()[:, 0], 0.75)
    np.testing.assert_allclose(
        gap.get_offsets()[:, 0], [max(row.upper - row.lower, 1e-17) for row in rows]
    )
    assert "1 - proved bound" in legend_of(figure)
    low, high = axes.get_xlim()
    assert low < 1e-17
    assert high >= 1


def test_the_files_are_pngs_of_the_stated_size_without_pyplot():
    result = summary()
    pngs = [cra_png(result), radius_histogram_png(result, **HISTOGRAM), bounds_png(result)]
    shapes = [matplotlib.image.imread(io.BytesIO(png)).shape for png in pngs]
    assert [shape[:2] for shape in shapes[:2]] == [(700, 1120), (700, 1120)]
    assert shapes[2][1] == 1120
    assert all(10_000 < len(png) < 200_000 for png in pngs)
    assert not Gcf.figs


@pytest.mark.parametrize(
    ("family", "offered"), [("lipnext", True), ("soc", True), ("other", False)]
)
def test_only_a_network_that_the_verifier_knows_is_offered_for_a_check(family, offered):
    told = io.StringIO()
    report(PlainConsole(file=told), [dataclasses.replace(summary(), family=family)])
    assert ("python -m model.verify" in told.getvalue()) == offered
