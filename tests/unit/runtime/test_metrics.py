"""Metrics: counts of rows, names, and the Grafana dashboard."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.metrics import _VALID_METRIC_NAME_RE

from raykd.runtime import metrics
from raykd.runtime.metrics import METRICS, CompletionCounts, count_rows

DASHBOARD = Path(__file__).parents[3] / "cluster" / "grafana" / "raykd.json"
# Suffixes that Prometheus adds to a metric's name.
SUFFIXES = ("_total", "_bucket", "_sum", "_count")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_dashboard_shows_exactly_the_metrics(dashboard: dict[str, Any]):
    shown = set(re.findall(r"ray_raykd_[a-z_]+", " ".join(expressions(dashboard))))
    assert shown == {metric.exported for metric in METRICS}
    # The queries of variables use existing metrics too.
    of_variables = set(re.findall(r"ray_raykd_[a-z_]+", json.dumps(dashboard["templating"])))
    assert of_variables <= shown


def test_dashboard_uses_existing_tags(dashboard: dict[str, Any]):
    by_name = {metric.exported: metric for metric in METRICS}
    seen = 0
    for expression in expressions(dashboard):
        for name, labels in re.findall(r"(ray_raykd_[a-z_]+)\{([^}]*)\}", expression):
            seen += 1
            used_tags = set(re.findall(r"(\w+)=", labels))
            for group in re.findall(r"by \(([^)]*)\)", expression):
                used_tags |= set(group.split(", "))
            assert used_tags <= set(by_name[name].tags), expression
    assert seen >= len(METRICS)


def test_dashboard_uses_existing_vllm_metrics(dashboard: dict[str, Any]):
    loggers = pytest.importorskip("vllm.v1.metrics.loggers")
    source = Path(loggers.__file__).read_text(encoding="utf-8")
    known = {name.replace(":", "_") for name in re.findall(r'name="(vllm:\w+)"', source)}
    shown = set(re.findall(r"ray_(vllm_[a-z_]+)", json.dumps(dashboard)))
    assert len(shown) > 8
    for name in shown:
        bare = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
        assert bare in known, name


def test_dashboard_panels_and_variables_are_complete(dashboard: dict[str, Any]):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for each in [panel for panel in panels if panel["type"] != "row"]:
        assert each["datasource"] == source
        assert all(target["datasource"] == source for target in each["targets"])
    assert all(each["datasource"] == source for each in variables.values() if each["type"] == "query")
    used = set(re.findall(r"\$([a-z]\w*)", " ".join(expressions(dashboard))))
    assert used == set(variables) - {"datasource"}
    # No panel overlaps another.
    cells = [
        (column, line)
        for at in (panel["gridPos"] for panel in panels)
        for column in range(at["x"], at["x"] + at["w"])
        for line in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) == 23


def test_metric_names_are_valid_in_prometheus():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert _VALID_METRIC_NAME_RE.match(metric.name)
        assert metric.name.startswith("raykd_")
        # Prometheus and Ray add these labels.
        assert not set(metric.tags) & {"job", "instance", "WorkerId", "SessionName", "Component", "NodeAddress"}
        assert len(set(metric.tags)) == len(metric.tags)
        assert {"experiment", "ray_job"} <= set(metric.tags)


def test_row_with_an_error_counts_as_failed():
    good = {"error": "", "completion_token_ids": [5, 6, 7], "is_correct": True}
    wrong = {"error": "", "completion_token_ids": [5], "is_correct": False}
    failed = {"error": "no answer within 600 s", "completion_token_ids": [], "is_correct": False}
    assert count_rows([good, wrong, failed, good]) == CompletionCounts(done=3, failed=1, tokens=7, correct=2)
    assert count_rows([]) == CompletionCounts(0, 0, 0, 0)


def test_without_ray_nothing_is_recorded_and_ray_is_not_imported(monkeypatch: pytest.MonkeyPatch):
    code = (
        "import sys, threading; from raykd.runtime import metrics; metrics.show_trials('mine', {'a': 'complete'}); "
        "assert threading.active_count() == 1, 'a thread publishes gauges'; assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def no_gauge(*_: object) -> None:
        raise AssertionError("a gauge was created")

    # In this process Ray is imported, but not connected to a cluster.
    monkeypatch.setattr("ray.util.metrics.Gauge", no_gauge)
    metrics.show_trials("mine", {"a": "complete"})
    assert not ray.is_initialized()
