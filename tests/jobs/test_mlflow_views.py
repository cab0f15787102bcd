import base64
import json
import re
import zlib
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.mlflow_views import certified_radii, main, views
from pipeline.tracking.client import MlflowConnection, TrackingConfig, now_ms
from pipeline.tracking.reader import Reader, TrackingError
from pipeline.tracking.ui_views import Section, View, bar, line, save_views
from tests.mlflow_database import empty_database

pytestmark = pytest.mark.integration

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/mlflow.md"
PREFIX = "mlflow.sharedViewState."
SOUND = ("cra_sound/l2/36_255", "cra_sound/l2/108_255")


@pytest.fixture
def tracking(tmp_path):
    """A store with two certified training runs."""
    config = empty_database(tmp_path, "set")
    server = MlflowConnection(config)
    for name, eps, loss in (("one", "0.1", "emma"), ("two", "0.2", "other")):
        params = {"loss.eps": eps, "loss.kind": loss, "model.width": "8", "name": name}
        run = server.start_run(name, None, name, params, {}, now_ms())
        values = {"clean": 0.9, **dict.fromkeys(SOUND, 0.5)}
        server.log_metrics(run.run_id, [{"step": 3, "timestamp_ms": 1, "values": values}])
    return config


def states(config):
    """What the UI reads, by key of the view."""
    tags = MlflowClient(config.uri).get_experiment_by_name(config.experiment).tags
    found = {}
    for tag, text in tags.items():
        body = json.loads(text)
        kind, data = body["state"].split(";")
        assert kind == "deflate"
        state = json.loads(zlib.decompress(base64.b64decode(data)))
        found[tag.removeprefix(PREFIX)] = (body["name"], state)
    return found


def test_views_follow_the_radii_and_settings_of_the_runs(tracking):
    save_views(tracking, views(Reader(tracking).training_runs()))
    found = states(tracking)
    assert {name[0] for name, _ in found.values()} == set("12345")
    _, table = found["cra-runs"]
    assert table["searchFilter"] == "tags.stage = 'train'"
    assert table["orderByKey"] == f"metrics.`{SOUND[0]}`"
    assert table["orderByAsc"] is False
    assert table["selectedColumns"][:4] == [
        "params.`loss.eps`",
        "metrics.`clean`",
        *(f"metrics.`{name}`" for name in SOUND),
    ]
    _, settings = found["cra-settings"]
    parallel = next(c for c in settings["compareRunCharts"] if c["type"] == "PARALLEL")
    assert parallel["selectedParams"] == ["loss.eps"]  # a name of a loss is no axis
    assert parallel["selectedMetrics"] == ["clean", *SOUND]
    _, attack = found["cra-attack"]
    assert [chart["metricKey"] for chart in attack["compareRunCharts"]] == [
        "cra_sound/l2/36_255",
        "attack/l2/36_255",
        "cra_sound/l2/108_255",
        "attack/l2/108_255",
    ]


def test_every_chart_lies_in_a_section_and_no_identifier_occurs_twice(tracking):
    save_views(tracking, views(Reader(tracking).training_runs()))
    for _, state in states(tracking).values():
        sections = [section["uuid"] for section in state.get("compareRunSections", [])]
        charts = state.get("compareRunCharts", [])
        assert {chart["metricSectionId"] for chart in charts} == set(sections)
        names = sections + [chart["uuid"] for chart in charts]
        assert len(set(names)) == len(names)


def test_saving_again_replaces(tracking):
    view = View("mine", "Mine", "", "metrics.`clean`", ["metrics.`clean`"])
    other = View("other", "Other", "", "metrics.`clean`", [], [Section("s", [line("clean")])])
    first = save_views(tracking, [view, other])
    experiment = MlflowClient(tracking.uri).get_experiment_by_name("set").experiment_id
    path = f"/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode="
    assert first == {
        "Mine": f"{path}TABLE&viewStateShareKey=mine",
        "Other": f"{path}CHART&viewStateShareKey=other",
    }
    save_views(tracking, [View("mine", "Renamed", "", "metrics.`clean`", [])])
    assert {key: name for key, (name, _) in states(tracking).items()} == {
        "mine": "Renamed",
        "other": "Other",
    }


def test_view_that_mlflow_would_not_store_changes_nothing(tracking):
    small = View("small", "Small", "", "metrics.`clean`", [])
    numbers = [bar(f"{i}{i * i * i}{i * 7919 % 1009}/{i * 31 % 97}") for i in range(2000)]
    large = View("large", "Large", "", "metrics.`clean`", [], [Section("s", numbers)])
    with pytest.raises(TrackingError, match=r"'Large' has .* MLflow keeps 5000"):
        save_views(tracking, [small, large])
    assert states(tracking) == {}


def test_radii_are_ordered_by_size_and_norm():
    names = ["cra_sound/l2/108_255", "cra_sound/linf/8_255", "cra_sound/l2/1_10", "clean"]
    l2, linf = certified_radii([*names, "cra_nominal/l2/36_255"])
    assert (l2.norm, l2.sound) == ("l2", ("cra_sound/l2/1_10", "cra_sound/l2/108_255"))
    assert linf.attack == ("attack/linf/8_255",)


def test_job_prints_a_link_for_every_view(tracking, capsys):
    assert main(["--tracking.uri", tracking.uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mlflow ui" in lines[0]
    assert len(lines) == 6
    for link in lines[1:]:
        assert "http://127.0.0.1:5000/#/experiments/" in link
        assert link.rpartition("=")[2] in states(tracking)


def test_uncertified_and_ambiguous_stores_are_refused(tracking, tmp_path, capsys):
    server = MlflowConnection(TrackingConfig(uri=tracking.uri, experiment="second"))
    server.start_run("three", None, "three", {}, {}, now_ms())
    assert main(["--tracking.uri", tracking.uri]) == 2
    assert "in 2 experiments (second, set)" in capsys.readouterr().err
    assert main(["--tracking.uri", tracking.uri, "--tracking.experiment", "second"]) == 2
    assert "no training run has been certified" in capsys.readouterr().err
    assert main(["--tracking.uri", f"sqlite:///{tmp_path}/none.db"]) == 2
    assert "there is no MLflow store" in capsys.readouterr().err


def test_page_about_the_ui_names_every_view_its_search_and_its_picture(tracking):
    page = PAGE.read_text()
    for view in views(Reader(tracking).training_runs()):
        section = page.split(f"## {view.name}\n")[1].split("\n## ")[0]
        assert f"Search `{view.search}`" in " ".join(section.split())
        assert "![" in section
    for picture in re.findall(r"!\[.+\]\((.+)\)", page):
        assert (PAGE.parent / picture).stat().st_size < 300_000


def test_searches_of_the_page_are_understood_by_mlflow(tracking):
    page = PAGE.read_text()
    rows = re.findall(r"^\| .+ \| `{1,2}(tags\.stage.+?)`{1,2} \|$", page, re.MULTILINE)
    assert len(rows) == 6
    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name("set").experiment_id
    found = {row: len(client.search_runs([experiment], row)) for row in rows}
    assert found["tags.stage = 'train' and attributes.status != 'FINISHED'"] == 2
    assert found["tags.stage = 'train' and metrics.`cra_sound/l2/36_255` > 0.9"] == 0
