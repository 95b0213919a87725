"""A sweep's points: drawn by Tune, the same for every arm, and refused where they go with nothing."""

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


def found(space: dict[str, Any], **sweep: Any) -> list[Variant]:
    return everywhere(experiment(space, **sweep))


def everywhere(experiment: Experiment) -> list[Variant]:
    """Every arm at every point of a random search."""
    drawn = random_points(experiment.sweep) if experiment.sweep else []
    return variants(experiment, dict.fromkeys(experiment.arms, drawn))


def of_arm(variants: list[Variant], arm: str) -> list[Variant]:
    return [each for each in variants if each.arm_name == arm]


def test_without_a_sweep_there_are_the_arms():
    both = variants(Experiment.model_validate(TREE), {})
    assert [(each.config_id, each.values) for each in both] == [("hard", {}), ("soft", {})]


def test_every_arm_is_trained_at_the_same_points():
    drawn = found(SPACE, num_samples=5)
    hard, soft = of_arm(drawn, "hard"), of_arm(drawn, "soft")
    assert len(soft) == 10, "five points, each with both values of the grid"
    shared = {json.dumps({k: v for k, v in each.values.items() if k != "loss.temperature"}) for each in soft}
    assert {json.dumps(each.values) for each in hard} == shared
    # The grid's values are tried at equal values of all else.
    by_strategy = [
        [
            {k: v for k, v in each.values.items() if k != "prompt.strategy"}
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
            "what is not named stays"
        )
        assert 1 <= each.arm.loss.temperature <= 6
        assert each.arm.train.epochs in (1, 2, 3)


def test_loguniform_is_uniform_in_the_logarithm():
    drawn = random_points(experiment({"train.learning_rate": {"loguniform": [1e-5, 1e-1]}}, num_samples=400).sweep)  # type: ignore[arg-type]
    logs = sorted(math.log10(point["train.learning_rate"]) for point in drawn)
    # Kolmogorov's distance to the uniform distribution, at its 0.1 % limit.
    distance = max(abs((number + 0.5) / 400 - (value + 5) / 4) for number, value in enumerate(logs))
    assert distance < 1.95 / math.sqrt(400)


def test_the_same_sweep_draws_the_same_and_a_larger_one_adds_to_it():
    few, same, more = (found(SPACE, num_samples=n) for n in (3, 3, 6))
    assert [each.config_id for each in few] == [each.config_id for each in same]
    assert {each.config_id for each in few} < {each.config_id for each in more}
    assert {each.config_id for each in few}.isdisjoint(each.config_id for each in found(SPACE, num_samples=3, seed=1))


def test_a_field_that_plays_no_part_makes_no_trials():
    drawn = found({"loss.temperature": {"grid": [1, 2, 3]}})
    assert [each.values for each in of_arm(drawn, "hard")] == [{}]
    assert [each.values for each in of_arm(drawn, "soft")] == [{"loss.temperature": value} for value in (1, 2, 3)]


def test_lessons_are_found_back():
    named = arms_by_config_id(found(SPACE, num_samples=2))
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
def test_a_mistake_is_told_with_its_place(sweep: dict[str, Any], words: list[str], tmp_path: Path):
    file = tmp_path / "swept.yaml"
    file.write_text(json.dumps(TREE | {"sweep": sweep}))
    with pytest.raises(ValueError) as caught:
        everywhere(load_experiment(file))
    for word in words:
        assert word in str(caught.value)


def test_a_sweep_needs_validation_problems():
    problems = {"source": "demo", "num_train": 8, "num_test": 2}
    with pytest.raises(ValueError, match=r"set problems\.num_validation"):
        Experiment.model_validate(TREE | {"sweep": {}, "problems": problems})


def test_who_learns_from_its_own_answers_is_not_stopped_early():
    arms = {"own": {"targets.source": "student"}}
    with pytest.raises(ValueError, match=r"arm 'own' has targets\.source=student.*sweep\.scheduler=none"):
        Experiment.model_validate(TREE | {"sweep": {}, "arms": arms})
    Experiment.model_validate(TREE | {"sweep": {"scheduler": "none"}, "arms": arms})


def test_what_does_not_go_together_at_a_point_is_told_with_the_point():
    space = {"train.zero_stage": {"grid": [2, 0]}, "train.dtype": {"grid": ["float32", "bfloat16"]}}
    with pytest.raises(
        ValueError, match=r"arm 'hard' at train\.zero_stage=0, train\.dtype=.?bfloat16.?: .*zero_stage=0 with dtype"
    ):
        found(space)


def test_two_ways_of_saying_one_thing_are_one_point():
    drawn = found({"loss.divergence": {"grid": [None, "forward_kl"]}, "train.learning_rate": {"grid": [1, 1.0]}})
    assert [each.values for each in of_arm(drawn, "soft")] == [
        {"loss.divergence": "forward_kl", "train.learning_rate": 1.0}
    ]


def test_how_the_teacher_answers_is_searched_where_it_answers():
    tree = TREE | {"arms": {"taught": {}, "reference": {"targets.source": "reference"}}}
    space = {"teacher.sampling.temperature": {"grid": [0.0, 0.7]}, "teacher.num_samples": {"grid": [1]}}
    found = everywhere(Experiment.model_validate(tree | {"sweep": {"space": space, "num_samples": 1}}))
    assert [each.values.get("teacher.sampling.temperature") for each in of_arm(found, "taught")] == [0.0, 0.7]
    assert [each.values for each in of_arm(found, "reference")] == [{}]
