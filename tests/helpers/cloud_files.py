"""Readers for the files of `cluster/`, with Ray's own parsers."""

import copy
import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from raykd import compat
from raykd.cluster import nodes
from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.models import architecture
from raykd.planning.fit import Fit, fit_stages
from raykd.scaffold import shipped_configs

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"FILL_IN_REGISTRY/raykd:{PROJECT['version']}"
# Folder of the project in the image.
INSTALLED = "/opt/raykd"
CLOUDS = ("aws", "gcp", "azure")
# Names in the README.
NAMES = {"aws": "AWS", "gcp": "Google Cloud", "azure": "Azure"}
RAY_UP_FILES = (*CLOUDS, "local")
MANIFESTS = ("shared", "raycluster", "rayjob", "rayservice")
FILES = sorted(file for file in FOLDER.rglob("*") if file.is_file())
# The fields of KubeRay 1.6.2 and Kubernetes that the manifests may use
# (docs.ray.io/en/master/cluster/kubernetes/references/api.html).
CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"}
FIELDS = {
    "RayCluster": {*CLUSTER, "workerGroupSpecs", "gcsFaultToleranceOptions", "suspend", "managedBy"},
    "RayJob": {
        *("entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submissionMode"),
        *("runtimeEnvYAML", "entrypointNumCpus", "backoffLimit", "activeDeadlineSeconds", "clusterSelector", "suspend"),
        "metadata",
    },
    "RayService": {
        "serveConfigV2",
        "rayClusterConfig",
        "upgradeStrategy",
        "serveService",
        "excludeHeadPodFromServeSvc",
    },
    "authOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "autoscalerOptions": {"version", "idleTimeoutSeconds", "upscalingMode", "resources", "image", "env", "envFrom"},
    "headGroupSpec": {"serviceType", "rayStartParams", "template", "headService", "enableIngress"},
    "workerGroupSpecs": {
        *("groupName", "numOfHosts", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"),
        *("idleTimeoutSeconds", "scaleStrategy", "suspend"),
    },
    "pod": {"containers", "volumes", "nodeSelector", "tolerations", "securityContext", "serviceAccountName"},
    "container": {"name", "image", "env", "resources", "volumeMounts", "ports", "imagePullPolicy"},
}


def read(name: str) -> dict[str, Any]:
    """Return the content of a `ray up` file."""
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kuberay" / f"{name}.yaml").read_text()))


def ray_cluster(name: str) -> dict[str, Any]:
    """Return a manifest's cluster as a RayCluster."""
    (found,) = manifests(name)
    spec = found["spec"]
    return {**found, "spec": spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec}


def autoscaler_config(name: str) -> dict[str, Any]:
    """Return the autoscaler's configuration that Ray derives from a file."""
    if name in MANIFESTS:
        return _derive_autoscaling_config_from_ray_cr(ray_cluster(name))
    return prepare_config(copy.deepcopy(read(name)))


def launched_nodes(name: str, bundles: list[dict[str, float]]) -> dict[str, int] | None:
    """Return the nodes that Ray's autoscaler launches for a placement group; None if it is infeasible."""
    config = AutoscalingConfig(autoscaler_config(name), skip_content_hash=True)
    group = GangResourceRequest(requests=[ResourceRequestUtil.make(bundle) for bundle in bundles])
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs() or {},
        max_num_nodes=config.get_max_num_nodes(),
        gang_resource_requests=[group],
    )
    reply = ResourceDemandScheduler(None).schedule(request)  # pyright: ignore[reportArgumentType]
    if reply.infeasible_gang_resource_requests:
        return None
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def experiment(name: str) -> Experiment:
    """Return the experiment that a manifest runs or serves, with its overrides."""
    (found,) = manifests(name)
    if name == "rayjob":
        python, script, command, file, *overrides = found["spec"]["entrypoint"].split()
        assert (python, script, command) == ("python", f"{INSTALLED}/rayjobs/run.py", "run")
    else:
        args = yaml.safe_load(found["spec"]["serveConfigV2"])["applications"][0]["args"]
        file, overrides = args["experiment"], args["overrides"]
    return load_experiment(ROOT / Path(file).relative_to(INSTALLED), overrides)


def readme_job() -> tuple[dict[str, str], str, list[str]]:
    """Return the job that the README submits: its metadata, the experiment, and the overrides."""
    lines = (FOLDER / "README.md").read_text().replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith("ray job submit ")]
    words = shlex.split(line)
    program, command, file, *overrides = words[words.index("--") + 1 :]
    assert (program, command) == ("raykd", "run")
    return json.loads(words[words.index("--metadata-json") + 1]), file, overrides


def readme_experiment(gpu_type: str, *overrides: str) -> Experiment:
    """Return the experiment that the README submits, with students on a type of GPU."""
    _, file, own = readme_job()
    assert any("$STUDENTS" in each for each in own)
    replaced = [each.replace("$STUDENTS", gpu_type) for each in own]
    return load_experiment(shipped_configs()[file], [*replaced, *overrides])


def fits(experiment_config: Experiment, name: str) -> list[Fit]:
    """Return the fits of `raykd plan --cluster` for an experiment."""
    teacher = architecture.find_shape(
        experiment_config.teacher.model,
        experiment_config.teacher.revision,
        experiment_config.teacher.engine.engine_kwargs,
    )
    student = architecture.find_shape(experiment_config.student.model, experiment_config.student.revision)
    assert teacher and student
    return fit_stages(experiment_config, teacher, student, nodes.read_cluster_file(FOLDER / name))


def assert_all_fits(config: Experiment, name: str) -> None:
    """Assert that every stage fits its pool, without problems or notes."""
    found = fits(config, name)
    assert [(fit.stage, fit.problem, fit.notes) for fit in found if fit.problem or fit.notes] == []
    pools = {fit.stage: {pool for placed in fit.placements for pool, _ in placed.bundles_per_node} for fit in found}
    assert pools == {"teacher": {"teacher"}, "train": {"student"}, "evaluate": {"student"}, "attention": {"student"}}


def gpu_types(resources: dict[str, Any]) -> list[str]:
    """Return the GPU types in the resources of a node."""
    return [
        name.removeprefix(compat.ACCELERATOR_TYPE_PREFIX)
        for name in resources
        if name.startswith(compat.ACCELERATOR_TYPE_PREFIX)
    ]


def write_two_pools(file: Path) -> None:
    """Write the file of a cluster with at most two nodes of 8 H100 and four nodes of 4 A10G."""
    large = {"resources": {"CPU": 192, "GPU": 8, "accelerator_type:H100": 1}, "max_workers": 2}
    small = {"resources": {"CPU": 48, "GPU": 4, "accelerator_type:A10G": 1}, "max_workers": 4}
    types = {"head": {"resources": {"CPU": 8}}, "large": large, "small": small}
    file.write_text(yaml.safe_dump({"head_node_type": "head", "max_workers": 6, "available_node_types": types}))
