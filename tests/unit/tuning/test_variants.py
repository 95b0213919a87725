"""Points of a sweep: random draws that all arms share, and invalid configurations."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.tuning.variants import Variant, arm_of_config_id, arms_by_config_id, random_points, variants

TREE: dict[str, Any] = {
    "name": "swept",
    "dataset": {"source": "demo", "num_train": 8, "num_validation": 4, "num_test": 2},
    "teacher": {"model": "raykd/demo-teacher"},
    "student": {"model": "raykd/demo-student"},
    "loss": {"missing_mass": "renormalize"},
    "arms": {"hard": {}, "soft": {"targets.kind": "top_k", "loss.cross_entropy_weight": 0.5}},
    "seeds": [0, 1],
}
SPACE = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "student.lora": {"choice": [{"r": 4, "lora_alpha": 8}, {"r": 16, "lora_alpha": 32}]},
    "loss.temperature": {"uniform": [1, 6]},
    "train.epochs": {"randint": [1, 4]},
    "prompt.strategy": {"grid": ["none", "teacher"]},
}


def experiment(space: dict[str, Any], **sweep: Any) -> Experiment:
    return Experiment.model_validate(TREE | {"sweep": {"space": space, **sweep}})


def random_variants(space: dict[str, Any], **sweep: Any) -> list[Variant]:
    return all_variants(experiment(space, **sweep))


def all_variants(experiment: Experiment) -> list[Variant]:
    """Return every arm at every point of a random search."""
    drawn = random_points(experiment.sweep) if experiment.sweep else []
    return variants(experiment, dict.fromkeys(experiment.arms, drawn))


def variants_of(variants: list[Variant], arm: str) -> list[Variant]:
    return [each for each in variants if each.arm_name == arm]


def test_variants_without_a_sweep_are_the_arms():
    both = variants(Experiment.model_validate(TREE), {})
    assert [(each.config_id, each.hparams) for each in both] == [("hard", {}), ("soft", {})]


def test_all_arms_share_their_points():
    drawn = random_variants(SPACE, num_samples=5)
    hard, soft = variants_of(drawn, "hard"), variants_of(drawn, "soft")
    assert len(soft) == 10, "not five points at both values of the grid"
    shared = {json.dumps({k: v for k, v in each.hparams.items() if k != "loss.temperature"}) for each in soft}
    assert {json.dumps(each.hparams) for each in hard} == shared
    # The other fields are equal at both values of the grid.
    by_strategy = [
        [
            {k: v for k, v in each.hparams.items() if k != "prompt.strategy"}
            for each in soft
            if each.arm.prompt.strategy == s
        ]
        for s in ("none", "teacher")
    ]
    assert by_strategy[0] == by_strategy[1]
    for each in soft:
        assert 1e-4 <= each.arm.train.learning_rate <= 1e-2
        assert (each.arm.student.lora.r, each.arm.student.lora.lora_alpha) in ((4, 8), (16, 32))
        assert each.arm.student.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj"), (
            "an unnamed field changed"
        )
        assert 1 <= each.arm.loss.temperature <= 6
        assert each.arm.train.epochs in (1, 2, 3)


def test_loguniform_is_uniform_in_the_logarithm():
    drawn = random_points(experiment({"train.learning_rate": {"loguniform": [1e-5, 1e-1]}}, num_samples=400).sweep)  # type: ignore[arg-type]
    logs = sorted(math.log10(point["train.learning_rate"]) for point in drawn)
    # The Kolmogorov-Smirnov distance to the uniform distribution is below its 0.1 % critical value.
    distance = max(abs((number + 0.5) / 400 - (value + 5) / 4) for number, value in enumerate(logs))
    assert distance < 1.95 / math.sqrt(400)


def test_more_samples_add_points_to_the_same_ones():
    few, same, more = (random_variants(SPACE, num_samples=n) for n in (3, 3, 6))
    assert [each.config_id for each in few] == [each.config_id for each in same]
    assert {each.config_id for each in few} < {each.config_id for each in more}
    assert {each.config_id for each in few}.isdisjoint(
        each.config_id for each in random_variants(SPACE, num_samples=3, seed=1)
    )


def test_fields_without_effect_make_no_variants():
    drawn = random_variants({"loss.temperature": {"grid": [1, 2, 3]}})
    assert [each.hparams for each in variants_of(drawn, "hard")] == [{}]
    assert [each.hparams for each in variants_of(drawn, "soft")] == [{"loss.temperature": value} for value in (1, 2, 3)]


def test_arm_of_config_id_omits_point_hash():
    named = arms_by_config_id(random_variants(SPACE, num_samples=2))
    assert {arm_of_config_id(name) for name in named} == {"hard", "soft"}
    assert arm_of_config_id("own@0123abcd/warmup") == "own/warmup"
    assert arm_of_config_id("own/warmup") == "own/warmup"


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"space": {"train.learning_rat": {"grid": [1]}}}, ["sweep.space.train.learning_rat", "'train.learning_rate'"]),
        (
            {"space": {"teacher.model": {"choice": ["a"]}}},
            ["sweep.space.teacher.model: is not a field", "student.lora"],
        ),
        ({"space": {"train.epochs": {"grid": [1, 0]}}}, ["sweep.space.train.epochs", "greater than or equal to 1"]),
        ({"space": {"train.epochs": {"randint": [0, 3]}}}, ["sweep.space.train.epochs", "not 0"]),
        ({"space": {"train.dtype": {"choice": ["float16"]}}}, ["sweep.space.train.dtype", "float16"]),
        ({"space": {"train.epochs": {"loguniforn": [1, 2]}}}, ["loguniforn: unknown key", "'loguniform'"]),
        ({"space": {"train.epochs": {}}}, ["exactly one of grid, choice", "has none"]),
        ({"space": {"train.epochs": {"grid": [1], "choice": [2]}}}, ["exactly one", "has grid, choice"]),
        ({"space": {"train.learning_rate": {"uniform": [2, 1]}}}, ["uniform=[2, 1]", "below"]),
        ({"space": {"train.learning_rate": {"loguniform": [0, 1]}}}, ["loguniform=[0", "above 0"]),
        ({"space": {"targets.kind": {"grid": ["hard"]}}}, ["arm 'soft' sets targets.kind"]),
        ({"space": {"loss": {"grid": [{"temperature": 2}]}}}, ["arm 'soft' sets loss.cross_entropy_weight"]),
        ({"space": {"targets.source": {"grid": ["student"]}}}, ["targets.source=student", "define an arm"]),
        ({"space": {"prompt.strategy": {"grid": ["techer"]}}}, ["unknown strategy 'techer'"]),
        ({"space": {"targets": {"choice": [{"source": "student"}, {}]}}}, ["sweep.space.targets", "define an arm"]),
        ({"space": {"train.max_failures": {"grid": [0, 1]}}}, ["sweep.space.train.max_failures", "set it for all"]),
        ({"space": {"train.epochs": {"uniform": [1, 4]}}}, ["sweep.space.train.epochs", "integer"]),
        (
            {"search": "optuna", "space": {"teacher.sampling.temperature": {"uniform": [0, 1]}}},
            ["sweep.space.teacher.sampling.temperature", "use choice"],
        ),
        ({"search": "optuna"}, ["search=optuna", "at least one field in space"]),
        (
            {"search": "optuna", "space": {"train.epochs": {"grid": [1]}}},
            ["space.train.epochs", "grid is not supported"],
        ),
        ({"num_validations": 1}, ["num_validations=1", "scheduler=none"]),
        ({"num_sample": 3}, ["sweep.num_sample: unknown key", "'num_samples'"]),
    ],
)
def test_invalid_sweep_is_reported_with_its_path(sweep: dict[str, Any], words: list[str], tmp_path: Path):
    file = tmp_path / "swept.yaml"
    file.write_text(json.dumps(TREE | {"sweep": sweep}))
    with pytest.raises(ValueError) as caught:
        all_variants(load_experiment(file))
    for word in words:
        assert word in str(caught.value)


def test_sweep_needs_validation_problems():
    dataset = {"source": "demo", "num_train": 8, "num_test": 2}
    with pytest.raises(ValueError, match=r"set dataset\.num_validation"):
        Experiment.model_validate(TREE | {"sweep": {}, "dataset": dataset})


def test_on_policy_arm_cannot_be_stopped_early():
    arms = {"own": {"targets.source": "student"}}
    with pytest.raises(ValueError, match=r"arm 'own' has targets\.source=student.*sweep\.scheduler=none"):
        Experiment.model_validate(TREE | {"sweep": {}, "arms": arms})
    Experiment.model_validate(TREE | {"sweep": {"scheduler": "none"}, "arms": arms})


def test_invalid_point_is_reported_with_its_values():
    space = {"loss.temperature": {"grid": [1, 2]}, "loss.missing_mass": {"grid": ["renormalize", "bucket"]}}
    with pytest.raises(
        ValueError,
        match=r"arm 'hard' at loss\.temperature=2, loss\.missing_mass=.?bucket.?: .*temperature=2 with missing",
    ):
        random_variants(space)


def test_equal_settings_are_one_variant():
    drawn = random_variants(
        {"loss.divergence": {"grid": [None, "forward_kl"]}, "train.learning_rate": {"grid": [1, 1.0]}}
    )
    assert [each.hparams for each in variants_of(drawn, "soft")] == [
        {"loss.divergence": "forward_kl", "train.learning_rate": 1.0}
    ]


def test_teacher_sampling_is_searched_only_for_generating_arms():
    tree = TREE | {"arms": {"generated": {}, "reference": {"targets.source": "reference"}}}
    space = {"teacher.sampling.temperature": {"grid": [0.0, 0.7]}, "teacher.num_samples": {"grid": [1]}}
    every = all_variants(Experiment.model_validate(tree | {"sweep": {"space": space, "num_samples": 1}}))
    assert [each.hparams.get("teacher.sampling.temperature") for each in variants_of(every, "generated")] == [0.0, 0.7]
    assert [each.hparams for each in variants_of(every, "reference")] == [{}]
