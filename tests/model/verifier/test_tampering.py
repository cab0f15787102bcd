"""Forged certificates of several families, every digest recomputed: each is refused."""

import copy
import io
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from model.networks.registry import build_network
from model.verifier.certificate import FIELDS
from model.verify import main
from tests.model.certificate_maker import CONFIRMED, DISAGREES, UNUSABLE, Case
from tests.model.verifier.honest import on_disk
from tests.model.verifier.networks import parsed
from tests.repetitions import mostly_slow

pytestmark = pytest.mark.integration

SMALL = {"input_shape": [3, 8, 8], "num_classes": 3}
NETWORKS = {
    "lipnext": {"kind": "lipnext", "patch": 2, "width": 16, "depth": 2, "alpha": 0.125},
    "soc": {
        **{"kind": "soc", "depth": 2, "stages": 2, "width": 4, "head": "mlp", "hidden": 8},
        **{"activation": "householder", "pooling": "projection"},
    },
    "sortnet": {"kind": "sortnet", "width": 12, "depth": 2, "keep": 0.3, "hidden": 8},
}
WEIGHT = {
    "lipnext": "head.weight",
    "soc": "blocks.0.convolution.bias",
    "sortnet": "head.inner",
}


@pytest.fixture(scope="module", params=mostly_slow(NETWORKS, ["lipnext"]))
def untouched(request, tmp_path_factory) -> Case:
    config = parsed(**SMALL, **NETWORKS[request.param])
    network = build_network(config).float().eval()
    network.initialise(0)
    generator = torch.Generator().manual_seed(0)
    network.calibrate([torch.rand(8, *config.input_shape, generator=generator)])
    return on_disk(config, network, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def case(untouched, tmp_path) -> Case:
    return untouched.copy(tmp_path / "case")


def field(*path, to):
    """Change one field of certificate.json; `to` is its new value or makes it of the old one."""

    def tamper(case: Case) -> None:
        body = copy.deepcopy(case.body())
        inner = body
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to(inner[path[-1]]) if callable(to) else to
        case.seal(body)

    return tamper


def added(*path, name, value=1.0):
    """A field that certificate.json does not have."""
    return field(*path, to=lambda part: {**part, name: value})


def column(name, change):
    """Change one column of samples.parquet, with the table that follows from it."""

    def tamper(case: Case) -> None:
        columns = case.samples()
        columns[name] = change(columns)
        case.forge(columns)

    return tamper


def one(name, change):
    """Change the first value of a column."""
    return column(name, lambda columns: [change(columns[name][0]), *columns[name][1:]])


def rows(order):
    def tamper(case: Case) -> None:
        columns = case.samples()
        chosen = order(range(len(columns["key"])))
        case.forge({name: [values[i] for i in chosen] for name, values in columns.items()})
        field("shards", "samples", to=len(chosen))(case)

    return tamper


def brighter(case: Case) -> None:
    """Another image in the tar, with all digests of the shard set."""
    columns = case.samples()
    extension = pq.read_table(case.shards / "index.parquet")["extension"].to_pylist()[-1]

    def change(data: bytes) -> bytes:
        pixels = np.array(Image.open(io.BytesIO(data)))
        pixels[0, 0] ^= 128
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format="PNG")
        return out.getvalue()

    case.rewrite_member(columns["shard"][0], f"{columns['key'][0]}.{extension}", change)
    case.seal_shards()


def relabelled(case: Case) -> None:
    """Another label in certificate and index, not in the tar."""
    columns = case.samples()
    wrong = (columns["label"][0] + 1) % 3
    table = pq.read_table(case.shards / "index.parquet")
    keys, labels = table["key"].to_pylist(), table["label"].to_pylist()
    labels[keys.index(columns["key"][0])] = wrong
    case.rewrite_rows(label=labels)
    case.seal_shards()
    case.forge({**columns, "label": [wrong, *columns["label"][1:]]})


def other_weight(case: Case) -> None:
    """One weight that no norm depends on alone, with every digest of the model."""
    case.rewrite_weight(WEIGHT[case.body()["model"]["network"]["kind"]])


def repeated_key(case: Case) -> None:
    path = case.certificate / "certificate.json"
    path.write_text(path.read_text().replace("{", '{"eps": [], ', 1))


def larger(share):
    return lambda value: value * (1 + share) + 1e-12


