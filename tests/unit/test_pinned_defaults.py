"""Defaults of the fields that may be in a key. Keys leave defaults out, so a default must not change unnoticed."""

from typing import Any, get_args

from raykd import identity
from raykd.config.base import ConfigModel, is_runtime_only
from raykd.config.experiment import Experiment
from raykd.config.strategies import Exemplar

DEFAULTS: dict[str, Any] = {
    "Experiment.dataset": {"num_train": 1000, "num_test": 300},
    "Experiment.prompt": {},
    "Experiment.targets": {},
    "Experiment.loss": {},
    "Experiment.train": {},
    "Experiment.evaluate": {},
    "Experiment.attention": {},
    "Experiment.arms": {"default": {}},
    "Experiment.seeds": [0],
    "Experiment.sweep": None,
    "Dataset.source": "demo",
    "Dataset.train_file": None,
    "Dataset.test_file": None,
    "Dataset.revision": "main",
    "Dataset.num_train": None,
    "Dataset.num_validation": 0,
    "Dataset.num_test": None,
    "Dataset.seed": 0,
    "Teacher.revision": None,
    "Teacher.trust_remote_code": False,
    "Teacher.engine": {},
    "Teacher.endpoint": None,
    "Teacher.sampling": {},
    "Teacher.num_samples": 1,
    "Student.revision": None,
    "Student.trust_remote_code": False,
    "Student.lora": {},
    "Prompt.strategy": "none",
    "Prompt.instruction": "End with a line of the form '#### 42' that holds the final number alone.",
    "Prompt.strategies": {},
    "Targets.source": "teacher",
    "Targets.kind": "hard",
    "Targets.top_k": 16,
    "Targets.filter": "all",
    "Targets.deduplicate": False,
    "Targets.rounds": 4,
    "Targets.warmup_rounds": 0,
    "Targets.rollout": {"temperature": 1.0},
    "Loss.divergence": None,
    "Loss.missing_mass": "bucket",
    "Loss.temperature": 1.0,
    "Loss.cross_entropy_weight": 0.0,
    "Train.epochs": 2,
    "Train.batch_size": 32,
    "Train.learning_rate": 0.0002,
    "Train.warmup_fraction": 0.05,
    "Train.weight_decay": 0.0,
    "Train.max_grad_norm": 1.0,
    "Train.max_length": 2048,
    "Train.dtype": "bfloat16",
    "Evaluate.protocol": "zero_shot_chat",
    "Evaluate.engine": {},
    "Evaluate.sampling": {},
    "Evaluate.num_samples": 1,
    "Evaluate.stop": None,
    "Attention.num_problems": 100,
    "Attention.dtype": None,
    "Sweep.space": {},
    "Sweep.search": "random",
    "Sweep.num_samples": 8,
    "Sweep.scheduler": "asha",
    "Sweep.reduction_factor": 2,
    "Sweep.metric": "accuracy",
    "Sweep.num_validations": 4,
    "Sweep.test_top_n": None,
    "Sweep.seed": 0,
    "Engine.engine_kwargs": {},
    "Endpoint.identity": None,
    "Endpoint.model": None,
    "Endpoint.api": "completions",
    "Sampling.temperature": 0.0,
    "Sampling.top_p": 1.0,
    "Sampling.max_tokens": 512,
    "Sampling.seed": 0,
    "Lora.r": 16,
    "Lora.lora_alpha": 32,
    "Lora.lora_dropout": 0.0,
    "Lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "Strategy.place": "before",
    "Strategy.text": "",
    "Strategy.exemplars": [],
    "Strategy.version": 1,
    "Axis.grid": [],
    "Axis.choice": [],
    "Axis.uniform": None,
    "Axis.loguniform": None,
    "Axis.randint": None,
}


def defaults() -> dict[str, Any]:
    """Return the default of each field that may be in a key, by class and name."""
    found = {}
    sections: list[type[ConfigModel]] = [Experiment, Exemplar]
    for section in sections:
        for name, field in section.model_fields.items():
            if is_runtime_only(section, name):
                continue
            sections += [each for each in sections_in(field.annotation) if each not in sections]
            if not field.is_required():
                default = field.get_default(call_default_factory=True)
                found[f"{section.__name__}.{name}"] = identity._plain(default, with_defaults=False)
    return found


def sections_in(annotation: Any) -> list[type[ConfigModel]]:
    if isinstance(annotation, type) and issubclass(annotation, ConfigModel):
        return [annotation]
    return [each for inner in get_args(annotation) for each in sections_in(inner)]


def test_defaults_are_pinned():
    """A key omits defaults, so a changed default would reuse old results."""
    found = defaults()
    other = {path: (DEFAULTS[path], found.get(path)) for path in DEFAULTS if DEFAULTS[path] != found.get(path)}
    assert not other, f"changed defaults (old, new): raise identity.VERSIONS of the kinds they affect: {other}"
    assert not found.keys() - DEFAULTS.keys(), "add the defaults of new fields here"
