"""Ray's metrics of the reference run, during and after it, against the rows that it wrote."""

import math
from pathlib import Path

import pytest

from raykd.runtime import metrics
from raykd.storage import files, row_store
from raykd.storage.schemas import COMPLETION
from reference_run import ARMS, NAME, NUM_TOO_LONG, NUM_TRAIN, NUM_WORKERS, Reference

pytestmark = pytest.mark.timeout(2400)


def rows_of(reference: Reference, arm: str) -> list[dict]:
    """Return the completion rows of an arm."""
    completions = reference.plan.completion_sets[arm]
    assert completions
    return row_store.read_rows(completions.folder, COMPLETION).to_pylist()


@pytest.mark.parametrize(
    ("arm", "strategy", "source"),
    [
        ("greedy", "none", "teacher"),
        ("soft", "teacher", "teacher"),
        ("scored", "ground_truth", "reference"),
    ],
)
def test_completion_counters_match_written_rows(reference: Reference, arm: str, strategy: str, source: str):
    rows, node_metrics = rows_of(reference, arm), reference.metrics
    done = [row for row in rows if not row["error"]]
    samples = 2 if arm == "soft" else 1
    assert len(done) == samples * (NUM_TRAIN - NUM_TOO_LONG)
    tags = {"experiment": NAME, "strategy": strategy, "source": source}
    assert node_metrics.total(metrics.COMPLETIONS, **tags, outcome="done") == len(done)
    assert node_metrics.total(metrics.COMPLETIONS, **tags, outcome="failed") == len(rows) - len(done)
    assert node_metrics.total(metrics.TOKENS, **tags) == sum(len(row["completion_token_ids"]) for row in done)
    correct = sum(row["is_correct"] for row in done)
    assert node_metrics.total(metrics.CORRECT, **tags) == correct
    ((labels, shares),) = node_metrics.series(metrics.SHARE.exported, **tags)
    assert shares[-1] == pytest.approx(correct / len(done))
    assert labels["ray_job"]


def test_training_metrics_match_curves_and_workers(reference: Reference):
    for trial in reference.plan.trials:
        tags = {"experiment": NAME, "trial": trial.trial_id}
        found = reference.metrics.series(metrics.LOSS.exported, **tags)
        assert found, trial.trial_id
        curve = files.read_json_lines(trial.folder / "metrics.jsonl")
        losses = [loss for _, values in found for loss in values]
        assert all(any(math.isclose(loss, point["loss"], rel_tol=1e-6) for point in curve) for loss in losses)
        assert reference.metrics.series(metrics.SPEED.exported, **tags)[0][1][-1] > 0
        ranks = {labels["rank"] for labels, _ in reference.metrics.series(metrics.WORKER_SPEED.exported, **tags)}
        assert ranks == {str(rank) for rank in range(NUM_WORKERS[trial.arm_name])}


def test_trial_gauges_count_trials_by_state(reference: Reference):
    def max_count(state: str) -> float:
        return max(
            max(each) for _, each in reference.metrics.series(metrics.TRIALS.exported, experiment=NAME, state=state)
        )

    # Four cores hold at most three trials at a time.
    assert 1 <= max_count(metrics.TRAINING) <= 3
    ((_, complete),) = reference.metrics.series(metrics.TRIALS.exported, experiment=NAME, state="complete")
    assert complete[-1] == len(ARMS)
    assert max_count("failed") == max_count("stopped") == 0


def test_gauge_keeps_value_without_updates(reference: Reference):
    remaining = [
        tags
        for name, tags in reference.metrics.last_series
        if name == metrics.TRIALS.exported and tags["experiment"] == "second"
    ]
    assert sorted(tags["state"] for tags in remaining) == sorted(metrics.STATES)
    ((_, complete),) = reference.metrics.series(metrics.TRIALS.exported, experiment="second", state="complete")
    assert set(complete) == {1}


def test_vllm_metrics_cover_both_engines(reference: Reference):
    tokens = sum(len(row["completion_token_ids"]) for arm in ("greedy", "soft") for row in rows_of(reference, arm))
    written = reference.metrics.series("ray_vllm_generation_tokens_total")
    # The engine of a Ray Serve replica has a ReplicaId, Ray Data's engine has none.
    served = sum(values[-1] for labels, values in written if labels["ReplicaId"])
    assert served >= tokens
    assert sum(values[-1] for labels, values in written if not labels["ReplicaId"]) > 0
    assert reference.metrics.series("ray_vllm_num_requests_running")


def test_separate_driver_has_its_own_job_metadata(reference: Reference):
    metadata = [job["metadata"] for job in reference.jobs if (job["metadata"] or {}).get("experiment") == "second"]
    assert metadata == [{"job_name": "second show", "experiment": "second", "stage": "show"}]


def test_nodes_export_all_metrics_of_the_dashboard(reference: Reference):
    board = (Path(__file__).parents[2] / "cluster" / "grafana" / "raykd.json").read_text(encoding="utf-8")
    assert {metric.exported for metric in metrics.METRICS} <= set(reference.metrics.values)
    assert all(metric.exported in board for metric in metrics.METRICS)