TAMPERED = {
    # What is claimed
    "norm": field("norm", to=lambda norm: "l2" if norm == "linf" else "linf"),
    "pixel unit": field("pixel_unit", to="[0, 255]"),
    "perturbation": field("perturbation", to="images only"),
    "shape of the images": field("native_shape", to=[3, 16, 16]),
    "older schema": field("schema", to="certified-radius/1"),
    "no slack": field("slack", to=0.0),
    "eps that the table lacks": field("eps", to=lambda eps: [*eps, "7/255"]),
    "eps dropped": field("eps", to=lambda eps: eps[1:]),
    "unknown field": field("columns", to=lambda columns: {**columns, "attacked": {}}),
    "a field twice": repeated_key,
    # Bounds
    "part lowered": field("parts", to=lambda parts: {n: v * (1 - 1e-6) for n, v in parts.items()}),
    "part added": added("parts", name="blocks.99"),
    "bound lowered": field("network_bound", to=larger(-1e-6)),
    "bound raised": field("network_bound", to=larger(1e-6)),
    "bound infinite": field("network_bound", to=None),
    "head of another kind": field("head", "kind", to="free"),
    "factor lowered": field("head", "largest_factor", to=larger(-1e-6)),
    "layer added": field("layers", to=lambda layers: [*layers, {"name": "x"}]),
    "observed nothing": field("observed_lipschitz", to=0.0),
    "observed less than nothing": field("observed_lipschitz", to=-1.0),
    "observed more than the bound": field("observed_lipschitz", to=1e9),
    # The table
    "program of a column": field("columns", "deployed", "program", to="float64"),
    "unit roundoff": field("columns", "deployed", "unit_roundoff", to=2.0**-53),
    "constant of a column": field("columns", "sound", "lipschitz", to=larger(-1e-6)),
    "clean": field("columns", "sound", "clean", to=larger(1e-6)),
    "certified": field(
        "columns", "sound", "certified", to=lambda found: {eps: n + 1 for eps, n in found.items()}
    ),
    "cra": field("columns", "sound", "cra", to=lambda found: dict.fromkeys(found, 1.0)),
    "mean radius": field("columns", "sound", "mean_radius", to=larger(1e-9)),
    "vacuous": field("columns", "sound", "vacuous", to=lambda vacuous: not vacuous),
    "error lowered": field("columns", "sound", "largest_error", to=larger(-0.01)),
    "error raised": field("columns", "sound", "largest_error", to=larger(0.01)),
    "error of the ball lowered": field("columns", "deployed", "largest_error_ball", to=0.0),
    "error of the ball raised": field("columns", "deployed", "largest_error_ball", to=1e6),
    "error infinite": field("columns", "sound", "largest_error", to=None),
    "field of a column": added("columns", "deployed", name="robust"),
    # The samples
    "sound radius a little larger": column(
        "sound_radius", lambda c: [r * (1 + 1e-6) + 1e-9 for r in c["sound_radius"]]
    ),
    "all sound radii large": column("sound_radius", lambda c: [0.499] * len(c["key"])),
    "all deployed radii large": column("deployed_radius", lambda c: [9.0] * len(c["key"])),
    "radius infinite": one("sound_radius", lambda _: math.inf),
    "radius not a number": one("deployed_radius", lambda _: math.nan),
    "radius negative": one("nominal_radius", lambda _: -1.0),
    "nominal radius": one("nominal_radius", lambda radius: radius + 0.5),
    "sound margin": one("sound_margin", lambda margin: margin + 1e-6),
    "margin not a number": one("deployed_margin", lambda _: math.nan),
    "predictions are the labels": column("sound_prediction", lambda c: c["label"]),
    "rival": one("sound_rival", lambda rival: (rival + 1) % 3),
    "rival is no class": one("sound_rival", lambda _: 99),
    "another column": column("robust", lambda c: c["label"]),
    "pixels": one("pixels_sha256", lambda digest: digest[::-1]),
    "a sample dropped": rows(lambda all_rows: all_rows[:-1]),
    "a sample twice": rows(lambda all_rows: [*all_rows, 0]),
    # What it is about
    "an image": brighter,
    "a label": relabelled,
    "a weight": other_weight,
    "settings of the network": field("model", "network", "kind", to="sandwich"),
    "digest of the model": field("model", "digest", to=lambda digest: digest[::-1]),
    "digest of the index": field("shards", "index_digest", to=lambda digest: digest[::-1]),
    "split": field("shards", "split", to="train"),
    "version": field("code_version", to=None),
}


