"""Resources and placement bundles of stages, and the messages where they do not fit."""

import pytest

from raykd.cluster import resources
from raykd.cluster.engine import engine_settings
from raykd.config.engine import Engine, Replicas
from raykd.config.experiment import Experiment
from raykd.config.sections import Attention, Teacher
from raykd.config.training import Train


def test_auto_accelerator_is_gpu_if_cluster_has_gpus():
    assert resources.resolve_accelerator("auto", {"CPU": 8}) == "cpu"
    assert resources.resolve_accelerator("auto", {"CPU": 8, "GPU": 1}) == "gpu"
    assert resources.resolve_accelerator("cpu", {"CPU": 8, "GPU": 1}) == "cpu"


def test_sharded_engine_has_a_bundle_for_each_shard():
    engine = Engine(tensor_parallel_size=8, pipeline_parallel_size=2)
    assert resources.engine_bundles(engine, "gpu") == [{"CPU": 1, "GPU": 1}] * 16
    assert resources.engine_bundles(engine, "cpu") == [{"CPU": 1}] * 16


@pytest.mark.parametrize(
    ("workers", "kind", "cluster", "trials"),
    [
        (2, "cpu", {"CPU": 2}, 1),
        (2, "cpu", {"CPU": 5}, 2),
        (4, "gpu", {"CPU": 64, "GPU": 16}, 4),
        (4, "gpu", {"CPU": 8, "GPU": 16}, 2),
    ],
)
def test_max_concurrent_trials_follow_cluster_resources(workers: int, kind, cluster: dict, trials: int):
    train = Train(num_workers=workers, batch_size=8 * workers)
    assert resources.max_concurrent_trials(train, kind, cluster) == trials


@pytest.mark.parametrize(("cores", "trials"), [(9, 2), (8, 2), (7, 1), (3, 1), (2, 1), (1, 0)])
def test_elastic_trial_fits_with_min_workers(cores: int, trials: int):
    train = Train(num_workers=4, min_workers=2, batch_size=8, zero_stage=0, dtype="float32")
    assert resources.max_concurrent_trials(train, "cpu", {"CPU": cores}) == trials


def test_trial_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"4 GPU.*num_workers=4.*has 2"):
        resources.check_trial(Train(num_workers=4, batch_size=8), "gpu", {"CPU": 64, "GPU": 2})


def test_engine_that_does_not_fit_is_refused():
    resources.check_engine("teacher.engine", Engine(), "cpu", {"CPU": 2})
    with pytest.raises(ValueError, match=r"teacher\.engine.*2 CPU"):
        resources.check_engine("teacher.engine", Engine(), "cpu", {"CPU": 1})
    with pytest.raises(ValueError, match=r"teacher\.engine.*8 x 2.*16 GPU.*has 8"):
        sharded = Engine(tensor_parallel_size=8, pipeline_parallel_size=2)
        resources.check_engine("teacher.engine", sharded, "gpu", {"CPU": 64, "GPU": 8})
    # Two replicas on all cores leave none for the pipeline.
    resources.check_engine("teacher.engine", Engine(), "cpu", {"CPU": 3}, 2)
    with pytest.raises(ValueError, match=r"teacher\.engine: 2 x 1 x 1.*need 3 CPU.*has 2"):
        resources.check_engine("teacher.engine", Engine(), "cpu", {"CPU": 2}, 2)


def test_engine_kwargs_override_the_defaults():
    kwargs, env = engine_settings(
        Engine(engine_kwargs={"enforce_eager": False, "dtype": "float32"}, env={"VLLM_CPU_KVCACHE_SPACE": "9"}), "cpu"
    )
    assert kwargs["enforce_eager"] is False
    assert kwargs["dtype"] == "float32"
    assert kwargs["generation_config"] == "vllm"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "9"


