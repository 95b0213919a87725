"""Plan and preflight: conflicts and shortages are reported before anything starts."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from raykd.config.experiment import Experiment
from raykd.config.run_record import read_run
from raykd.errors import UserError
from raykd.models.builtin import resolve_model
from raykd.pipeline import preflight, run, run_record
from raykd.pipeline.plan import STAGES, Plan, resolve
from raykd.storage import provenance
from raykd.storage.paths import ExperimentPaths
from raykd.training import checkpoints
from runs import started_plan


def experiment_in(tmp_path: Path, **tree: Any) -> Experiment:
    experiment: dict[str, Any] = {
        "name": "small",
        "storage": str(tmp_path),
        "dataset": {"source": "demo", "num_train": 20, "num_test": 2},
        "teacher": {"model": "raykd/demo-teacher"},
        "student": {"model": "raykd/demo-student"},
    }
    return Experiment.model_validate(experiment | tree)


def prepare(tmp_path: Path, **tree: Any) -> Plan:
    return started_plan(experiment_in(tmp_path, **tree))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (
            {"targets": {"source": "student", "rounds": 3}, "train": {"batch_size": 40, "epochs": 2}},
            ["rounds=3", "2 optimizer"],
        ),
        ({"teacher": {"model": "nowhere/at-all"}}, ["model 'nowhere/at-all'"]),
    ],
)
def test_conflicting_settings_are_refused(tmp_path: Path, tree: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as caught:
        prepare(tmp_path, **tree)
    for word in words:
        assert word in str(caught.value)


def test_soft_targets_need_one_tokenizer(tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(resolve_model("raykd/demo-student")).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    vocabulary = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(vocabulary.replace('"<|end|>"', '"<|over|>"'))
    settings = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(settings.replace("<|end|>", "<|over|>"))
    student = {"model": str(other)}
    with pytest.raises(ValueError, match=r"arm 'default': soft targets need one tokenizer.*targets\.kind=hard"):
        prepare(tmp_path, student=student, targets={"kind": "top_k"})
    assert not any(trial.same_tokens for trial in prepare(tmp_path, student=student, name="hard").trials)


def test_resolve_writes_nothing(tmp_path: Path):
    (tmp_path / "storage").mkdir()
    tree: dict[str, Any] = {
        "name": "small",
        "storage": str(tmp_path / "storage"),
        "dataset": {"source": "demo", "num_train": 20, "num_test": 2},
        "teacher": {"model": "raykd/demo-teacher"},
        "student": {"model": "raykd/demo-student"},
    }
    plan = resolve(Experiment.model_validate(tree))
    assert list((tmp_path / "storage").iterdir()) == []
    # The plan has the same trials and completions after its files are written.
    ids = [trial.trial_id for trial in plan.trials]
    run.start(plan, "raykd run small.yaml")
    again = resolve(Experiment.model_validate(tree))
    assert [trial.trial_id for trial in again.trials] == ids
    assert [each.folder for each in again.required_sets] == [each.folder for each in plan.required_sets]
    assert (plan.problems / "train.parquet").is_file() and (plan.folder / "run.json").is_file()
    written = sorted((tmp_path / "storage").rglob("*"))
    with pytest.raises(UserError, match="2 optimizer steps"):
        late = {"targets": {"source": "student", "rounds": 3}, "train": {"batch_size": 40, "epochs": 2}}
        resolve(Experiment.model_validate({**tree, "name": "late", **late}))
    assert sorted((tmp_path / "storage").rglob("*")) == written


ON_POLICY = {"targets": {"source": "student", "kind": "top_k", "rounds": 2}, "train": {"batch_size": 5}}


@pytest.mark.parametrize(
    ("tree", "resources", "words"),
    [
        ({"train": {"num_workers": 4, "batch_size": 8}}, {"CPU": 3}, ["a trial needs 4 CPU", "the cluster has 3"]),
        ({}, {"CPU": 1}, ["teacher.engine", "2 CPU"]),
        (
            {"teacher": {"model": "raykd/demo-teacher", "engine": {"engine_kwargs": {"max_model_len": 520}}}},
            {"CPU": 2},
            ["teacher, strategy 'none'", "of 20 prompts", "520 tokens", "raise teacher.engine"],
        ),
        # The students' prompts are checked before the teacher starts.
        (
            {"evaluate": {"engine": {"engine_kwargs": {"max_model_len": 520}}}},
            {"CPU": 2},
            ["students: ", "of 2 prompts", "520 tokens", "raise evaluate.engine"],
        ),
        (
            {
                **ON_POLICY,
                "teacher": {"model": "raykd/demo-teacher", "engine": {"engine_kwargs": {"max_model_len": 520}}},
            },
            {"CPU": 2},
            ["teacher, strategy 'none'", "520 tokens"],
        ),
        (
            {**ON_POLICY, "evaluate": {"engine": {"engine_kwargs": {"max_model_len": 520}}}},
            {"CPU": 2},
            ["student of arm 'default'", "of 20 prompts", "520 tokens"],
        ),
    ],
)
def test_preflight_reports_settings_that_do_not_fit(
    tmp_path: Path, tree: dict[str, Any], resources: dict[str, float], words: list[str]
):
    plan = prepare(tmp_path, **tree)
    with pytest.raises(ValueError) as caught:
        preflight.preflight(plan, resources)
    for word in words:
        assert word in str(caught.value)


def test_preflight_reports_missing_vllm_with_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = prepare(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"teacher\.engine and evaluate\.engine: vLLM is not installed.*raykd\[gpu\]"):
        preflight.preflight(plan, {"CPU": 4})
    with pytest.raises(UserError, match=r"^evaluate\.engine: vLLM is not installed"):
        preflight.preflight(plan, {"CPU": 4}, ["evaluate"])
    # Training needs no engine.
    preflight.preflight(plan, {"CPU": 4}, ["train"])


def refused_stages(plan: Plan, resources: dict[str, float]) -> list[str]:
    """Return the stages that do not fit."""
    stages = []
    for stage in ("generate", "train", "evaluate"):
        try:
            preflight.preflight(plan, resources, [stage])
        except ValueError:
            stages.append(stage)
    return stages


def test_preflight_checks_only_selected_stages(tmp_path: Path):
    plan = prepare(tmp_path, train={"num_workers": 4, "batch_size": 8})
    assert refused_stages(plan, {"CPU": 4}) == []
    assert refused_stages(plan, {"CPU": 3}) == ["train"]
    # An engine and the pipeline need a core each.
    assert refused_stages(plan, {"CPU": 1}) == ["generate", "train", "evaluate"]


def test_corrected_experiment_keeps_its_name(tmp_path: Path):
    with pytest.raises(ValueError, match="rounds=3"):
        prepare(tmp_path, targets={"source": "student", "rounds": 3}, train={"batch_size": 40})
    prepare(tmp_path, targets={"source": "student", "rounds": 2}, train={"batch_size": 40})


def test_experiment_that_does_not_fit_leaves_no_record(tmp_path: Path):
    too_large: dict[str, Any] = {"train": {"num_workers": 4, "batch_size": 8}}
    plan = resolve(experiment_in(tmp_path, **too_large))
    with pytest.raises(UserError, match="a trial needs 4 CPU"):
        run.check_and_start(plan, "raykd run small.yaml", {"CPU": 2})
    assert not plan.folder.exists()
    # Its results differ, so the two experiments cannot share a folder.
    smaller = resolve(experiment_in(tmp_path, train={"batch_size": 4}, prompt={"instruction": "Think."}))
    run.check_and_start(smaller, "raykd run small.yaml", {"CPU": 2})
    assert (smaller.folder / "run.json").is_file()


def test_number_of_workers_changes_no_trial_id(tmp_path: Path):
    plan = prepare(tmp_path, train={"num_workers": 2, "zero_stage": 2, "batch_size": 4})
    more = prepare(tmp_path, train={"num_workers": 4, "zero_stage": 2, "batch_size": 4, "packing": False})
    assert [trial.trial_id for trial in plan.trials] == [trial.trial_id for trial in more.trials]
    preflight.preflight(more, {"CPU": 8}, ["train"])
    # A checkpoint of two workers: four workers cannot read its optimizer shards.
    (trial,) = plan.trials
    part = ExperimentPaths(plan.folder).checkpoints / trial.trial_id / "checkpoint_1"
    checkpoints.write_checksums(part, 0, num_workers=2, zero_stage=2)
    preflight.preflight(plan, {"CPU": 8}, ["train"])
    with pytest.raises(UserError, match="interrupted with train"):
        preflight.preflight(more, {"CPU": 8})


def test_record_names_commands_that_did_work(tmp_path: Path):
    plan = resolve(experiment_in(tmp_path))
    for _ in range(2):
        run.start(plan, "raykd train a")
        run.check_and_start(plan, "raykd run a", {"CPU": 4}, ["train"])
        run.start(plan, "raykd evaluate a")
    # The first one is recorded in any case: another experiment may have done its work.
    assert read_run(plan.folder).commands == ("raykd train a", "raykd run a")


def test_record_keeps_the_versions_that_made_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = resolve(experiment_in(tmp_path))
    run.check_and_start(plan, "raykd run a", {"CPU": 4}, ["train"])
    made_with = read_run(plan.folder).versions
    assert made_with["torch"]
    other = provenance.provenance() | {"versions": {"torch": "0.0.1"}}
    monkeypatch.setattr(run_record, "provenance", lambda: other)
    run.start(plan, "raykd run a")
    assert read_run(plan.folder).versions == made_with
    run.check_and_start(plan, "raykd run a", {"CPU": 4}, ["train"])
    assert read_run(plan.folder).versions == {"torch": "0.0.1"}


def test_lost_run_record_is_noticed(tmp_path: Path):
    plan = resolve(experiment_in(tmp_path))
    run.start(plan, "raykd run a")
    record = ExperimentPaths(plan.folder).run_record
    written = record.read_text()
    record.unlink()
    with pytest.raises(UserError, match=r"run\.json is missing, which names the models.*restore it"):
        resolve(experiment_in(tmp_path))
    record.write_text("{}")
    with pytest.raises(UserError, match=r"run\.json: name: is missing"):
        resolve(experiment_in(tmp_path))
    record.write_text(written.replace('"stages": {}', '"stages": []'))
    with pytest.raises(UserError, match=r"run\.json: stages: "):
        resolve(experiment_in(tmp_path))
    record.write_text(written)
    assert resolve(experiment_in(tmp_path)).folder == plan.folder


def test_stage_with_nothing_to_do_is_complete(tmp_path: Path):
    plan = prepare(tmp_path, targets={"source": "reference"}, attention=None)
    assert [stage for stage in STAGES if plan.is_complete([stage])] == ["generate", "attention"]
    assert not plan.is_complete()


def test_changed_model_files_are_refused(tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(resolve_model("raykd/demo-student"), model)
    prepare(tmp_path, student={"model": str(model)})
    prepare(tmp_path, student={"model": str(model)})
    settings = model / "config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(ValueError, match=r"started with other content: the student was .* name of its own"):
        prepare(tmp_path, student={"model": str(model)})


def test_trial_ids_change_only_with_fields_that_affect_training(tmp_path: Path):
    def ids(**tree: Any) -> set[str]:
        arms = {
            "hard": {},
            "soft": {"targets.kind": "top_k"},
            "own": {"targets": {"source": "student", "kind": "top_k"}, "train": {"batch_size": 5}},
        }
        return {trial.trial_id for trial in prepare(tmp_path, **{"arms": arms, **tree}).trials}

    def changed(name: str, **tree: Any) -> set[str]:
        return {trial_id.split("-")[0] for trial_id in ids(name=name, **tree) - ids()}

    assert changed("same") == set()
    assert changed("rounds", targets={"rounds": 2}) == {"own"}
    assert changed("top_k", targets={"top_k": 8}) == {"soft", "own"}
    assert changed("loss", loss={"divergence": "reverse_kl"}) == {"soft"}, "reverse_kl is the default of on-policy arms"
    assert changed("runtime", train={"checkpoint_every_steps": 7}) == set()
    assert changed("epochs", train={"epochs": 3}) == {"hard", "soft", "own"}


def test_completion_sets_cover_all_points_of_a_sweep(tmp_path: Path):
    space = {
        "prompt.strategy": {"grid": ["teacher", "confidence"]},
        "targets.top_k": {"grid": [4, 8]},
        "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    }
    arms = {"soft": {"targets.kind": "top_k"}, "hard": {}}
    dataset = {"source": "demo", "num_train": 20, "num_validation": 10, "num_test": 2}
    plan = prepare(tmp_path, arms=arms, dataset=dataset, sweep={"space": space, "num_samples": 3})
    assert len(plan.trials) == 3 * 4 + 3 * 2
    assert [(each.strategy_name, each.top_k) for each in plan.required_sets] == [
        ("teacher", 8),
        ("confidence", 8),
    ]
    assert {trial.completions for trial in plan.trials} == {each.folder for each in plan.required_sets}
    assert [usage.arms for usage in plan.teacher_usages] == [["soft", "hard"], ["soft", "hard"]]
