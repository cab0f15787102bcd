"""The page that derives a certificate in the browser: what it says, and what it refuses."""

import base64
import hashlib
import html.parser
import importlib.util
import json
import math
import re
import shutil
import subprocess
from fractions import Fraction

import pytest

from data_shards.sources.synthetic import synthetic
from data_shards.write import write_shard_set
from jobs.report import main
from jobs.reporting import verify_page
from jobs.reporting.verify_page import VERIFY_PAGE, locate, page
from model.networks.sll.network import SllConfig
from tests.end_to_end.mlflow_ui import browser, chromium
from tests.jobs.conftest import export
from tests.model.certificate_maker import CONFIRMED, DISAGREES, SAMPLES, change, make, run
from tests.repetitions import mostly_slow

pytestmark = pytest.mark.integration

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js to run the mathematics")
FORGERIES = {"weight": "bounds", "pixel": "samples", "radius": "samples"}
"""What each forgery is caught by when the digests and the table are redone."""
RUN_WORKER = """
const { mathematics, tasks } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const results = tasks.map((task) => {
  let result;
  const self = { postMessage: (message) => { result = message.result ?? result; } };
  new Function("self", mathematics)(self);
  self.onmessage({ data: structuredClone(task) });
  return result;
});
console.log(JSON.stringify(results));
"""