def test_what_is_untouched_is_confirmed(untouched, capsys):
    assert main(untouched.arguments) == CONFIRMED
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "not proved: nominal" in printed.out
    assert "not derived: code_version" in printed.out


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found(case, capsys, name):
    TAMPERED[name](case)
    assert main(case.arguments) in (DISAGREES, UNUSABLE)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1


def eps_dropped_with_its_table(case: Case) -> None:
    """What another choice of radii would have made: no field contradicts another."""
    body = copy.deepcopy(case.body())
    dropped = body["eps"].pop()
    for column in body["columns"].values():
        del column["certified"][dropped], column["cra"][dropped]
    case.seal(body)


UNDERIVED = {
    "eps": eps_dropped_with_its_table,
    "code_version": field("code_version", to="9.9"),
    "observed_lipschitz": field("observed_lipschitz", to=larger(-1e-3)),
}


@pytest.mark.parametrize("name", UNDERIVED)
def test_what_is_accepted_though_it_was_changed_is_listed(case, capsys, name):
    UNDERIVED[name](case)
    assert main(case.arguments) == CONFIRMED
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("not derived: ")]
    assert name in line


def test_the_list_of_what_is_not_derived_is_complete(untouched, tmp_path, capsys):
    """Every other field of certificate.json that changes, changed alone, is a disagreement."""
    from model.verifier.command import UNDERIVED as LISTED

    assert LISTED.keys() == UNDERIVED.keys()
    for name in sorted(FIELDS - LISTED.keys() - {"digest"}):
        case = untouched.copy(tmp_path / name)
        value = case.body()[name]
        other = {"remark": 1} if isinstance(value, dict) else [] if value == [0] else [0]
        field(name, to=other if isinstance(value, dict | list) else "other")(case)
        assert main(case.arguments) in (DISAGREES, UNUSABLE), name
        assert capsys.readouterr().out == ""


def test_radii_that_the_producer_did_not_choose_are_shown(untouched, capsys):
    samples = untouched.samples()
    hits = zip(samples["sound_prediction"], samples["label"], samples["sound_radius"], strict=True)
    share = sum(p == y and r > 1 / 1000 for p, y, r in hits) / len(samples["key"])
    assert main([*untouched.arguments, "--eps", "1/1000", "36/255"]) == CONFIRMED
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert table["1/1000"][2] == f"{share:.2%}"
    assert main([*untouched.arguments, "--eps", "0.1x"]) == UNUSABLE
    assert "is not a ratio" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory) -> Case:
    """A certificate whose `deployed` column certifies nothing at all."""
    config = parsed(**SMALL, **NETWORKS["lipnext"])
    network = build_network(config).float().eval()
    network.initialise(0)
    return on_disk(config, network, tmp_path_factory.mktemp("bf16"), "--deployed", "bfloat16")


@pytest.mark.parametrize("correct", [False, True], ids=["radii", "radii and predictions"])
def test_a_forged_bfloat16_column_is_found(bfloat16, tmp_path, capsys, correct):
    """The radius is below 1/2, the largest tolerance of its logits: nothing is allowed on radii."""
    case = bfloat16.copy(tmp_path / "case")
    columns = case.samples()
    assert not any(columns["deployed_radius"])
    assert main(case.arguments) == CONFIRMED
    columns["deployed_radius"] = [0.499] * len(columns["key"])
    if correct:
        columns["deployed_prediction"] = columns["label"]
    case.forge(columns)
    assert case.body()["columns"]["deployed"]["cra"]["36/255"] > 0
    capsys.readouterr()
    assert main(case.arguments) == DISAGREES
    assert "deployed_" in capsys.readouterr().err


def test_an_error_is_bounded_by_the_samples_drawn(untouched, tmp_path, capsys):
    options = ["--sample", "4", "--seed", "2"]
    assert main([*untouched.arguments, *options]) == CONFIRMED
    assert "errors and radii of samples that were not drawn" in capsys.readouterr().out
    case = untouched.copy(tmp_path / "case")
    field("columns", "sound", "largest_error", to=0.0)(case)
    assert main([*case.arguments, *options]) == DISAGREES