def test_start_timeout_is_passed_to_vllm_and_serve():
    """By default, vLLM 0.29 stops waiting after 600 s, and Serve LLM of Ray 2.60 after 3,600 s."""
    for timeout_s, seconds in ((5400, "5400"), (0.5, "1")):
        _, env = engine_settings(Engine(), "gpu", timeout_s)
        assert env["VLLM_ENGINE_READY_TIMEOUT_S"] == env["RAYLLM_ENGINE_START_TIMEOUT_S"] == seconds
    _, env = engine_settings(Engine(env={"VLLM_ENGINE_READY_TIMEOUT_S": "60"}), "gpu")
    assert env["VLLM_ENGINE_READY_TIMEOUT_S"] == "60"


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ({"CPU": 2}, False),
        ({"CPU": 3}, True),
        ({"CPU": 64, "GPU": 8}, False),
        ({"CPU": 64, "GPU": 9}, True),
        ({"CPU": 64, "GPU": 10}, True),
    ],
)
def test_teacher_stays_up_if_students_fit_beside_it(cluster: dict, expected: bool):
    gpus = int(cluster.get("GPU", 0)) > 0
    tree = {
        "name": "small",
        "teacher": {"model": "a", "engine": {"tensor_parallel_size": 8 if gpus else 1}},
        "student": {"model": "b"},
    }
    experiment = Experiment.model_validate(tree)
    assert resources.fits_alongside_teacher(experiment, [Train(num_workers=1)], cluster) == expected


def test_accelerator_type_is_requested_by_every_process():
    engine = Engine(tensor_parallel_size=8, pipeline_parallel_size=2, accelerator_type="H100")
    assert resources.engine_bundles(engine, "gpu") == [{"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001}] * 16
    assert resources.engine_bundles(engine, "cpu") == [{"CPU": 1}] * 16
    cluster = {"CPU": 400, "GPU": 24, "GPU:H100": 8, "GPU:A10G": 16}
    with pytest.raises(ValueError, match=r"need 16 GPU:H100.*has 8 \(8 GPU:H100, 16 GPU:A10G\)"):
        resources.check_engine("teacher.engine", engine, "gpu", cluster)
    resources.check_engine("teacher.engine", engine, "gpu", cluster | {"GPU:H100": 16})


def test_trials_fit_only_on_their_accelerator_type():
    cluster = {"CPU": 400, "GPU": 24, "GPU:H100": 8, "GPU:A10G": 16}
    train = Train(num_workers=4, batch_size=32, accelerator_type="A10G")
    assert resources.trial_bundles(train, "gpu") == [{"CPU": 1, "GPU": 1, "accelerator_type:A10G": 0.001}] * 4
    assert resources.max_concurrent_trials(train, "gpu", cluster) == 4
    assert resources.max_concurrent_trials(Train(num_workers=4, batch_size=32), "gpu", cluster) == 6
    # The teacher may hold more than the cluster has at the moment.
    assert resources.max_concurrent_trials(train, "gpu", {"CPU": -3}) == 0
    with pytest.raises(ValueError, match=r"4 GPU:L4.*has 0 \(8 GPU:H100, 16 GPU:A10G\)"):
        resources.check_trial(Train(num_workers=4, batch_size=32, accelerator_type="L4"), "gpu", cluster)
    with pytest.raises(ValueError, match=r"1 GPU:L4.*no GPU of a known type"):
        resources.attention_workers(Attention(accelerator_type="L4"), "gpu", {"CPU": 8, "GPU": 1})


@pytest.mark.parametrize("section", [Engine, Train, Attention])
def test_accelerator_type_with_cpu_is_refused(section: type):
    with pytest.raises(ValueError, match=r"'H100' is a GPU model, but accelerator=cpu"):
        section(accelerator="cpu", accelerator_type="H100")


def test_resources_beside_teacher_exclude_all_its_replicas():
    teacher = Teacher(model="a", engine=Engine(tensor_parallel_size=4), replicas=Replicas(min=1, max=2))
    assert resources.resources_beside_teacher(teacher, {"CPU": 32, "GPU": 16}) == {"CPU": 24, "GPU": 8}


@pytest.mark.parametrize(
    ("num_workers", "kind", "cluster", "workers"),
    [
        (1, "cpu", {"CPU": 2}, 1),
        (4, "cpu", {"CPU": 2}, 1),
        (4, "gpu", {"CPU": 64, "GPU": 8}, 4),
        (16, "gpu", {"CPU": 64, "GPU": 8}, 8),
        # One core is for the pipeline.
        (16, "gpu", {"CPU": 4, "GPU": 8}, 3),
    ],
)
def test_attention_workers_are_limited_by_cluster(num_workers: int, kind, cluster: dict, workers: int):
    assert resources.attention_workers(Attention(num_workers=num_workers), kind, cluster) == workers


def test_attention_worker_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"1 GPU.*has 8 CPU and 0 GPU.*attention=null"):
        resources.attention_workers(Attention(), "gpu", {"CPU": 8})
