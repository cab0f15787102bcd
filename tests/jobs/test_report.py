import dataclasses
import html.parser
import importlib.util
import re
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from jobs.evaluate_cra import evaluate
from jobs.report import PAGE, TEXT, duration, main, per_further_point, render
from jobs.reporting.cost import Cost, passed_epochs
from jobs.reporting.report_data import LeftOut, collect
from pipeline.run.wilson_interval import wilson
from pipeline.tracking.client import MlflowConnection, TrackingConfig, now_ms
from pipeline.tracking.reader import Point, Reader, TrackingError
from tests.end_to_end.mlflow_ui import browser, chromium
from tests.jobs.conftest import NETWORK, export
from tests.mlflow_database import empty_database

pytestmark = pytest.mark.integration

EPS = ("1/255", "36/255")
TAGS = {"devices": "2"}
PARAMS = {"loss.eps": 0.1, "train.seed": 0}


def _record(step):
    """What a run of two epochs of ten steps each records after a step."""
    return {
        "train/images_per_s": 5.0 * step,
        "train/epoch": step // 10,
        "cost/device_hours": step / 10,
        "cost/total": 0.3 * step,
        "perf/mfu": 0.25,
    }


@dataclasses.dataclass
class Made:
    """A store with two training runs, `one` (steps 10, 20) and `two<b>` (step 10)."""

    tracking: TrackingConfig
    runs: dict[str, str]
    models: dict[str, str]
    folder: object

    @property
    def client(self):
        return MlflowClient(self.tracking.uri)

    def evaluations(self, name="one"):
        reader = Reader(self.tracking)
        (run,) = reader.training_runs([name])
        return reader.evaluations([run])[run.run_id]


