"""Experiment files: validation messages, overrides, arms and round trips."""

import re
from pathlib import Path

import pytest
import yaml

from raykd.config.experiment import Experiment
from raykd.config.loading import dump_experiment, load_experiment
from raykd.errors import UserError
from raykd.tuning.variants import random_points, variants

ROOT = Path(__file__).parents[3]
SMALLEST = "name: small\nteacher: {model: a}\nstudent: {model: b}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Experiment:
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    return load_experiment(file, overrides)


def test_readme_experiment_is_valid(tmp_path: Path):
    (text,) = re.findall(r"```yaml\n(name: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    experiment = load(tmp_path, text)
    assert experiment.arm("soft").targets.kind == "top_k"
    assert next(iter(experiment.arms)) == "none"
    (swept,) = re.findall(r"```yaml\n(dataset: .*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.DOTALL)
    tree = yaml.safe_load(text) | yaml.safe_load(swept)
    del tree["arms"]["own"]
    experiment = load(tmp_path, yaml.safe_dump(tree))
    assert experiment.sweep
    drawn = dict.fromkeys(experiment.arms, random_points(experiment.sweep))
    assert len(variants(experiment, drawn)) == 16 * len(tree["arms"])


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configurations_load_and_round_trip(file: Path, tmp_path: Path):
    experiment = load_experiment(file)
    (tmp_path / "again.yaml").write_text(dump_experiment(experiment))
    assert load_experiment(tmp_path / "again.yaml") == experiment
    assert all(experiment.arm(name) for name in experiment.arms)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (SMALLEST + "techer: 1", [], ["techer: unknown key", "did you mean 'teacher'"]),
        (SMALLEST, ["train.lerning_rate=1"], ["train.lerning_rate: unknown key", "did you mean 'learning_rate'"]),
        (SMALLEST, ["train.learning_rate=fast"], ["train.learning_rate", "number", "'fast'"]),
        (SMALLEST, ["train=3"], ["train", "not 3"]),
        (SMALLEST, ["name=../other"], ["name", "'../other'"]),
        (SMALLEST, ["name.x=1"], ["name.x", "no keys below"]),
        (SMALLEST, ["name"], ["override 'name'", "key.path=value"]),
        (SMALLEST, ["seeds=[1, 1]"], ["seeds", "twice"]),
        (SMALLEST, ["storage=http://bucket"], ["storage", "s3://, gs://, abfs://"]),
        (SMALLEST, ["prompt.strategy=techer"], ["unknown strategy 'techer'", "did you mean 'teacher'"]),
        (SMALLEST, ["prompt.strategies={mine: {}}"], ["strategies.mine: has neither text nor exemplars"]),
        (SMALLEST, ["prompt.strategies={mine: {text: 'It is {answer}'}}"], ["placeholder ['answer']"]),
        (SMALLEST, ["arms={}"], ["arms is empty"]),
        (SMALLEST, ["arms={base: {}}"], ["arms: name 'base'"]),
        (SMALLEST, ["arms={../x: {}}"], ["arms: name '../x'"]),
        (SMALLEST, ["arms={a: {teacher.model: c}}"], ["arm 'a' overrides 'teacher.model'", "share"]),
        (SMALLEST, ["arms={a: {train.epoch: 2}}"], ["arm 'a'", "train.epoch: unknown key", "'epochs'"]),
        (SMALLEST, ["train.batch_size=9", "train.num_workers=2"], ["batch_size=9", "num_workers=2"]),
        (SMALLEST, ["dataset.source=jsonl"], ["dataset", "train_file"]),
        (SMALLEST, ["prompt.strategies={mine: {text: '  '}}"], ["strategies.mine: has neither text nor exemplars"]),
        (SMALLEST, ["loss.temperature=2"], ["temperature=2", "loss.missing_mass=renormalize"]),
        (SMALLEST, ["targets.kind=top_k", "teacher.engine.engine_kwargs={max_logprobs: 5}"], ["top_k=16", "=5"]),
        (
            SMALLEST,
            ["targets.kind=top_k", "teacher.engine.engine_kwargs={logprobs_mode: processed_logprobs}"],
            ["raw_logprobs", "'processed_logprobs'"],
        ),
        (SMALLEST, ["targets={rounds: 2, warmup_rounds: 2}"], ["warmup_rounds=2 leaves none of rounds=2"]),
        (SMALLEST, ["teacher.num_samples=4"], ["num_samples=4", "temperature above 0"]),
        (SMALLEST, ["teacher.replicas={min: 3, max: 2}"], ["min=3 is above max=2"]),
        ("- a list", [], ["mapping of keys"]),
        ("a: [", [], ["line 1, column 5: while parsing"]),
        ("name: !!bool maybe", [], ["not YAML"]),
        (SMALLEST, ["name=" + "[" * 3000], ["override 'name=[[", "(3,005 characters)", "nested too deeply"]),
        (SMALLEST, ["train.epochs=" + "x" * 200_000], ["train.epochs", "(200,002 characters)"]),
        (SMALLEST, ["storage=/data/mine #1"], ["override 'storage=/data/mine #1'", "'#' begins a comment"]),
        (
            SMALLEST + "arms:\n" + "".join(f"  a{number}: {{}}\n" for number in range(3000)),
            [],
            ["arms: 3,000 are more than 200", "sweep"],
        ),
        (SMALLEST, ["storage=''"], ["storage: is empty"]),
        (SMALLEST, ["storage=s3:/bucket/x"], ["storage 's3:/bucket/x'", "two slashes"]),
        (SMALLEST, ["storage=~nobody-of-this-name/x"], ["storage: '~nobody-of-this-name'", "home folder"]),
        (SMALLEST, ['arms={"one\\n": {}}'], ["arms: name 'one\\n' is not valid"]),
        (SMALLEST, ['prompt.strategies={"mine\\n": {text: x}}'], ["strategies: name 'mine\\n'"]),
        (
            SMALLEST,
            ["arms={a: {train.epochs: 3, train: {epochs: 4}}}"],
            ["arm 'a': train.epochs occurs twice"],
        ),
        (SMALLEST, ["teacher.timeout_s=.inf"], ["override", ".inf is not a finite number"]),
        (SMALLEST, ["teacher.engine.engine_kwargs={x: [.nan]}"], [".nan is not a finite number"]),
        *(
            (SMALLEST, [f"prompt.strategies={{mine: {{text: 'It is {{reference_answer{form}}}'}}}}"], ["a format"])
            for form in (":d", "!r", ":>5000000000")
        ),
        (SMALLEST, ["prompt.strategies={mine: {text: 'a { b'}}"], ["{{ and }} for plain braces"]),
        (SMALLEST, ["teacher.engine.engine_kwargs={max_num_seqs: 0}"], ["teacher.engine", "max_num_seqs", "not 0"]),
        (
            SMALLEST,
            ["evaluate.engine.engine_kwargs={gpu_memory_utilization: 1.5}"],
            ["evaluate.engine", "gpu_memory_utilization", "not 1.5"],
        ),
        ("name: small", [], ["teacher: is missing", "student: is missing"]),
    ],
)
def test_invalid_configuration_is_one_line_with_the_path(
    tmp_path: Path, text: str, overrides: list[str], words: list[str]
):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, text, *overrides)
    assert type(caught.value) is UserError, "the exception is pydantic's"
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        load_experiment("nowhere.yaml")
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        load_experiment("n" * 300)


