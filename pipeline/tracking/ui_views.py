"""Views of the MLflow UI that open by a link: search, columns, charts, stored with an experiment.

MLflow (3.17) keeps a saved view in a tag of the experiment, as deflated JSON; whatever the JSON
does not say has the UI's default. The names of the fields are those that the UI itself writes.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.tracking.client import TrackingConfig, connect, now_ms
from pipeline.tracking.reader import Reader, TrackingError

_TAG = "mlflow.sharedViewState."
_TAG_CHARACTERS = 5000
_RUNS = 20  # shown at the same time

Chart = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """Charts under one heading.

    Attributes:
        name: the heading.
        charts: what `line`, `bar`, `scatter` and `parallel` return.
        columns: charts beside each other.
        height: of a chart, pixels.
    """

    name: str
    charts: Sequence[Chart]
    columns: int = 3
    height: int = 300


@dataclass(frozen=True)
class View:
    """One saved view.

    Attributes:
        key: stays the same when the view is saved again.
        name: shown in the menu.
        search: filter of the runs.
        order_by: column that sorts them, largest first.
        columns: columns of the table from left to right, see `metric` and `param`.
        sections: charts; none: the link opens the table.
    """

    key: str
    name: str
    search: str
    order_by: str
    columns: Sequence[str]
    sections: Sequence[Section] = ()


def metric(name: str) -> str:
    """Name of the column of a metric."""
    return f"metrics.`{name}`"


def param(name: str) -> str:
    """Name of the column of a parameter."""
    return f"params.`{name}`"


def line(name: str) -> Chart:
    """A metric over steps."""
    return {
        "type": "LINE",
        "displayName": name,
        "metricKey": name,
        "selectedMetricKeys": [name],
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "scaleType": "linear",
        "selectedXAxisMetricKey": "",
        "lineSmoothness": 0,
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
    }


def bar(name: str) -> Chart:
    """The last value of a metric, one bar for each run."""
    return {"type": "BAR", "displayName": name, "metricKey": name}


def scatter(x: str, y: str) -> Chart:
    """The last values of two metrics, one point for each run."""
    axes = {"xaxis": {"key": x, "type": "METRIC"}, "yaxis": {"key": y, "type": "METRIC"}}
    return {"type": "SCATTER", **axes}


def parallel(params: Sequence[str], metrics: Sequence[str]) -> Chart:
    """Parallel coordinates: settings on the left, what came of them on the right."""
    return {
        "type": "PARALLEL",
        "selectedParams": list(params),
        "selectedMetrics": list(metrics),
        "showAllRuns": False,
    }


def save_views(config: TrackingConfig, views: Sequence[View]) -> dict[str, str]:
    """Save views with an experiment; views of the same keys are replaced, others are kept.

    Returns:
        The path in the UI by the name of the view.

    Raises:
        TrackingError: there is no such experiment, or a view is larger than MLflow stores.
    """
    experiments = Reader(config).experiments
    if len(experiments) != 1:
        names = ", ".join(sorted(experiments.values()))
        raise TrackingError(f"views belong to one experiment, name one of {names}")
    (experiment_id,) = experiments
    values = {view.key: _encode(view) for view in views}
    client = connect(config.uri)
    for key, value in values.items():
        client.set_experiment_tag(experiment_id, f"{_TAG}{key}", value)
    return {view.name: _path(experiment_id, view) for view in views}


def _path(experiment_id: str, view: View) -> str:
    mode = "CHART" if view.sections else "TABLE"
    return (
        f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&compareRunsMode={mode}&viewStateShareKey={view.key}"
    )


def _encode(view: View) -> str:
    state: dict[str, Any] = {
        "searchFilter": view.search,
        "orderByKey": view.order_by,
        "orderByAsc": False,
        "selectedColumns": list(view.columns),
        "columnOrder": list(view.columns),
        "columnWidths": {name: max(90, 9 * len(name.split("`")[1])) for name in view.columns},
    }
    if view.sections:
        state |= {
            "compareRunSections": [_section(view, at) for at in range(len(view.sections))],
            "compareRunCharts": [
                chart for at in range(len(view.sections)) for chart in _charts(view, at)
            ],
            "isAccordionReordered": True,  # else the UI sorts the sections by name
        }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    now = now_ms()
    body = {"name": view.name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    text = json.dumps(body)
    if len(text) > _TAG_CHARACTERS:
        raise TrackingError(
            f"view {view.name!r} has {len(text)} characters, MLflow keeps {_TAG_CHARACTERS}"
        )
    return text


def _section(view: View, at: int) -> dict[str, Any]:
    section = view.sections[at]
    return {
        "uuid": f"{view.key}-{at}",
        "name": section.name,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        "columns": section.columns,
        "cardHeight": section.height,
    }


def _charts(view: View, at: int) -> list[dict[str, Any]]:
    return [
        {
            **chart,
            "uuid": f"{view.key}-{at}-{number}",
            "metricSectionId": f"{view.key}-{at}",
            "runsCountToCompare": _RUNS,
            "deleted": False,
            "isGenerated": False,
        }
        for number, chart in enumerate(view.sections[at].charts)
    ]