@pytest.fixture(scope="module")
def made(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("store")
    tracking = empty_database(folder, "set")
    server = MlflowConnection(tracking)
    runs, models = {}, {}

    def train(name, started, **params):
        run = server.start_run(
            name, None, name, {k: str(v) for k, v in params.items()}, TAGS, started
        )
        rows = [{"step": s, "timestamp_ms": 1000 + s, "values": _record(s)} for s in range(1, 21)]
        server.log_metrics(run.run_id, rows)
        runs[name] = run.run_id
        return run.run_id

    def certify(run_id, step, width, attack="none"):
        config = dataclasses.replace(NETWORK, width=width)
        url = export(folder / f"a-{run_id}-{step}", config, shards_url=shards, step=step)
        fields = {"artifact": url, "launcher": "local", "eps": EPS, "attack": attack}
        evaluated = evaluate({**fields, "tracking": tracking}, train_run_id=run_id, step=step)
        (model,) = MlflowClient(tracking.uri).search_logged_models(
            ["1"], f"tags.artifact_digest = '{evaluated.artifact_digest}'"
        )
        models[f"{run_id}-{step}"] = model.model_id

    one = train("one", 1000, **PARAMS)
    certify(one, 10, 16)
    certify(one, 20, 20, attack="fast")
    certify(train("two<b>", 2000, **{**PARAMS, "loss.eps": 0.2}), 10, 24)
    for run_id in runs.values():
        server.finish_run(run_id, "FINISHED", now_ms())
    return Made(tracking, runs, models, folder)


def collected(made, *names):
    return collect(Reader(made.tracking), names)


@pytest.fixture(scope="module")
def report(made):
    """Both runs as they were recorded."""
    return collected(made)


@pytest.fixture(scope="module")
def texts(made, report):
    return render(report, uri=made.tracking.uri)


def test_runs_are_compared_by_their_last_checkpoint(report):
    (group,) = report.groups
    assert [entry.reported.run.name for entry in group.entries] == ["one", "two<b>"]
    assert [entry.chosen.summary.step for entry in group.entries] == [20, 10]
    assert [e.summary.step for e in group.entries[0].by_step] == [10, 20]
    assert group.eps == EPS
    assert group.samples == group.entries[0].chosen.summary.samples
    assert report.differences == {"loss.eps": ("0.1", "0.2")}
    assert not report.left_out


def test_the_page_shows_classes_confusions_and_the_closest_images(report, texts):
    (group,) = report.groups
    summary = group.entries[0].chosen.summary
    label, said, count = summary.confusions[0]
    names = summary.class_names
    assert len(names) == 4
    assert f"<th>as {names[said]}</th>" in texts[PAGE]
    assert f"<tr><td>{names[label]}</td>" in texts[PAGE]
    assert 'alt="closest.png of one"' in texts[PAGE]
    assert f"takes {names[label]} for {names[said]} ({count}x)" in texts[TEXT]


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs playwright")
def test_no_table_of_a_long_run_is_cut_at_1280_pixels(made, report, tmp_path):
    """With a name as a run gets it, and every column that costs can have."""

    def longer(reported):
        run = replace(reported.run, name="cifar10-L32W1024-20261129-075501")
        return replace(reported, run=run, cost=replace(reported.cost, devices="8 x NVIDIA H200"))

    (group,) = report.groups
    entries = tuple(replace(e, reported=longer(e.reported)) for e in group.entries)
    page = replace(report, groups=(replace(group, entries=entries),))
    (tmp_path / PAGE).write_text(render(page, uri=made.tracking.uri)[PAGE])
    with browser() as context:
        shown = context.new_page()
        shown.set_viewport_size({"width": 1280, "height": 900})
        shown.goto((tmp_path / PAGE).as_uri())
        widths = (
            "[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth, e.clientWidth])"
        )
        found = [pair for pair in shown.evaluate(widths) if pair[1]]
        assert len(found) >= 3
        assert [inside for inside, outside in found if inside > outside] == []


def test_order_of_the_runs_is_the_one_that_was_asked_for(made):
    report = collected(made, made.runs["two<b>"], "one")
    assert [reported.run.name for reported in report.runs] == ["two<b>", "one"]


class Page(html.parser.HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_self_contained_and_shows_the_certificates(report, texts):
    page = Page(texts[PAGE])
    text = " ".join(" ".join(page.text).split())
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags
    assert page.tags.count("b") == texts[PAGE].count("<b>")  # none from the name of a run
    assert "two<b>" in text
    for entry in report.groups[0].entries:
        summary = entry.chosen.summary
        assert f"{summary.columns['sound'].clean:.2%}" in text
        assert summary.certificate_digest[:12] in text
        for ratio in EPS:
            assert f"{summary.columns['sound'].cra[ratio]:.2%}" in text
    attack = report.groups[0].entries[0].chosen.summary.attack
    assert f"attack {attack.accuracy['36/255']:.2%}" in text
    # Two images of every run, the curves, the costs, and the empty icon.
    assert page.tags.count("img") == 2 + 2 * 3


def test_markdown_tables_have_one_width(texts):
    tables = re.findall(r"(?:^\|.*\n)+", texts[TEXT], re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        rows = table.splitlines()
        assert len(rows) >= 3
        assert len({row.count("|") for row in rows}) == 1
        assert set(rows[1]) <= set("|-:")


def test_links_lead_to_a_server_when_there_is_one(made, report):
    page = Page(render(report, uri="http://server:5000")[PAGE])
    run = made.runs["one"]
    assert f"http://server:5000/#/experiments/1/runs/{run}?workflowType=machine_learning" in (
        page.addresses
    )


@pytest.fixture
def forged(made):
    """The last evaluation of run `one`; what a test changes is put back."""
    evaluation = made.evaluations()[-1]
    yield evaluation
    for name in ("summary.json", "certificate.json"):
        original = made.folder / "original" / name
        if original.exists():
            made.client.log_artifact(evaluation.run_id, str(original))
    for name, value in evaluation.metrics.items():
        made.client.log_metric(evaluation.run_id, name, value, timestamp=now_ms(), step=20)


def change(made, evaluation, name, old, new):
    """Replace text in a file of an evaluation as somebody with access to the store would."""
    data = Reader(made.tracking).read_file(evaluation.run_id, name)
    folder = made.folder / "original"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    changed = re.sub(old, new, data.decode(), count=1)
    assert changed != data.decode()
    draft = made.folder / "changed" / name
    draft.parent.mkdir(exist_ok=True)
    draft.write_text(changed)
    made.client.log_artifact(evaluation.run_id, str(draft))


def test_forged_metric_is_left_out(made, forged):
    name = "cra_sound/l2/36_255"
    made.client.log_metric(forged.run_id, name, 0.999, timestamp=now_ms(), step=20)
    report = collected(made)
    (left,) = report.left_out
    assert left.name == forged.name
    assert left.reason.startswith(f"metric {name} is 0.999, the certificate says ")
    assert report.groups[0].entries[0].chosen.summary.step == 10
    assert left.reason in "".join(Page(render(report, uri=made.tracking.uri)[PAGE]).text)


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("certificate.json", r'"clean": [\d.]+', '"clean": 0.9876', "the digest in"),
        ("summary.json", r'"clean": [\d.]+', '"clean": 0.9876', "is not the one of"),
        ("summary.json", r'"certificate_digest": "\w+', '"certificate_digest": "0', "digest in"),
        ("summary.json", r'"norm"', '"nrom"', "cannot be read"),
    ],
)
def test_changed_file_is_left_out(made, forged, name, old, new, reason):
    change(made, forged, name, old, new)
    (left,) = collected(made).left_out
    assert reason in left.reason


def test_other_test_sets_have_their_own_table(made, report):
    first = report.groups[0]
    text = render(
        dataclasses.replace(
            report, groups=(first, dataclasses.replace(first, norm="linf", samples=7))
        ),
        uri=made.tracking.uri,
    )
    for name in (PAGE, TEXT):
        assert "2 test sets or norms" in text[name]


def test_registered_versions_are_part_of_the_lineage(made, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.tracking.uri)  # the registry asks for the model
    client = made.client
    client.create_registered_model("robust")
    model_id = made.models[f"{made.runs['one']}-20"]
    client.create_model_version("robust", source=f"models:/{model_id}", model_id=model_id)
    for alias in ("champion", "candidate"):
        client.set_registered_model_alias("robust", alias, "1")
    found = collected(made, "one")
    version = "robust v1 @candidate @champion"
    assert [model.registered for model in found.runs[0].models] == [(), (version,)]
    assert version in render(found, uri=made.tracking.uri)[PAGE]


def test_cost_counts_repeated_steps():
    hours = tuple(
        Point(s, h, t) for t, (s, h) in enumerate([(2, 1.0), (4, 2.0), (3, 4.0), (4, 5.0)])
    )
    cost = Cost("3", hours, epochs=2.5, images_per_s=None, mfu=None, total=None)
    assert cost.device_s == 18000
    assert cost.device_s_per_epoch == 7200
    assert [cost.up_to(step) for step in (1, 2, 3, 4, 9)] == [None, 3600, 14400, 18000, 18000]


def test_epochs_are_counted_from_the_last_one_that_began():
    def series(*values):
        return [Point(step, float(value), 0) for step, value in enumerate(values, start=1)]

    assert passed_epochs(series(0, 0, 0)) is None
    assert passed_epochs([]) is None
    assert passed_epochs(series(0, 0, 0, 1, 1, 1)) == 1.5
    assert passed_epochs(series(0, 1, 2, 2)) == pytest.approx(8 / 3)


def test_run_that_recorded_nothing_has_no_cost():
    cost = Cost("", (), epochs=None, images_per_s=None, mfu=None, total=None)
    assert (cost.device_s, cost.device_s_per_epoch, cost.up_to(3)) == (None, None, None)
    assert duration(None) == "–"


def test_cost_of_a_point(report):
    entry = report.groups[0].entries[0]
    cost = entry.reported.cost
    assert cost.devices == "2"
    assert cost.images_per_s == pytest.approx(20 / sum(1 / (5 * s) for s in range(1, 21)))
    assert cost.device_s == 7200
    assert (cost.total, cost.mfu) == (6.0, 0.25)
    assert cost.epochs == 2
    gains = [e.summary.columns["sound"].cra["1/255"] for e in entry.by_step]
    found = per_further_point(entry, 1, "1/255")
    if gains[1] > gains[0]:
        assert found == pytest.approx(3600 / (100 * (gains[1] - gains[0])))
    else:
        assert found is None
    assert per_further_point(entry, 0, "1/255") is None


def test_interval_is_wilsons():
    low, high = wilson(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (299, "299 s"), (600, "10 min"), (36000, "10 h")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_job_writes_both_pages(made, tmp_path, capsys):
    out = tmp_path / "page"
    options = ["--tracking.uri", made.tracking.uri, "--out", str(out)]
    assert main(["one", *options]) == 0
    assert {path.name for path in out.iterdir()} == {PAGE, TEXT}
    assert "1 runs, 2 evaluations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["three"], "there is no training run 'three'; there are one, two<b>"),
        (["--tracking.experiment", "other"], "has no experiment 'other'; it has Default, set"),
        (["--tracking.experiment", "Default"], "no training run"),
    ],
)
def test_what_is_not_there_is_named(made, tmp_path, capsys, arguments, message):
    options = ["--tracking.uri", made.tracking.uri, "--out", str(tmp_path / "page")]
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_reading_makes_no_store(tmp_path):
    with pytest.raises(TrackingError, match="there is no MLflow store"):
        Reader(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    assert list(tmp_path.iterdir()) == []


def test_name_of_two_runs_is_ambiguous(made):
    server = MlflowConnection(made.tracking)
    ids = [server.start_run(f"k{i}", None, "twin", {}, {}, now_ms()).run_id for i in (1, 2)]
    try:
        with pytest.raises(TrackingError, match=f"2 training runs are called 'twin'.*{ids[0]}"):
            Reader(made.tracking).training_runs(["twin"])
    finally:
        for run_id in ids:
            made.client.delete_run(run_id)


def test_single_run_without_evaluations_has_a_page(made, report):
    (_, two) = report.runs
    alone = dataclasses.replace(two, models=(), evaluations=())
    bare = dataclasses.replace(report, runs=(alone,), groups=())
    texts = render(bare, uri=made.tracking.uri)
    assert "None: there is one run" in texts[PAGE]
    assert "No checkpoint is recorded" in texts[PAGE]
    for text in (page.replace("&lt;", "<").replace("&gt;", ">") for page in texts.values()):
        assert "Without an evaluation that counts:" in text
        assert "two<b>" in text


def test_run_without_recorded_cost_is_in_the_table_and_not_in_the_figure(made, report):
    (group,) = report.groups
    first, second = group.entries
    unmeasured = dataclasses.replace(second.reported.cost, hours=(), devices="")
    free = dataclasses.replace(
        second, reported=dataclasses.replace(second.reported, cost=unmeasured)
    )
    for entries, runs in (((first, free), report.runs), ((free,), (free.reported,))):
        changed = dataclasses.replace(
            report, groups=(dataclasses.replace(group, entries=entries),), runs=runs
        )
        texts = render(changed, uri=made.tracking.uri)
        assert ("Device time" in texts[TEXT]) == (first in entries)


@pytest.mark.parametrize(
    "name",
    ["[/x]<script>alert(1)</script>", "a | b\n# c", "`x` *y* [z](http://evil) $a^{ \u202e\x1b[2J"],
)
def test_a_hostile_name_is_only_text_on_both_pages(report, name):
    (group,) = report.groups
    entry = group.entries[0]
    run = replace(entry.reported.run, name=name, params={**entry.reported.run.params, name: name})
    reported = replace(entry.reported, run=run)
    hostile = replace(
        report,
        runs=(reported, *report.runs[1:]),
        groups=(replace(group, dataset=name, entries=(replace(entry, reported=reported),)),),
        left_out=(LeftOut(name, name, name),),
    )
    pages = render(hostile, uri="http://server:5000")
    assert "script" not in Page(pages[PAGE]).tags
    assert "script" not in Page(re.sub(r"(`+).*?\1", "", pages[TEXT])).tags  # outside of code
    assert not any(mark in text for text in pages.values() for mark in ("\u202e", "\x1b"))
    assert "\n# c" not in pages[TEXT]
    prose = re.sub(r"(`+).*?\1", "", pages[TEXT])
    assert "](http" not in prose.replace("\\](", "")
    tables = re.findall(r"(?:^\|.*\n)+", pages[TEXT], re.MULTILINE)
    for table in tables:
        rows = [re.sub(r"\\.", "", row) for row in table.splitlines()]
        assert len({row.count("|") for row in rows}) == 1