def test_sweep_axis_is_set_by_its_dotted_field(tmp_path: Path):
    overrides = ("sweep.space.train.learning_rate={choice: [0.1, 0.2]}", "sweep.space.student.lora.r={choice: [4]}")
    experiment = load(tmp_path, SMALLEST, "dataset={num_train: 9, num_validation: 5, num_test: 5}", *overrides)
    assert experiment.sweep and sorted(experiment.sweep.space) == ["student.lora.r", "train.learning_rate"]


def test_max_model_len_minus_one_is_accepted(tmp_path: Path):
    kwargs = load(tmp_path, SMALLEST, "teacher.engine.engine_kwargs={max_model_len: -1}").teacher.engine.engine_kwargs
    assert kwargs == {"max_model_len": -1}


def test_arm_overrides_change_only_their_fields(tmp_path: Path):
    experiment = load(
        tmp_path, SMALLEST, "arms={plain: {}, soft: {prompt.strategy: teacher, targets.kind: top_k, train.epochs: 5}}"
    )
    plain, soft = experiment.arm("plain"), experiment.arm("soft")
    assert (soft.prompt.strategy, soft.targets.kind, soft.train.epochs) == ("teacher", "top_k", 5)
    assert soft.student == plain.student
    assert soft.train.model_copy(update={"epochs": plain.train.epochs}) == plain.train


