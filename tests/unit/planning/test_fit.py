"""Fit of stages on a cluster, and the suggestions for those that do not fit."""

import re
from pathlib import Path

import pytest

from raykd.cluster.nodes import ClusterSpec, NodeGroup
from raykd.config.engine import Engine
from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.models import architecture
from raykd.planning import suggest
from raykd.planning.fit import fit_stages, refusal_message

ROOT = Path(__file__).parents[3]
GSM8K = ROOT / "configs" / "gsm8k"
BF16, FP8 = "meta-llama/Llama-3.1-405B-Instruct", "meta-llama/Llama-3.1-405B-Instruct-FP8"
INT4 = "hugging-quants/Meta-Llama-3.1-405B-Instruct-AWQ-INT4"


def cluster(count: int, gpus: int, kind: str) -> ClusterSpec:
    worker = {"CPU": 96.0, "GPU": float(gpus), f"accelerator_type:{kind}": 1.0}
    return ClusterSpec("a test", (NodeGroup("head", 1, {"CPU": 8.0}), NodeGroup(kind, count, worker)))


def experiment_of(file: str, *overrides: str) -> Experiment:
    return load_experiment(GSM8K / file, overrides)


def refusal(experiment: Experiment, spec: ClusterSpec | None) -> str:
    teacher = architecture.find_shape(experiment.teacher.model, None, experiment.teacher.engine.engine_kwargs)
    return refusal_message(fit_stages(experiment, teacher, architecture.find_shape(experiment.student.model), spec))


@pytest.mark.parametrize("file", [*sorted(GSM8K.glob("*.yaml")), *sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))])
def test_shipped_configurations_fit_their_target_clusters(file: Path):
    target_clusters = {
        "405b-awq-to-8b": cluster(1, 4, "A100-80G"),
        "405b-fp8-to-8b": cluster(1, 8, "H100"),
        "70b-to-8b": cluster(1, 4, "A100-80G"),
        "8b-to-1b": cluster(1, 1, "A100-40G"),
        "one-24gb-gpu": cluster(1, 1, "L4"),
        "demo": ClusterSpec("two cores", (NodeGroup("head", 1, {"CPU": 2.0}),)),
        "paper": cluster(1, 4, "H100"),
    }
    experiment = load_experiment(file)
    assert refusal(experiment, target_clusters[file.stem]) == ""
    assert refusal(experiment, None) == ""


@pytest.mark.parametrize("cores", [2, 1])
def test_quickstart_fits_two_cores_but_not_one(cores: int):
    spec = ClusterSpec("this machine", (NodeGroup("head", 1, {"CPU": float(cores)}),))
    message = refusal(load_experiment(ROOT / "configs" / "quickstart.yaml"), spec)
    assert (message == "") == (cores == 2)
    assert "train: needs 2 CPU, the cluster has 1" in message or cores == 2


@pytest.mark.parametrize(
    ("model", "tensor", "pipeline", "spec", "words"),
    [
        (INT4, 4, 1, cluster(1, 4, "A100-80G"), ""),
        (FP8, 8, 1, cluster(1, 8, "H100"), ""),
        # The layout that the configuration's comment gives for nodes of four GPUs.
        (FP8, 4, 2, cluster(2, 4, "H100"), ""),
        (FP8, 4, 1, cluster(2, 4, "H100"), "closest fit: teacher.engine.pipeline_parallel_size=2"),
        (BF16, 8, 2, cluster(2, 8, "A100-80G"), ""),
        (BF16, 8, 1, cluster(2, 8, "A100-80G"), "closest fit: teacher.engine.pipeline_parallel_size=2"),
        (BF16, 8, 1, cluster(1, 8, "A100-80G"), "no other layout"),
        (BF16, 8, 1, cluster(1, 8, "H200"), ""),
        (BF16, 16, 1, cluster(1, 8, "H200"), "closest fit: teacher.engine.tensor_parallel_size=8"),
        (
            INT4,
            2,
            1,
            cluster(1, 8, "H100"),
            "a process needs 1.*closest fit: teacher.engine.tensor_parallel_size=4",
        ),
    ],
)
def test_teachers_fit_published_clusters(model: str, tensor: int, pipeline: int, spec: ClusterSpec, words: str):
    overrides = (
        f"teacher={{model: {model}, engine: {{tensor_parallel_size: {tensor}, pipeline_parallel_size: {pipeline}, "
    )
    experiment = experiment_of(
        "405b-fp8-to-8b.yaml", overrides + "engine_kwargs: {max_model_len: 4096}}}", "train.num_workers=4"
    )
    found = [each for each in refusal(experiment, spec).split(". ") if each.startswith("teacher")]
    if words:
        assert found
        assert re.search(words, found[0])
    else:
        assert not found


