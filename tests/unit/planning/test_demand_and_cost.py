"""Resource demand of the stages, and their tokens, hours and cost."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raykd import cli
from raykd.cluster import resources
from raykd.config.experiment import Experiment
from raykd.config.loading import dump_experiment, load_experiment
from raykd.planning import cost, demand, tables
from raykd.planning.cost import Rates
from raykd.storage import files, filesystem

ROOT = Path(__file__).parents[3]
GSM8K = ROOT / "configs" / "gsm8k"

# The fields of run.json that every run has.
FIRST_FIELDS = {"name": "earlier", "commands": ["raykd run a"], "started": "", "versions": {}}


def test_demand_has_a_placement_group_for_each_replica_trial_and_engine():
    experiment = load_experiment(
        GSM8K / "405b-awq-to-8b.yaml",
        ["teacher.engine.pipeline_parallel_size=2", "teacher.replicas={min: 1, max: 3}", "max_concurrent_trials=2"],
    )
    stage_demand = demand.resource_demand(experiment)
    assert [len(group) for group in stage_demand.generation] == [8, 8, 8]
    assert [len(group) for group in stage_demand.training] == [4, 4]
    assert [len(group) for group in stage_demand.evaluation] == [1]
    assert [len(group) for group in stage_demand.attention] == [1]
    every = [bundle for groups in stage_demand.stages().values() for group in groups for bundle in group]
    assert all(bundle == {"CPU": 1, "GPU": 1} for bundle in every)
    # The stages create the same bundles.
    assert list(stage_demand.generation[0]) == resources.engine_bundles(experiment.teacher.engine, "gpu")
    assert list(stage_demand.training[0]) == resources.trial_bundles(experiment.train, "gpu")


def test_demand_requests_the_configured_gpu_type():
    kinds = ["teacher.engine.accelerator_type=H100", "train.accelerator_type=L4", "attention.accelerator_type=A10G"]
    stage_demand = demand.resource_demand(load_experiment(GSM8K / "8b-to-1b.yaml", kinds))
    assert stage_demand.generation == (({"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001},),)
    assert stage_demand.training[0] == ({"CPU": 1, "GPU": 1, "accelerator_type:L4": 0.001},)
    assert stage_demand.evaluation == (({"CPU": 1, "GPU": 1},),)
    assert stage_demand.attention == (({"CPU": 1, "GPU": 1, "accelerator_type:A10G": 0.001},),)


def test_demand_without_gpus_requests_cores():
    experiment = load_experiment(ROOT / "configs" / "quickstart.yaml")
    stage_demand = demand.resource_demand(experiment, {"CPU": 2})
    assert stage_demand.generation == (({"CPU": 1},),)
    assert stage_demand.training == (({"CPU": 1}, {"CPU": 1}),) * 7
    assert stage_demand.evaluation == stage_demand.attention == (({"CPU": 1},),)


def test_demand_omits_unused_stages():
    experiment = load_experiment(
        ROOT / "configs" / "quickstart.yaml", ["arms={reference: {targets.source: reference}}", "attention=null"]
    )
    stage_demand = demand.resource_demand(experiment)
    assert stage_demand.generation == stage_demand.attention == ()


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ([], 3 * 5),
        (["seeds=[0, 1]"], 3 * 5 * 2),
        (["sweep.space={train.learning_rate: {grid: [0.01, 0.1]}, student.lora.r: {grid: [4, 8, 16]}}"], 3 * 5 * 6),
    ],
)
def test_number_of_trials_is_arms_by_points_by_seeds(overrides: list[str], number: int):
    experiment = load_experiment(ROOT / "configs" / "sweeps" / "demo.yaml", overrides)
    assert demand.num_trials(experiment) == number


def test_shared_completion_sets_are_counted_once():
    experiment = load_experiment(GSM8K / "405b-awq-to-8b.yaml")
    stages = {stage.stage: stage for stage in cost.stage_costs(experiment, Rates())}
    # Six strategies with 7,473 - 500 problems each; reference solutions are not generated.
    assert stages["Teacher generation"].rows == 6 * 6973
    assert stages["Teacher generation"].tokens == 6 * 6973 * 512
    assert stages["Teacher generation"].is_bound
    # Seven arms, three seeds, two epochs; all students and the base student are tested.
    assert stages["Training"].rows == 7 * 3 * 2 * 6973
    assert stages["Test evaluation"].rows == (7 * 3 + 1) * 1319
    soft = load_experiment(
        GSM8K / "405b-awq-to-8b.yaml", ["arms={a: {}, b: {targets.kind: top_k}, c: {loss.missing_mass: renormalize}}"]
    )
    assert next(each.rows for each in cost.stage_costs(soft, Rates())) == 6973
    sampled = load_experiment(
        GSM8K / "8b-to-1b.yaml", ["arms={a: {teacher: {num_samples: 4, sampling: {temperature: 1}}}}"]
    )
    assert next(each.rows for each in cost.stage_costs(sampled, Rates())) == 4 * 6973


def test_rollouts_scoring_and_validation_are_counted():
    arms = "arms={own: {targets: {source: student, kind: top_k}}, scored: {targets: {source: reference, kind: top_k}}}"
    experiment = load_experiment(ROOT / "configs" / "quickstart.yaml", [arms])
    stages = {stage.stage: stage for stage in cost.stage_costs(experiment, Rates())}
    assert stages["Teacher scoring"].rows == 800
    assert stages["Student rollouts"].rows == 2 * 800
    assert stages["Student rollouts"].tokens == 2 * 800 * 512
    swept = load_experiment(ROOT / "configs" / "sweeps" / "demo.yaml", ["sweep.test_top_n=2"])
    stages = {stage.stage: stage for stage in cost.stage_costs(swept, Rates())}
    validated = stages["Validation"].rows
    assert validated == 15 * swept.sweep.num_validations * swept.dataset.num_validation  # type: ignore[union-attr]
    assert stages["Test evaluation"].rows == (3 * 2 + 1) * swept.dataset.num_test  # type: ignore[operator]


def test_hours_and_cost_follow_from_rates_and_prices():
    prices = "prices={gpu_hour: 2.0, teacher_gpu_hour: 3.0}"
    experiment = load_experiment(
        GSM8K / "405b-awq-to-8b.yaml", [prices, "teacher.replicas={min: 1, max: 2}", "seeds=[0]"]
    )
    known = Rates(generation=1000, training=500, evaluation=2000, completion_tokens=200, answer_tokens=100)
    stages = {stage.stage: stage for stage in cost.stage_costs(experiment, known, concurrent_trials=2)}
    generation = stages["Teacher generation"]
    assert generation.tokens == 6 * 6973 * 200
    assert not generation.is_bound
    # Two replicas of four GPUs.
    assert generation.hours == pytest.approx(6 * 6973 * 200 / 2000 / 3600)
    assert generation.processor_hours == pytest.approx(8 * 6 * 6973 * 200 / 2000 / 3600)
    assert generation.cost == pytest.approx(3.0 * 8 * 6 * 6973 * 200 / 2000 / 3600)
    trained = stages["Training"]
    # Concurrent trials shorten the wall-clock time, not the processor hours.
    assert trained.processor_hours == pytest.approx(7 * 2 * 6973 * 200 / 500 / 3600)
    assert trained.processor_hours is not None
    assert trained.hours == pytest.approx(trained.processor_hours / 8)
    assert trained.cost == pytest.approx(2.0 * trained.processor_hours)
    alone = {stage.stage: stage for stage in cost.stage_costs(experiment, known)}["Training"]
    assert alone.processor_hours == pytest.approx(trained.processor_hours)


def test_problems_of_files_are_counted(tmp_path: Path):
    for name, lines in (("train", 5), ("test", 3)):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n' * lines + "\n")
    files_config = {
        "source": "jsonl",
        "train_file": str(tmp_path / "train.jsonl"),
        "test_file": str(tmp_path / "test.jsonl"),
    }
    tree = {"name": "a", "teacher": {"model": "b"}, "student": {"model": "c"}}
    experiment = Experiment.model_validate({**tree, "dataset": {**files_config, "num_validation": 2, "num_test": 2}})
    assert demand.num_problems(experiment.dataset) == (3, 2)
    without_file = Experiment.model_validate({**tree, "dataset": {**files_config, "train_file": "nowhere.jsonl"}})
    assert demand.num_problems(without_file.dataset) == (None, 3)
    assert cost.stage_costs(without_file, Rates(generation=1))[0].hours is None


def test_rates_are_measured_from_an_earlier_run(storage: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match=r"has no run\.json"):
        cost.measured_rates(storage)
    experiment = load_experiment(
        ROOT / "configs" / "quickstart.yaml", ["teacher.replicas={min: 1, max: 2}", "prices.cpu_hour=0.05"]
    )
    files.write_text(storage / "experiment.yaml", dump_experiment(experiment))
    generated = {"completion_tokens": 1000, "seconds": 5.0, "rows": 12, "errors": 2}
    scored = {"source": "reference", "completion_tokens": 10**6, "seconds": 1.0, "rows": 1, "errors": 0}
    run: dict[str, Any] = {
        **FIRST_FIELDS,
        "completions": [generated, {**generated, "source": "teacher"}, scored],
        "stages": {"evaluate": 4.0},
    }
    run["processor_seconds"] = {"teacher": {"cpu": 5.0}, "evaluate": {"cpu": 4.0}}
    files.write_json(storage / "run.json", run)
    for name, tokens, workers in (("a", 600, 2), ("b", 400, 1)):
        points = [{"step": 1, "loss": 1.5, "target_tokens": tokens // 2, "seconds": 1.0, "num_workers": workers}]
        points.append({"step": 2, "loss": 1.0, "target_tokens": tokens, "seconds": 2.0, "num_workers": workers})
        curve = "".join(json.dumps(each) + "\n" for each in points)
        filesystem.put(storage / "trials" / name / "metrics.jsonl", curve.encode())
    answers = pa.table({"num_tokens": [10, 30, 99], "error": ["", "", "lost"]})
    files.write_table(storage / "predictions.parquet", answers)
    found = cost.measured_rates(storage)
    assert found.generation == 2000 / 11 / 2
    assert found.completion_tokens == 100
    assert found.training == 1000 / (2 * 2 + 2)
    assert (found.evaluation, found.answer_tokens) == (10, 20)
    # Without a cluster, `auto` is the accelerator of the rates.
    assert found.accelerator == "cpu"
    stages = tables.plan_tables(experiment, None, found)[0][-2]
    assert set(stages.columns[-1].cells) == {"CPU"}
    priced = {
        each.price
        for each in cost.stage_costs(experiment, found, demand.UNKNOWN_CLUSTER[found.accelerator])
        if each.hours
    }
    assert priced == {0.05}
    # The command line reads the same rates.
    assert cli.main(["plan", str(ROOT / "configs" / "quickstart.yaml"), "--rates-from", str(storage)]) == 0
    assert "".join(f"measured in {storage}".split()) in "".join(capsys.readouterr().out.split())


def test_interrupted_run_has_no_rates(tmp_path: Path):
    files.write_json(tmp_path / "run.json", FIRST_FIELDS)
    assert cost.measured_rates(tmp_path) == Rates(source=f"measured in {tmp_path}")