def test_nested_overrides_keep_other_fields(tmp_path: Path):
    arms = "arms={a: {targets: {source: student, rollout: {max_tokens: 9}}, loss: {}}}"
    arm = load(tmp_path, SMALLEST, "targets.top_k=5", "targets.rollout.top_p=0.5", arms).arm("a")
    assert (arm.targets.source, arm.targets.top_k) == ("student", 5)
    assert (arm.targets.rollout.max_tokens, arm.targets.rollout.top_p) == (9, 0.5)


def test_custom_strategy_is_added_to_the_built_in_ones(tmp_path: Path):
    experiment = load(
        tmp_path,
        SMALLEST,
        "prompt.strategies={hint: {place: after, text: 'It is {reference_answer}.'}, teacher: {text: 'Teach.'}}",
        "prompt.strategy=hint",
    )
    assert experiment.strategies["hint"].text == "It is {reference_answer}."
    assert experiment.strategies["teacher"].text == "Teach."
    assert "ground_truth" in experiment.strategies


def test_overrides_are_parsed_as_yaml(tmp_path: Path):
    experiment = load(tmp_path, SMALLEST, "train.learning_rate=3e-4", "seeds=[0, 1]", "train.zero_stage=3")
    assert experiment.train.learning_rate == pytest.approx(3e-4)
    assert experiment.seeds == (0, 1)
    assert yaml.safe_load(dump_experiment(experiment))["train"]["zero_stage"] == 3


def test_seeds_outside_32_bits_are_refused(tmp_path: Path):
    assert load(tmp_path, SMALLEST, "seeds=[0, 20241219, 4294967295]").seeds == (0, 20241219, 2**32 - 1)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=r"seeds should be between 0 and 2\*\*32 - 1"):
            load(tmp_path, SMALLEST, f"seeds=[{seed}]")


@pytest.mark.parametrize(
    "path", ["env.HF_TOKEN", "env.AWS_SECRET_ACCESS_KEY", "engine_kwargs.hf_token", "env.my_api_key"]
)
def test_secrets_are_refused_and_not_repeated(tmp_path: Path, path: str):
    with pytest.raises(ValueError, match="is written down") as caught:
        load(tmp_path, SMALLEST, f"teacher.engine.{path}=hunter2")
    assert "hunter2" not in str(caught.value) and path.split(".")[1] in str(caught.value)


def test_token_counts_are_not_secrets(tmp_path: Path):
    found = load(tmp_path, SMALLEST, "teacher.engine.engine_kwargs.max_num_batched_tokens=512")
    assert found.teacher.engine.engine_kwargs == {"max_num_batched_tokens": 512}


def test_min_workers_requires_zero_stage_0(tmp_path: Path):
    def with_min_workers(min_workers: int, stage: int) -> Experiment:
        workers = f"num_workers: 4, min_workers: {min_workers}"
        return load(tmp_path, SMALLEST, f"train={{{workers}, zero_stage: {stage}, dtype: float32}}")

    assert with_min_workers(2, 0).train.min_workers == 2
    assert with_min_workers(4, 2).train.min_workers == 4
    with pytest.raises(ValueError, match="min_workers=5 is above num_workers=4"):
        with_min_workers(5, 0)
    with pytest.raises(ValueError, match=r"ZeRO stage 2 .*Set zero_stage=0"):
        with_min_workers(2, 2)


@pytest.mark.parametrize("typed", ["name.\n=1", 'arms={a: {"prompt.strategy": {"\\n": 1}}}', "x\ny=1"])
def test_control_characters_are_escaped_in_messages(typed: str):
    with pytest.raises(ValueError) as caught:
        load_experiment("configs/quickstart.yaml", [typed])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "written", ["{train.epochs: 3, loss.temperature: 1}", "{train: {epochs: 3}, loss.temperature: 1}"]
)
@pytest.mark.parametrize(
    ("override", "epochs"), [("arms.a.b.train.epochs=5", 5), ("arms.a.b.train={batch_size: 16}", 2)]
)
def test_override_of_an_arm_replaces_the_field_in_either_form(tmp_path: Path, written: str, override: str, epochs: int):
    experiment = load(tmp_path, SMALLEST + f"arms: {{a: {{}}, a.b: {written}}}\n", override)
    assert experiment.arm("a.b").train.epochs == epochs
    assert set(experiment.arms) == {"a", "a.b"}
    assert experiment.arm("a.b").loss.temperature == 1