@pytest.mark.parametrize(
    ("model", "tensor", "pipeline", "words"),
    [
        ("meta-llama/Llama-3.1-8B", 5, 1, "32 attention heads cannot be divided by tensor_parallel_size=5"),
        ("meta-llama/Llama-3.2-3B", 16, 1, "24 attention heads cannot be divided"),
        ("meta-llama/Llama-3.2-3B", 12, 1, "8 KV heads and tensor_parallel_size=12"),
        ("meta-llama/Llama-3.2-1B", 1, 17, "16 layers cannot be divided by pipeline_parallel_size=17"),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", 32, 1, "quantization groups of 128 weights"),
        ("meta-llama/Llama-3.1-405B", 16, 5, ""),
        ("meta-llama/Llama-3.1-8B", 16, 3, ""),
        ("raykd/demo-teacher", 4, 1, "6 attention heads cannot be divided"),
    ],
)
def test_invalid_sharding_is_refused(model: str, tensor: int, pipeline: int, words: str):
    shape = architecture.find_shape(model)
    assert shape is not None
    engine = Engine(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    found = suggest.sharding_error(shape, engine)
    assert found.startswith(words) if words else found == ""


def test_length_above_the_models_maximum_is_refused():
    message = refusal(experiment_of("one-24gb-gpu.yaml", "teacher.engine.engine_kwargs={max_model_len: 200000}"), None)
    assert "max_model_len=200000 is above the model's maximum of 131072" in message
    assert "teacher.engine.engine_kwargs.max_model_len=131072" in message


def test_shorter_context_is_suggested_last():
    experiment = experiment_of("8b-to-1b.yaml", "teacher.engine.engine_kwargs={}")
    assert "closest fit: teacher.engine.engine_kwargs.max_model_len=16384" in refusal(experiment, cluster(1, 1, "L4"))
    # With more GPUs, tensor parallelism is the smaller change.
    assert "closest fit: teacher.engine.tensor_parallel_size=2" in refusal(experiment, cluster(1, 4, "L4"))


@pytest.mark.parametrize(
    ("overrides", "spec", "nearest_that_fits"),
    [
        (["train.max_length=1024"], cluster(1, 1, "A10G"), "train.gradient_checkpointing=true"),
        (
            ["train={num_workers: 1, micro_batch_size: 8, max_length: 4096, gradient_checkpointing: true}"],
            cluster(1, 1, "A10G"),
            "train.micro_batch_size=2",
        ),
        (
            ["train={num_workers: 1, micro_batch_size: 1, max_length: 32768, gradient_checkpointing: true}"],
            cluster(1, 1, "A10G"),
            "train.max_length=8192",
        ),
        (
            ["student.model=meta-llama/Llama-3.1-70B", "train={num_workers: 16, micro_batch_size: 1, max_length: 512}"],
            cluster(2, 8, "A100-80G"),
            "train.zero_stage=3",
        ),
        (["train.num_workers=8"], cluster(1, 4, "H100"), "train.num_workers=4"),
    ],
)
def test_training_that_does_not_fit_gets_a_suggestion(overrides: list[str], spec: ClusterSpec, nearest_that_fits: str):
    experiment = experiment_of("70b-to-8b.yaml", "train.num_workers=1", *overrides)
    (message,) = [each for each in refusal(experiment, spec).split(". ") if each.startswith("train")]
    suggestion = message.split("closest fit: ")[1]
    assert nearest_that_fits in suggestion.split()
    # Training fits with the suggestion applied.
    assert "train: " not in refusal(
        experiment_of("70b-to-8b.yaml", "train.num_workers=1", *overrides, *suggestion.split()), spec
    )


def test_gpu_without_bfloat16_support_is_reported():
    message = refusal(experiment_of("one-24gb-gpu.yaml"), cluster(1, 1, "T4"))
    assert "train: T4 does not support bfloat16" in message
    # Engines with 4-bit weights compute in float16.
    assert "teacher: " not in message


def test_mixed_cluster_needs_an_accelerator_type():
    mixed = ClusterSpec("mixed", (*cluster(1, 8, "H100").nodes, *cluster(1, 4, "A10G").nodes))
    experiment = experiment_of("405b-awq-to-8b.yaml")
    teacher, student = (
        architecture.find_shape(experiment.teacher.model),
        architecture.find_shape(experiment.student.model),
    )
    fits = {each.stage: each for each in fit_stages(experiment, teacher, student, mixed)}
    assert fits["teacher"].problem == "may be placed on A10G, which cannot hold it"
    assert fits["teacher"].suggestion == "teacher.engine.accelerator_type=H100"
    assert fits["teacher"].placements[0].bundles_per_node == (("H100", 4),)
    assert fits["train"].suggestion == "train.accelerator_type=H100"
    assert fits["evaluate"].problem == ""
    named = experiment_of("405b-awq-to-8b.yaml", "teacher.engine.accelerator_type=H100", "train.accelerator_type=A10G")
    fits = {each.stage: each for each in fit_stages(named, teacher, student, mixed)}
    assert (fits["teacher"].notes, fits["teacher"].problem) == ((), "")
    assert fits["train"].problem == "a process needs 35.4 GiB, A10G has 22.0"
    assert fits["train"].suggestion == "train.gradient_checkpointing=true"
    absent = experiment_of("405b-awq-to-8b.yaml", "teacher.engine.accelerator_type=H200")
    assert fit_stages(absent, teacher, student, mixed)[0].problem == "no node has accelerator_type:H200"


def test_tensor_parallel_group_across_nodes_is_noted():
    experiment = experiment_of("405b-fp8-to-8b.yaml", "train.num_workers=4")
    shape = architecture.find_shape(experiment.teacher.model)
    (teacher, *_) = fit_stages(experiment, shape, None, cluster(2, 4, "H200"))
    assert not teacher.problem
    assert teacher.placements[0].bundles_per_node == (("H200", 4), ("H200", 4))
    assert "span nodes" in teacher.notes[0]


def test_model_of_unknown_shape_is_planned_without_memory():
    experiment = experiment_of("8b-to-1b.yaml", "teacher.model=someone/of-another-build", "train.num_workers=4")
    fits = fit_stages(experiment, None, None, cluster(1, 4, "L4"))
    assert refusal_message(fits) == ""
    assert {each.required_bytes for each in fits} == {None}
    two_gpus = fit_stages(experiment, None, None, cluster(1, 2, "L4"))
    assert "train: needs 4 GPU, the cluster has 2" in refusal_message(two_gpus)


def problem_after_suggestion(experiment: Experiment, spec: ClusterSpec, *overrides: str) -> str:
    """Return the problem of training with its suggestion applied; empty where it fits."""
    student = architecture.find_shape(experiment.student.model)
    (fit,) = (each for each in fit_stages(experiment, None, student, spec) if each.stage == "train")
    assert fit.problem and fit.suggestion
    (again,) = (
        each
        for each in fit_stages(experiment_of("8b-to-1b.yaml", *overrides, *fit.suggestion.split()), None, student, spec)
        if each.stage == "train"
    )
    return again.problem


MIXED = ClusterSpec("mixed", (*cluster(4, 1, "T4").nodes, *cluster(1, 2, "A10G").nodes))


@pytest.mark.parametrize(
    ("overrides", "spec"),
    [
        (["train.num_workers=8", "train.min_workers=4", "train.zero_stage=0", "train.dtype=float32"], MIXED),
        (["student.model=meta-llama/Llama-3.1-8B", "train.max_length=512"], MIXED),
        (["train.num_workers=4"], MIXED),
        (["train.num_workers=8", "student.model=meta-llama/Llama-3.1-8B"], cluster(2, 2, "L4")),
    ],
)
def test_suggestion_for_training_fits(overrides: list[str], spec: ClusterSpec):
    assert problem_after_suggestion(experiment_of("8b-to-1b.yaml", *overrides), spec, *overrides) == ""


def test_suggested_accelerator_type_holds_the_whole_stage():
    one = cluster(1, 1, "A100-80G").nodes
    spec = ClusterSpec("mixed", (*cluster(4, 1, "T4").nodes, *one, *cluster(2, 8, "H100").nodes))
    experiment = experiment_of("70b-to-8b.yaml")
    teacher, student = (
        architecture.find_shape(experiment.teacher.model),
        architecture.find_shape(experiment.student.model),
    )
    fits = {each.stage: each for each in fit_stages(experiment, teacher, student, spec)}
    assert fits["teacher"].problem == "may be placed on T4, which cannot hold it"
    assert fits["teacher"].suggestion == "teacher.engine.accelerator_type=H100"
    assert fits["train"].suggestion == "train.accelerator_type=H100"
    # Two types together have four GPUs, but a stage can request only one type.
    kinds = (cluster(1, 2, "A100-80G"), cluster(1, 2, "H100"), cluster(1, 4, "T4"))
    spec = ClusterSpec("mixed", tuple(node for each in kinds for node in each.nodes))
    (fit, *_) = fit_stages(experiment, teacher, student, spec)
    assert fit.problem == "may be placed on T4, which cannot hold it"
    assert "tensor_parallel_size=2" in fit.suggestion
    (fit, *_) = fit_stages(experiment_of("70b-to-8b.yaml", *fit.suggestion.split()), teacher, student, spec)
    assert not fit.problem


def test_arms_may_differ_in_workers_and_training_options():
    of_arms = "arms={small: {}, large: {train.num_workers: 4, train.gradient_checkpointing: false}}"
    overrides = ("train.num_workers=2", "student.model=meta-llama/Llama-3.1-8B", of_arms)
    experiment = experiment_of("8b-to-1b.yaml", *overrides)
    student = architecture.find_shape(experiment.student.model)
    fits = {each.stage: each for each in fit_stages(experiment, None, student, cluster(1, 2, "H100"))}
    assert fits["train"].problem == "needs 4 GPU, the cluster has 2"
    fits = {each.stage: each for each in fit_stages(experiment, None, student, cluster(1, 4, "L4"))}
    assert fits["train"].suggestion.startswith(
        "train.gradient_checkpointing=true arms.large.train.gradient_checkpointing=true"
    )
    assert problem_after_suggestion(experiment, cluster(1, 4, "L4"), *overrides) == ""


def test_engine_leaves_a_core_for_the_pipeline():
    worker = {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    experiment = experiment_of("70b-to-8b.yaml", "teacher.engine.tensor_parallel_size=8")
    teacher = architecture.find_shape(experiment.teacher.model)
    alone = ClusterSpec("a node", (NodeGroup("node", 1, worker),))
    (fit, *_) = fit_stages(experiment, teacher, None, alone)
    assert fit.problem == "needs 9 CPU (one for the pipeline), the cluster has 8"
    assert fit.suggestion == "teacher.engine.tensor_parallel_size=4"
    # Another node's cores do not count where the cluster may have only one of the two nodes.
    either = ClusterSpec(
        "one of two", (NodeGroup("node", 1, worker), NodeGroup("cores", 1, {"CPU": 32.0})), max_workers=1
    )
    assert fit_stages(experiment, teacher, None, either)[0].problem
    both = ClusterSpec("both", either.nodes)
    assert not fit_stages(experiment, teacher, None, both)[0].problem


def test_no_suggestion_for_gpus_without_bfloat16():
    experiment = experiment_of("8b-to-1b.yaml", "student.model=meta-llama/Llama-3.1-8B")
    student = architecture.find_shape(experiment.student.model)
    assert student and suggest.suggest_training(student, experiment.arm("none"), cluster(4, 1, "T4")) == ""
