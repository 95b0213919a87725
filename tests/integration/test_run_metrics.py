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
    """Return what the teacher generated or scored for an arm."""
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
    rows, seen = rows_of(reference, arm), reference.seen
    done = [row for row in rows if not row["error"]]
    samples = 2 if arm == "soft" else 1
    assert len(done) == samples * (NUM_TRAIN - NUM_TOO_LONG)
    tags = {"experiment": NAME, "strategy": strategy, "source": source}
    assert seen.total(metrics.COMPLETIONS, **tags, outcome="done") == len(done)
    assert seen.total(metrics.COMPLETIONS, **tags, outcome="failed") == len(rows) - len(done)
    assert seen.total(metrics.TOKENS, **tags) == sum(len(row["completion_token_ids"]) for row in done)
    correct = sum(row["is_correct"] for row in done)
    assert seen.total(metrics.CORRECT, **tags) == correct
    ((series, shares),) = seen.of(metrics.SHARE.exported, **tags)
    assert shares[-1] == pytest.approx(correct / len(done))
    assert series["ray_job"]


def test_training_metrics_match_curves_and_workers(reference: Reference):
    for trial in reference.plan.trials:
        tags = {"experiment": NAME, "trial": trial.trial_id}
        found = reference.seen.of(metrics.LOSS.exported, **tags)
        assert found, trial.trial_id
        curve = files.read_json_lines(trial.folder / "metrics.jsonl")
        losses = [loss for _, values in found for loss in values]
        assert all(any(math.isclose(loss, point["loss"], rel_tol=1e-6) for point in curve) for loss in losses)
        assert reference.seen.of(metrics.SPEED.exported, **tags)[0][1][-1] > 0
        ranks = {series["rank"] for series, _ in reference.seen.of(metrics.WORKER_SPEED.exported, **tags)}
        assert ranks == {str(rank) for rank in range(NUM_WORKERS[trial.arm_name])}


def test_trial_gauges_count_trials_by_state(reference: Reference):
    def reached(state: str) -> float:
        return max(max(each) for _, each in reference.seen.of(metrics.TRIALS.exported, experiment=NAME, state=state))

    # Four cores hold so many.
    assert 1 <= reached(metrics.TRAINING) <= 3
    ((_, complete),) = reference.seen.of(metrics.TRIALS.exported, experiment=NAME, state="complete")
    assert complete[-1] == len(ARMS)
    assert reached("failed") == reached("stopped") == 0


def test_gauge_keeps_value_without_updates(reference: Reference):
    kept = [
        tags for name, tags in reference.seen.now if name == metrics.TRIALS.exported and tags["experiment"] == "kept"
    ]
    assert sorted(tags["state"] for tags in kept) == sorted(metrics.STATES)
    ((_, complete),) = reference.seen.of(metrics.TRIALS.exported, experiment="kept", state="complete")
    assert set(complete) == {1}


def test_vllm_metrics_cover_both_engines(reference: Reference):
    tokens = sum(len(row["completion_token_ids"]) for arm in ("greedy", "soft") for row in rows_of(reference, arm))
    written = reference.seen.of("ray_vllm_generation_tokens_total")
    # A replica of Ray Serve has an id; Ray Data's engine has none.
    served = sum(values[-1] for series, values in written if series["ReplicaId"])
    assert served >= tokens
    assert sum(values[-1] for series, values in written if not series["ReplicaId"]) > 0
    assert reference.seen.of("ray_vllm_num_requests_running")


def test_separate_driver_has_its_own_job_metadata(reference: Reference):
    metadata = [job["metadata"] for job in reference.jobs if (job["metadata"] or {}).get("experiment") == "kept"]
    assert metadata == [{"job_name": "kept watch", "experiment": "kept", "stage": "watch"}]


def test_nodes_export_all_metrics_of_the_dashboard(reference: Reference):
    board = (Path(__file__).parents[2] / "cluster" / "grafana" / "raykd.json").read_text(encoding="utf-8")
    assert {metric.exported for metric in metrics.METRICS} <= set(reference.seen.values)
    assert all(metric.exported in board for metric in metrics.METRICS)
