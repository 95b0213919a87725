"""Files of cluster/: valid for Ray and KubeRay; Ray's scheduler launches the intended nodes for an experiment."""

import re
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.util.accelerators import accelerators

from cloud_files import (
    CLOUDS,
    FIELDS,
    FILES,
    FOLDER,
    IMAGE,
    INSTALLED,
    MANIFESTS,
    PROJECT,
    RAY_UP_FILES,
    ROOT,
    autoscaler_config,
    experiment,
    gpu_types,
    launched_nodes,
    manifests,
    ray_cluster,
    read,
)
from raykd.cluster import resources


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_ray_up_files_are_valid(name: str):
    # Validates against ray/autoscaler/ray-schema.json, with the provider's defaults.
    validate_config(autoscaler_config(name))


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kubernetes_nodes_file_matches_manifests(name: str):
    node_types = autoscaler_config(name)["available_node_types"]
    nodes = yaml.safe_load((FOLDER / "kuberay" / "nodes.yaml").read_text())
    limits = {name: (each["resources"], each["max_workers"]) for name, each in nodes["available_node_types"].items()}
    assert limits == {
        name: ({key: amount for key, amount in each["resources"].items() if key != "memory"}, each["max_workers"])
        for name, each in node_types.items()
    }
    assert f"{INSTALLED}/cluster/kuberay/nodes.yaml" in (FOLDER / "kuberay" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("change", [{"colour": "red"}, {"idle_timeout_minutes": "ten"}, {"head_node_type": "neck"}])
def test_ray_validation_refuses_invalid_fields(change: dict[str, Any]):
    with pytest.raises(Exception, match=r"colour|ten|head_node_type"):
        validate_config(prepare_config(read("aws") | change))


@pytest.mark.parametrize("name", CLOUDS)
def test_pools_start_empty_and_only_students_are_spot(name: str):
    config = read(name)
    head, teacher, student = (config["available_node_types"][each] for each in ("head", "teacher", "student"))
    assert config["head_node_type"] == "head"
    assert head["resources"]["GPU"] == 0 and not gpu_types(head["resources"])
    assert (teacher["min_workers"], student["min_workers"]) == (0, 0)
    assert config["max_workers"] == teacher["max_workers"] + student["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert config["provider"]["cache_stopped_nodes"] is False
    spot = re.compile(r"\bspot\b", re.IGNORECASE)
    assert [bool(spot.search(str(each["node_config"]))) for each in (head, teacher, student)] == [False, False, True]


@pytest.mark.parametrize("name", [*CLOUDS, "raycluster", "rayjob"])
def test_gpu_types_are_known_to_ray(name: str):
    known = {value for key, value in vars(accelerators).items() if key.startswith("NVIDIA_")}
    types = autoscaler_config(name)["available_node_types"]
    assert gpu_types(types["teacher"]["resources"]) == ["H100"]
    assert set(gpu_types(types["student"]["resources"])) < known
    assert types["teacher"]["resources"]["GPU"] == types["student"]["resources"]["GPU"] == 8


@pytest.mark.parametrize("name", [*CLOUDS, "raycluster", "rayjob", "rayservice"])
def test_16_gpu_teacher_launches_two_nodes(name: str):
    teacher = experiment("rayservice").teacher
    bundles = resources.engine_bundles(teacher.engine, "gpu")
    assert len(bundles) == 16 and launched_nodes(name, bundles) == {"teacher": 2}
    assert launched_nodes(name, bundles * 2) is None


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("workers", [1, 4, 8])
def test_untyped_gpu_request_launches_student_node(name: str, workers: int):
    assert launched_nodes(name, [resources.process_bundle("gpu", None)] * workers) == {"student": 1}


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kubernetes_trial_launches_node_of_its_gpu_type(name: str):
    train = experiment("rayjob").train
    assert launched_nodes(name, resources.trial_bundles(train, "gpu")) == {"student": 1}


def test_all_files_use_image_of_this_version():
    images = {read(name)["docker"]["image"] for name in RAY_UP_FILES}
    for name in MANIFESTS[1:]:
        spec = ray_cluster(name)["spec"]
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        images |= {each["image"] for group in groups for each in group["template"]["spec"]["containers"]}
    assert images == {IMAGE}
    for file in (FOLDER / "Dockerfile", FOLDER / "README.md"):
        assert f"raykd:{PROJECT['version']}" in file.read_text()


@pytest.mark.parametrize("name", MANIFESTS[1:])
def test_manifests_have_locked_ray_version(name: str):
    for lock in ("cpu", "gpu"):
        pinned = re.findall(r"^ray==(.*)$", (ROOT / "requirements" / f"{lock}.txt").read_text(), re.MULTILINE)
        assert pinned == [ray_cluster(name)["spec"]["rayVersion"]]


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_every_node_requires_ray_token(name: str):
    config = read(name)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    # Without a token file, `ray start` starts without authentication.
    assert config["setup_commands"] == ["ray get-auth-token > /dev/null"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [each for each in commands if "ray start" in each]
        assert "RAY_AUTH_MODE=token ray start" in start
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


@pytest.mark.parametrize("name", MANIFESTS[1:])
def test_manifests_take_token_from_secret(name: str):
    assert ray_cluster(name)["spec"]["authOptions"] == {"mode": "token", "secretName": "raykd-token"}
    assert ray_cluster(name)["metadata"]["namespace"] == "raykd"


def test_no_port_is_public():
    for file in FILES:
        assert "0.0.0.0" not in file.read_text(), file
    for name in RAY_UP_FILES:
        assert any("--dashboard-host=127.0.0.1" in each for each in read(name)["head_start_ray_commands"])
        # Ray adds such rules to the security group.
        assert "security_group" not in read(name)["provider"]
    aws = read("aws")["available_node_types"].values()
    assert all(each["node_config"]["SecurityGroupIds"] == ["FILL_IN_SECURITY_GROUP"] for each in aws)
    gcp = read("gcp")["available_node_types"].values()
    assert all("subnetworks/raykd" in each["node_config"]["networkInterfaces"][0]["subnetwork"] for each in gcp)
    azure = read("azure")
    assert f"sudo ufw allow from {azure['provider']['subnet_mask']}" in azure["initialization_commands"]
    assert "sudo ufw --force enable" in azure["initialization_commands"]
    for name in MANIFESTS[1:]:
        assert ray_cluster(name)["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_all_nodes_mount_shared_folder(name: str):
    config = read(name)
    assert "--volume /mnt/raykd:/mnt/raykd" in config["docker"]["run_options"]
    # Mounted before the container starts, because it does not see later mounts.
    assert any("/mnt/raykd" in each for each in config["initialization_commands"])


@pytest.mark.parametrize("name", MANIFESTS[1:])
def test_manifests_have_known_kuberay_fields(name: str):
    (found,) = manifests(name)
    assert found["apiVersion"] == "ray.io/v1" and set(found["spec"]) <= FIELDS[found["kind"]]
    spec = ray_cluster(name)["spec"]
    assert set(spec) <= FIELDS["RayCluster"]
    for field in ("authOptions", "autoscalerOptions", "headGroupSpec"):
        assert set(spec[field]) <= FIELDS[field]
    assert spec["autoscalerOptions"]["version"] == "v2" and spec["enableInTreeAutoscaling"]
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= FIELDS["workerGroupSpecs"] and group["minReplicas"] == group["replicas"] == 0
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        # Kubernetes accepts only strings here.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) <= FIELDS["pod"]
        for container in pod["containers"]:
            assert set(container) <= FIELDS["container"]
            mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
            assert mounted["shared"] == "/mnt/raykd" and set(mounted) == {each["name"] for each in pod["volumes"]}
    claims = {each["metadata"]["name"] for each in manifests("shared") if each["kind"] == "PersistentVolumeClaim"}
    assert claims == {"raykd"}


def test_manifests_describe_one_cluster():
    cluster, job, service = (ray_cluster(name)["spec"] for name in MANIFESTS[1:])
    assert cluster == job
    assert service == {**cluster, "workerGroupSpecs": cluster["workerGroupSpecs"][:1]}
    teacher, student = cluster["workerGroupSpecs"]
    assert (teacher["groupName"], student["groupName"]) == ("teacher", "student")
    # 16 GPUs span two hosts, which are launched and removed as one replica.
    assert teacher["numOfHosts"] == 2


@pytest.mark.parametrize("name", CLOUDS)
def test_bucket_permissions_can_be_uncommented(name: str):
    """For a bucket, the README says to uncomment the lines with `raykd-nodes`."""
    text = (FOLDER / f"{name}.yaml").read_text()
    key = r"IamInstanceProfile:|serviceAccounts:|  - email:|    scopes:|msi_name:|msi_resource_group:"
    config = prepare_config(yaml.safe_load(re.sub(rf"^( *)# ({key})", r"\1\2", text, flags=re.MULTILINE)))
    validate_config(config)
    head, *workers = (config["available_node_types"][each]["node_config"] for each in ("head", "teacher", "student"))
    # On AWS and Google Cloud, Ray creates a role for the head unless the file sets one.
    assert "raykd-nodes" not in str(head) and "raykd-nodes" not in str(autoscaler_config(name))
    if name == "aws":
        assert [each["IamInstanceProfile"] for each in workers] == [{"Name": "raykd-nodes"}] * 2
    elif name == "gcp":
        account = "raykd-nodes@FILL_IN_PROJECT.iam.gserviceaccount.com"
        rights = {"email": account, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
        assert [each["serviceAccounts"] for each in workers] == [[rights]] * 2
    else:
        provider = config["provider"]
        assert (provider["msi_name"], provider["msi_resource_group"]) == ("raykd-nodes", provider["resource_group"])


def test_network_policy_lets_labeled_namespaces_read_metrics():
    (policy,) = [each for each in manifests("shared") if each["kind"] == "NetworkPolicy"]
    inside, metrics = policy["spec"]["ingress"]
    assert "ports" not in inside
    # KubeRay's default, which the manifests do not change.
    assert metrics["ports"] == [{"protocol": "TCP", "port": 8080}]
    assert all("metrics-export-port" not in (FOLDER / "kuberay" / f"{name}.yaml").read_text() for name in MANIFESTS)
    (source,) = metrics["from"]
    ((label, value),) = source["namespaceSelector"]["matchLabels"].items()
    assert f"kubectl label namespace NAMESPACE {label}={value}" in (ROOT / "docs" / "monitoring.md").read_text()