class Elements(html.parser.HTMLParser):
    """Elements of a page by id or name: attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("id") or tag
        self.texts.setdefault(self._open, "")

    def handle_data(self, data):
        if self._open:
            self.texts[self._open] += data

    def handle_endtag(self, tag):
        self._open = None


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make(tmp_path_factory.mktemp("honest") / "case")


def page_of(case, samples=None):
    return page(locate(str(case.certificate), str(case.model), str(case.shards)), samples)


def derive(*pages, forgeries=(None,)):
    """What the workers of some pages answer, each as made or after forgeries."""
    texts = [Elements(text).texts for text in pages]
    tasks = [
        {"data": json.loads(part["data"]), "forgery": forgery}
        for part in texts
        for forgery in forgeries
    ]
    content = {"mathematics": texts[0]["mathematics"], "tasks": tasks}
    return node(RUN_WORKER, json.dumps(content))


def node(script, text=""):
    command = [NODE, "-e", script]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def right_place(case):
    """Place of a sample with a right prediction and a radius."""
    rows = case.samples()
    columns = zip(rows["label"], rows["sound_prediction"], rows["sound_radius"], strict=True)
    return next(at for at, (label, c, radius) in enumerate(columns) if label == c and radius > 0)


@needs_node
@pytest.mark.parametrize(
    "network",
    [
        {},
        {"head": "linear"},
        {"pool": "flat"},
        {"pool": "grid", "pool_windows": 2, "patch": 1, "depth": 3, "shift": "doubling"},
    ],
)
@pytest.mark.parametrize("deployed", mostly_slow(["float32", "bfloat16"], ["bfloat16"]))
def test_page_confirms_what_the_verifier_confirms(tmp_path, network, deployed):
    case = make(tmp_path / "case", deployed=deployed, **network)
    body = case.body()
    (found,) = derive(page_of(case))
    assert run(case) == CONFIRMED
    assert found["holds"], found["disagreement"]
    assert found["bound"]["L"] == pytest.approx(body["network_bound"], rel=1e-13)
    assert found["bound"]["D"] == pytest.approx(body["head"]["largest_factor"], rel=1e-13)
    for name, column in body["columns"].items():
        assert found["table"][name]["certified"] == column["certified"]
        assert found["table"][name]["clean"] == round(column["clean"] * SAMPLES)
    for sample in found["samples"]:
        for name in ("sound", "deployed"):
            derived = sample["columns"][name]
            same = 1e-12 if name == "sound" else 1e-6  # made from logits rounded to float32
            assert derived["radius"] == pytest.approx(derived["stated"], abs=same)
            assert derived["stated"] <= derived["proved"]


@needs_node
def test_every_forgery_is_found_by_digest_and_by_mathematics(case):
    forgeries = [
        {"what": what, "at": right_place(case), "redo": redo}
        for redo in (False, True)
        for what in FORGERIES
    ]
    found = derive(page_of(case), forgeries=forgeries)
    steps = ["digests", "digests", "table", *FORGERIES.values()]
    assert [(result["holds"], result["step"]) for result in found] == [(False, s) for s in steps]
    raised = found[-1]["disagreement"]
    assert raised["place"].endswith("sound_radius")
    assert float(raised["stated"]) > float(re.search("at most ([0-9.e-]+)", raised["derived"])[1])


@needs_node
def test_no_radius_passes_by_a_tolerance(case, tmp_path):
    (honest,) = derive(page_of(case))
    # The stated radius is 3e-8 r below the largest one: within 1e-8 for the smallest.
    at, proved = min(
        (
            (sample["row"], sample["columns"]["sound"]["proved"])
            for sample in honest["samples"]
            if sample["columns"]["sound"]["radius"] > 0
        ),
        key=lambda pair: pair[1],
    )
    for share, holds in ((1 - 1e-12, True), (1 + 1e-12, False)):
        forged = case.copy(tmp_path / f"forged-{holds}")
        columns = forged.samples()
        columns["sound_radius"][at] = proved * share
        forged.forge(columns)
        (found,) = derive(page_of(forged))
        assert found["holds"] == holds, found
        assert (run(forged) == CONFIRMED) == holds


CHANGES = {
    "a network bound": (("network_bound",), lambda x: x * (1 - 1e-8)),
    "a part": (("parts", "blocks.0"), lambda x: x * (1 - 1e-8)),
    "a norm": (("layers", 0, "frobenius"), lambda x: x * (1 - 1e-8)),
    "a head factor": (("head", "largest_factor"), lambda x: x * (1 - 1e-8)),
    "a share": (("columns", "sound", "clean"), lambda x: x + 1e-15),
    "a count": (("columns", "deployed", "certified", "36/255"), lambda x: x + 1),
    "a mean radius": (("columns", "sound", "mean_radius"), lambda x: x * (1 + 1e-15)),
    "an error": (("columns", "sound", "largest_error"), lambda x: x / 2),
    "a slope above the bound": (("observed_lipschitz",), lambda x: 9.0),
    "no radii": (("eps",), lambda x: []),
    "a radius twice": (("eps",), lambda x: [*x, x[0]]),
    "an unknown field": (("head",), lambda x: {**x, "proved": True}),
    "a schema": (("schema",), lambda x: "certified-radius/1"),
    "a norm of the network": (("norm",), lambda x: "linf"),
    "a smaller slack": (("slack",), lambda x: x / 2),
    "a program": (("columns", "sound", "program"), lambda x: "float32"),
}


@needs_node
def test_page_and_verifier_refuse_the_same_changes(case, tmp_path):
    forged, body, pages = case.copy(tmp_path / "forged"), case.body(), []
    for what, (path, function) in CHANGES.items():
        forged.seal(change(body, path, function))
        assert run(forged) != CONFIRMED, what
        pages.append(page_of(forged))
    held = [what for what, found in zip(CHANGES, derive(*pages), strict=True) if found["holds"]]
    assert held == []


@needs_node
@pytest.mark.parametrize("quantity", ["prediction", "rival", "margin"])
def test_rows_must_be_those_derived(case, tmp_path, quantity):
    forged = case.copy(tmp_path / "forged")
    columns = forged.samples()
    column = columns[f"sound_{quantity}"]
    column[2] = column[2] + 1e-6 if quantity == "margin" else (column[2] + 1) % 3
    forged.forge(columns)
    (found,) = derive(page_of(forged))
    assert found["disagreement"]["place"].startswith("sample 2 ")
    assert run(forged) == DISAGREES


@needs_node
def test_sums_and_comparisons_are_exact(case):
    mathematics = Elements(page_of(case)).texts["mathematics"]
    script = f"""new Function("self", {json.dumps(mathematics)} + `;
      console.log(JSON.stringify([
        exactSum([1e16, 1, 1, 0.5, 2 ** -1074]), exactSum([0.1, 0.2, 0.3]), exactSum([]),
        isGreater(36 / 255, "36/255"), isGreater(0.5, "1/2"), isGreater(0.5000000000000001, "1/2"),
        sha256OfText(""), sha256OfText("abc"), sha256OfText("a".repeat(200)),
        exponentOf(0), exponentOf(0.5), exponentOf(1), exponentOf(5e-324),
      ]));`)({{}})"""
    digests = [hashlib.sha256(t.encode()).hexdigest() for t in ("", "abc", "a" * 200)]
    above = Fraction(36 / 255) > Fraction(36, 255)
    assert node(script) == [
        1e16 + 2, math.fsum([0.1, 0.2, 0.3]), 0, above, False, True, *digests, 0, 0, 1, -1073,
    ]  # fmt: skip


@needs_node
def test_part_of_the_images(case):
    text = page_of(case, samples=5)
    data = json.loads(Elements(text).texts["data"])
    assert data["images"]["rows"] == [0, 4, 9, 14, 19]
    assert len(data["rows"]["key"]) == SAMPLES
    (found,) = derive(text)
    assert found["holds"]
    assert len(found["samples"]) == 5
    assert f"{SAMPLES - 5} samples whose images are not on the page" in text


def test_page_needs_nothing_but_itself(case):
    text = page_of(case)
    found = Elements(text)
    scripts = [attrs for tag, attrs in found.tags if tag == "script"]
    assert [attrs.get("type") for attrs in scripts] == ["application/json", "text/plain", None]
    assert not any({"src", "srcset", "action"} & attrs.keys() for _, attrs in found.tags)
    assert [attrs["href"] for _, attrs in found.tags if "href" in attrs] == ["data:,"]
    assert not re.search(r"https?:|url\(|@import|importScripts|\beval\b|innerHTML", text)
    digest = base64.b64encode(hashlib.sha256(found.texts["script"].encode()).digest()).decode()
    policy = next(attrs["content"] for tag, attrs in found.tags if "http-equiv" in attrs)
    assert policy.split("; ") == [
        "default-src 'none'", f"script-src 'sha256-{digest}'", "worker-src blob:",
        "style-src 'unsafe-inline'", "img-src data:", "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip


HOSTILE = '</script><script>document.title="taken"</script><!--<script>"\'&'


def hostile(case, root):
    """A certificate whose names hold markup, sealed."""
    forged = case.copy(root)
    body = change(case.body(), ("shards", "name"), lambda _: HOSTILE)
    forged.seal(change(body, ("code_version",), lambda _: HOSTILE))
    return forged


def test_names_with_markup_are_texts(case, tmp_path):
    text = page_of(hostile(case, tmp_path / "forged"))
    found = Elements(text)
    assert sum(tag == "script" for tag, _ in found.tags) == 3
    assert HOSTILE in found.texts["title"]
    data = json.loads(found.texts["data"])
    assert json.loads(data["certificate"]["text"])["shards"]["name"] == HOSTILE


def test_run_artifact_and_evaluation_name_the_same(case, tmp_path):
    for step in (1, 2):
        artifact = tmp_path / "run" / "artifacts" / f"step-{step}"
        shutil.copytree(case.model, artifact)
    first = tmp_path / "run" / "artifacts" / "step-1"
    for split in ("test", "validation"):
        shutil.copytree(case.certificate, first / "evaluation" / split)
    evaluation = first / "evaluation" / "test"
    (evaluation / "summary.json").write_text(json.dumps({"shards_url": str(case.shards)}))
    found = {str(locate(str(u))) for u in (tmp_path / "run", first, evaluation)}
    assert len(found) == 1
    located = locate(str(tmp_path / "run"))
    assert located.artifact.local_path() == first
    out = tmp_path / "out"
    assert main(["--verify", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert (out / VERIFY_PAGE).read_text() == page(located)
    evaluation.rename(first / "evaluation" / "other")
    with pytest.raises(ValueError, match="evaluations other, validation: name the folder of one"):
        locate(str(first))


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_other_families_are_refused(case, tmp_path, capsys):
    config = SllConfig(
        input_shape=(1, 8, 8), num_classes=3, channels=3, conv_layers=1, pool=2, dense_layers=1,
        dense_inner=8,
    )  # fmt: skip
    other = export(tmp_path / "sll", config)
    places = ("--verify-artifact", other, "--data.shards", str(case.shards))
    message = refused(capsys, "--verify", str(case.certificate), *places)
    assert "family 'sll'" in message
    assert "'lipnext' alone" in message


def test_large_networks_are_refused(case, monkeypatch):
    monkeypatch.setattr(verify_page, "LARGEST_WEIGHTS", 1000)
    with pytest.raises(ValueError, match=r"weights.safetensors has [0-9,]+ bytes; .* up to 1,000"):
        page_of(case)


def test_images_that_do_not_fit_are_refused(case, monkeypatch):
    whole = len(page_of(case))
    monkeypatch.setattr(verify_page, "LARGEST_PAGE", whole - 200)
    fewer = json.loads(Elements(page_of(case)).texts["data"])["images"]["rows"]
    assert 0 < len(fewer) < SAMPLES
    with pytest.raises(ValueError, match=f"not for {SAMPLES}"):
        page_of(case, SAMPLES)


def test_files_that_do_not_belong_together_are_refused(case, tmp_path, capsys):
    places = ("--verify-artifact", str(case.model), "--data.shards", str(case.shards))
    assert "no evaluation, artifact or run" in refused(capsys, "--verify", str(tmp_path))
    assert "names no artifact_url" in refused(capsys, "--verify", str(case.certificate))
    other = case.copy(tmp_path / "other")
    other.rewrite_weight("head.bias")
    with pytest.raises(ValueError, match="states weights_sha256"):
        page(locate(str(case.certificate), str(other.model), str(case.shards)))
    noise = tmp_path / "noise"
    write_shard_set(synthetic(classes=3, size=8, samples=50, seed=1), str(noise))
    with pytest.raises(ValueError, match="does not hold the 24 samples"):
        page(locate(str(case.certificate), str(case.model), str(noise)))
    changed = case.copy(tmp_path / "changed")
    (changed.certificate / "samples.parquet").write_bytes(b"PAR1")
    assert "states samples_sha256" in refused(capsys, "--verify", str(changed.certificate), *places)
    changed.seal({**case.body(), "model": None})
    assert "certificate.json cannot be used" in refused(
        capsys, "--verify", str(changed.certificate), *places
    )


@pytest.mark.parametrize(
    "arguments", [("--verify", "x", "run"), ("--verify-samples", "3"), ("--data.shards", "x")]
)
def test_options_that_contradict_are_refused(arguments):
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    assert error.value.code == 2


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None, reason="needs pip install playwright"
)
def test_in_chromium_green_as_made_red_when_forged(case, tmp_path):
    place = tmp_path / VERIFY_PAGE
    place.write_text(page_of(hostile(case, tmp_path / "forged")))
    noise = []
    with browser() as context:
        tab = context.new_page()
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("request", lambda request: noise.append(request.url))

        def state():
            tab.wait_for_selector("body:not([data-state=running])")
            return tab.get_attribute("body", "data-state"), tab.inner_text("#verdict")

        tab.goto(place.as_uri())
        assert state() == ("holds", f"Certificate holds: {SAMPLES} of {SAMPLES} samples")
        assert "taken" not in tab.title()[:5]
        assert HOSTILE in tab.inner_text("main")
        clean = case.body()["columns"]["sound"]["clean"]
        assert f"{100 * clean:.2f} %" in tab.inner_text("#table tr:first-child .own")
        for redo in (False, True):
            tab.set_checked("#redo", redo)
            for what, step in FORGERIES.items():
                tab.click(f"#forge-{what}")
                assert state() == ("fails", "Certificate fails")
                text = tab.inner_text("#detail")
                assert ("the mathematics" in text) == redo, text
                if redo:
                    assert tab.get_attribute(f"#step-{step}", "class") == "failed"
        tab.click("#restore")
        assert state()[0] == "holds"
    assert [line for line in noise if not line.startswith("blob:")] == [place.as_uri()]
