"""Files of cluster/: each is read by those who will read it, and what it names is there.

Ray reads the files of `ray up` and the specs of KubeRay; Ray's own scheduler says which nodes an experiment brings.
"""

import copy
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.scripts.scripts import cli as ray_cli
from ray.util.accelerators import accelerators

from raykd import config, fitting, nodes, placement, shapes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"FILL_IN_REGISTRY/raykd:{PROJECT['version']}"
# Where the image has the project.
INSTALLED = "/opt/raykd"
CLOUDS = ("aws", "gcp", "azure")
# As the README calls them.
NAMES = {"aws": "AWS", "gcp": "Google Cloud", "azure": "Azure"}
LAUNCHED = (*CLOUDS, "local")
MANIFESTS = ("shared", "raycluster", "rayjob", "rayservice")
FILES = sorted(file for file in FOLDER.rglob("*") if file.is_file())
# The fields of KubeRay 1.6.2 and of Kubernetes that there are, of those that the manifests could use
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
    """A file of `ray up`."""
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kuberay" / f"{name}.yaml").read_text()))


def ray_cluster(name: str) -> dict[str, Any]:
    """The cluster that a manifest describes, as one of its own."""
    (found,) = manifests(name)
    spec = found["spec"]
    return {**found, "spec": spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec}


def prepared(name: str) -> dict[str, Any]:
    """What Ray's autoscaler is told by a file."""
    if name in MANIFESTS:
        return _derive_autoscaling_config_from_ray_cr(ray_cluster(name))
    return prepare_config(copy.deepcopy(read(name)))


def brought(name: str, bundles: list[dict[str, float]]) -> dict[str, int] | None:
    """The nodes that Ray's autoscaler brings for a placement group; None where it cannot."""
    told = AutoscalingConfig(prepared(name), skip_content_hash=True)
    group = GangResourceRequest(requests=[ResourceRequestUtil.make(bundle) for bundle in bundles])
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=told.get_node_type_configs() or {},
        max_num_nodes=told.get_max_num_nodes(),
        gang_resource_requests=[group],
    )
    reply = ResourceDemandScheduler(None).schedule(request)  # pyright: ignore[reportArgumentType]
    if reply.infeasible_gang_resource_requests:
        return None
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def experiment(name: str) -> config.Experiment:
    """The experiment that a manifest runs or serves, with what it overrides."""
    (found,) = manifests(name)
    if name == "rayjob":
        python, script, file, *overrides = found["spec"]["entrypoint"].split()
        assert (python, script) == ("python", f"{INSTALLED}/rayjobs/run.py")
    else:
        args = yaml.safe_load(found["spec"]["serveConfigV2"])["applications"][0]["args"]
        file, overrides = args["experiment"], args["overrides"]
    return config.load(ROOT / Path(file).relative_to(INSTALLED), overrides)


def submitted() -> tuple[dict[str, str], str, list[str]]:
    """What the README submits as a job: its metadata, the experiment's file, and what it overrides."""
    lines = (FOLDER / "README.md").read_text().replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith("ray job submit ")]
    words = shlex.split(line)
    python, script, file, *overrides = words[words.index("--") + 1 :]
    assert (python, script) == ("python", "rayjobs/run.py")
    return json.loads(words[words.index("--metadata-json") + 1]), file, overrides


def on_kind(kind: str, *more: str) -> config.Experiment:
    """What the README submits, with students on a kind of GPU."""
    _, file, overrides = submitted()
    assert any("$STUDENTS" in each for each in overrides)
    return config.load(ROOT / file, [*(each.replace("$STUDENTS", kind) for each in overrides), *more])


def fits(told: config.Experiment, name: str) -> list[fitting.Fit]:
    """How `raykd plan` lays an experiment out on a cluster's file."""
    teacher = shapes.find(told.teacher.model, told.teacher.revision, told.teacher.engine.engine_kwargs)
    student = shapes.find(told.student.model, told.student.revision)
    assert teacher and student
    return fitting.check(told, teacher, student, nodes.read(FOLDER / name))


def assert_all_fits(told: config.Experiment, name: str) -> None:
    """Whether every stage lies on the pool that is meant for it, with nothing to be said against it."""
    found = fits(told, name)
    assert [(fit.stage, fit.problem, fit.notes) for fit in found if fit.problem or fit.notes] == []
    pools = {fit.stage: {pool for placed in fit.placed for pool, _ in placed.on} for fit in found}
    assert pools == {"teacher": {"teacher"}, "train": {"student"}, "evaluate": {"student"}, "attention": {"student"}}


def kinds(resources: dict[str, Any]) -> list[str]:
    return [name.removeprefix(placement.TYPE) for name in resources if name.startswith(placement.TYPE)]


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_the_files_of_ray_up(name: str):
    # Against ray/autoscaler/ray-schema.json, with the defaults of the provider.
    validate_config(prepared(name))


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_a_run_on_kubernetes_is_told_what_the_manifests_may_bring(name: str):
    told = prepared(name)["available_node_types"]
    nodes = yaml.safe_load((FOLDER / "kuberay" / "nodes.yaml").read_text())
    may = {name: (each["resources"], each["max_workers"]) for name, each in nodes["available_node_types"].items()}
    assert may == {
        name: ({key: amount for key, amount in each["resources"].items() if key != "memory"}, each["max_workers"])
        for name, each in told.items()
    }
    assert f"{INSTALLED}/cluster/kuberay/nodes.yaml" in (FOLDER / "kuberay" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("change", [{"colour": "red"}, {"idle_timeout_minutes": "ten"}, {"head_node_type": "neck"}])
def test_rays_check_refuses_what_is_wrong(change: dict[str, Any]):
    with pytest.raises(Exception, match=r"colour|ten|head_node_type"):
        validate_config(prepare_config(read("aws") | change))


@pytest.mark.parametrize("name", CLOUDS)
def test_pools_begin_with_no_node_and_only_students_are_spot(name: str):
    told = read(name)
    head, teacher, student = (told["available_node_types"][each] for each in ("head", "teacher", "student"))
    assert told["head_node_type"] == "head"
    assert head["resources"]["GPU"] == 0 and not kinds(head["resources"])
    assert (teacher["min_workers"], student["min_workers"]) == (0, 0)
    assert told["max_workers"] == teacher["max_workers"] + student["max_workers"]
    assert 0 < told["idle_timeout_minutes"] <= 15
    assert told["provider"]["cache_stopped_nodes"] is False
    spot = re.compile(r"\bspot\b", re.IGNORECASE)
    assert [bool(spot.search(str(each["node_config"]))) for each in (head, teacher, student)] == [False, False, True]


@pytest.mark.parametrize("name", [*CLOUDS, "raycluster", "rayjob"])
def test_kinds_of_gpu_are_spelt_as_ray_spells_them(name: str):
    known = {value for key, value in vars(accelerators).items() if key.startswith("NVIDIA_")}
    types = prepared(name)["available_node_types"]
    assert kinds(types["teacher"]["resources"]) == ["H100"]
    assert set(kinds(types["student"]["resources"])) < known
    assert types["teacher"]["resources"]["GPU"] == types["student"]["resources"]["GPU"] == 8


@pytest.mark.parametrize("name", [*CLOUDS, "raycluster", "rayjob", "rayservice"])
def test_a_teacher_of_16_gpus_brings_two_nodes(name: str):
    teacher = experiment("rayservice").teacher
    bundles = placement.engine_bundles(teacher.engine, "gpu")
    assert len(bundles) == 16 and brought(name, bundles) == {"teacher": 2}
    assert brought(name, bundles * 2) is None


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("workers", [1, 4, 8])
def test_gpus_of_no_kind_are_those_of_students(name: str, workers: int):
    assert brought(name, [placement.processor("gpu", None)] * workers) == {"student": 1}


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_on_kubernetes_students_go_where_their_kind_is(name: str):
    train = experiment("rayjob").train
    assert brought(name, placement.trial_bundles(train, "gpu")) == {"student": 1}


def test_one_image_of_this_version_everywhere():
    images = {read(name)["docker"]["image"] for name in LAUNCHED}
    for name in MANIFESTS[1:]:
        spec = ray_cluster(name)["spec"]
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        images |= {each["image"] for group in groups for each in group["template"]["spec"]["containers"]}
    assert images == {IMAGE}
    for file in (FOLDER / "Dockerfile", FOLDER / "README.md"):
        assert f"raykd:{PROJECT['version']}" in file.read_text()


@pytest.mark.parametrize("name", MANIFESTS[1:])
def test_kuberay_is_told_the_version_of_ray_in_both_locks(name: str):
    for lock in ("cpu", "gpu"):
        pinned = re.findall(r"^ray==(.*)$", (ROOT / "requirements" / f"{lock}.txt").read_text(), re.MULTILINE)
        assert pinned == [ray_cluster(name)["spec"]["rayVersion"]]


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_asks_for_the_token_on_every_node(name: str):
    told = read(name)
    assert told["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    # Without a token, `ray start` would go on without asking for one.
    assert told["setup_commands"] == ["ray get-auth-token > /dev/null"]
    for commands in (told["head_start_ray_commands"], told["worker_start_ray_commands"]):
        (start,) = [each for each in commands if "ray start" in each]
        assert "RAY_AUTH_MODE=token ray start" in start
    assert "--env RAY_AUTH_MODE=token" in told["docker"]["run_options"]


@pytest.mark.parametrize("name", MANIFESTS[1:])
def test_kuberay_gives_the_token_of_a_secret(name: str):
    assert ray_cluster(name)["spec"]["authOptions"] == {"mode": "token", "secretName": "raykd-token"}
    assert ray_cluster(name)["metadata"]["namespace"] == "raykd"


def test_no_port_is_open_to_the_world():
    for file in FILES:
        assert "0.0.0.0" not in file.read_text(), file
    for name in LAUNCHED:
        assert any("--dashboard-host=127.0.0.1" in each for each in read(name)["head_start_ray_commands"])
        # What Ray would add to the rules of a security group.
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


@pytest.mark.parametrize("name", LAUNCHED)
def test_all_nodes_see_the_shared_folder(name: str):
    told = read(name)
    assert "--volume /mnt/raykd:/mnt/raykd" in told["docker"]["run_options"]
    # Before the container is there; what is mounted afterwards it would not see.
    assert any("/mnt/raykd" in each for each in told["initialization_commands"])


@pytest.mark.parametrize("name", MANIFESTS[1:])
def test_manifests_have_fields_that_kuberay_knows(name: str):
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
        # Kubernetes takes nothing but strings here.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) <= FIELDS["pod"]
        for container in pod["containers"]:
            assert set(container) <= FIELDS["container"]
            mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
            assert mounted["shared"] == "/mnt/raykd" and set(mounted) == {each["name"] for each in pod["volumes"]}
    claims = {each["metadata"]["name"] for each in manifests("shared") if each["kind"] == "PersistentVolumeClaim"}
    assert claims == {"raykd"}


def test_the_manifests_describe_one_cluster():
    cluster, job, service = (ray_cluster(name)["spec"] for name in MANIFESTS[1:])
    assert cluster == job
    assert service == {**cluster, "workerGroupSpecs": cluster["workerGroupSpecs"][:1]}
    teacher, student = cluster["workerGroupSpecs"]
    assert (teacher["groupName"], student["groupName"]) == ("teacher", "student")
    # 16 GPUs span two hosts, which come and go as one replica.
    assert teacher["numOfHosts"] == 2


def test_the_job_runs_an_experiment_on_the_shared_folder():
    told = experiment("rayjob")
    assert told.storage == "/mnt/raykd"
    assert told.teacher.engine.accelerator_type == "H100"
    students = (told.evaluate.engine.accelerator_type, told.train.accelerator_type)
    assert told.attention and students == ("L4", "L4") and told.attention.accelerator_type == "L4"


def test_the_job_fits_its_cluster():
    assert_all_fits(experiment("rayjob"), "kuberay/nodes.yaml")


@pytest.mark.parametrize("name", CLOUDS)
def test_what_the_readme_submits_fits_the_cluster_of_each_cloud(name: str):
    text = " ".join((FOLDER / "README.md").read_text().split())
    told = {cloud: kind for kind, cloud in re.findall(r"`([\w-]+)` on (AWS|Google Cloud|Azure)", text)}
    assert [told[NAMES[name]]] == kinds(read(name)["available_node_types"]["student"]["resources"])
    assert_all_fits(on_kind(told[NAMES[name]]), f"{name}.yaml")


def test_what_the_readme_submits_fits_the_cluster_on_kubernetes():
    text = (FOLDER / "README.md").read_text()
    # What it says is to be said there besides, as the job says it.
    assert "`STUDENTS=L4`" in text and "add `teacher.engine.pipeline_parallel_size=2` to that" in text
    told = on_kind("L4", "teacher.engine.pipeline_parallel_size=2")
    assert told == experiment("rayjob")
    assert_all_fits(told, "kuberay/nodes.yaml")


def test_the_command_names_the_first_clouds_kind():
    text = (FOLDER / "README.md").read_text()
    (line,) = re.findall(r"^STUDENTS=.*$", text, re.MULTILINE)
    told = {name: kinds(read(name)["available_node_types"]["student"]["resources"])[0] for name in CLOUDS}
    assert line.startswith(f"STUDENTS={told['aws']} ") and "on AWS;" in line
    assert all(f"{told[name]} on {NAMES[name]}" in line for name in ("gcp", "azure"))


def test_a_student_of_8b_needs_checkpointing_on_22_gib_only():
    told = on_kind("A10G", "train.gradient_checkpointing=false")
    (train,) = [fit for fit in fits(told, "aws.yaml") if fit.stage == "train"]
    assert "A10G has 22.0" in train.problem and train.remedy == "train.gradient_checkpointing=true"
    assert_all_fits(on_kind("A100", "train.gradient_checkpointing=false"), "azure.yaml")


def test_rays_dashboard_is_told_what_a_job_is():
    metadata, file, overrides = submitted()
    (job,) = manifests("rayjob")
    for told, name in (
        (metadata, config.load(ROOT / file, overrides).name),
        (job["spec"]["metadata"], experiment("rayjob").name),
    ):
        assert told == {"job_name": name, "experiment": name, "stage": "run"}


def test_paths_are_there():
    for file in FILES:
        text = file.read_text()
        for path in re.findall(rf"{INSTALLED}/([\w./-]*\w)", text):
            # Not those that the installation makes.
            assert path.startswith(".venv") or (ROOT / path).exists(), f"{file}: {path}"
        for path in re.findall(r"(?<![\w/.])((?:cluster|configs|rayjobs|requirements|src|docs)/[\w./-]*\w)", text):
            assert (ROOT / path).exists(), f"{file}: {path}"


def test_commands_and_their_options_are_there():
    """In the blocks of the README and whatever is run on nodes; of Ray's the options too."""
    readme = (FOLDER / "README.md").read_text()
    fence = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    inline = [each.replace("\n", " ") for each in re.findall(r"`([^`]+)`", fence.sub("", readme))]
    blocks = [*fence.findall(readme), *inline]
    on_nodes = [each for name in LAUNCHED for key, value in read(name).items() if "commands" in key for each in value]
    lines = [line for block in [*blocks, *on_nodes] for line in block.replace("\\\n", " ").splitlines()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen: set[str] = set()
    for line in lines:
        for name in re.findall(r"\bmake ([a-z-]+)", line):
            assert name in targets, line
        # Whatever follows a bare `--`, a comment or the end of a quotation is somebody else's.
        for told in re.findall(r"(?:^|[\s'\"(])ray ([a-z][^#'\"|>)]*)", line):
            words = re.split(r"\s--(?:\s|$)", told)[0].split()
            command: Any = ray_cli
            while words and hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            options = {option for param in command.params for option in param.opts}
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, line
            seen.add(command.name)
    assert {"up", "down", "dashboard", "attach", "exec", "submit", "start", "stop", "get-auth-token"} <= seen


def test_the_image_is_installed_as_a_machine_is():
    text = (FOLDER / "Dockerfile").read_text()
    assert 'if [ "$ACCELERATOR" = cpu ]; then make install; else make install-gpu; fi' in text
    (python,) = re.findall(r"^FROM python:(3\.\d+)-", text, re.MULTILINE)
    assert PROJECT["requires-python"].startswith(f">={python},")
    # Nothing else of Python's: what is installed is in the lock, but for what reads other buckets than S3's.
    (line,) = [line for line in text.splitlines() if "pip" in line]
    assert "pip install" in line and '--constraint requirements/$ACCELERATOR.txt -e ".[$EXTRA]"' in line
    for extra, package in (("gcs", "gcsfs"), ("azure", "adlfs")):
        assert any(each.startswith(package) for each in PROJECT["optional-dependencies"][extra])
        for lock in ("cpu", "gpu"):
            assert f"\n{package}==" not in (ROOT / "requirements" / f"{lock}.txt").read_text()


def test_the_image_finds_the_driver_as_nvidias_own_do():
    (line,) = re.findall(r"^ENV (LD_LIBRARY_PATH=.*)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    told = dict(each.split("=") for each in line.split())
    assert "/usr/local/nvidia/lib64" in told["LD_LIBRARY_PATH"].split(":")
    assert told["NVIDIA_VISIBLE_DEVICES"] == "all" and told["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    for name in CLOUDS:
        # The head has no GPU, and another word takes the place of the image's.
        assert read(name)["docker"]["head_run_options"] == ["--env NVIDIA_VISIBLE_DEVICES=void"]


@pytest.mark.parametrize("name", CLOUDS)
def test_rights_to_a_bucket_are_there_to_be_uncommented(name: str):
    """As the README says: the lines that name `raykd-nodes`, which without a bucket nobody has."""
    text = (FOLDER / f"{name}.yaml").read_text()
    key = r"IamInstanceProfile:|serviceAccounts:|  - email:|    scopes:|msi_name:|msi_resource_group:"
    told = prepare_config(yaml.safe_load(re.sub(rf"^( *)# ({key})", r"\1\2", text, flags=re.MULTILINE)))
    validate_config(told)
    head, *workers = (told["available_node_types"][each]["node_config"] for each in ("head", "teacher", "student"))
    # Ray gives the head of AWS and Google Cloud its own, and where it is given another it does not.
    assert "raykd-nodes" not in str(head) and "raykd-nodes" not in str(prepared(name))
    if name == "aws":
        assert [each["IamInstanceProfile"] for each in workers] == [{"Name": "raykd-nodes"}] * 2
    elif name == "gcp":
        account = "raykd-nodes@FILL_IN_PROJECT.iam.gserviceaccount.com"
        rights = {"email": account, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
        assert [each["serviceAccounts"] for each in workers] == [[rights]] * 2
    else:
        provider = told["provider"]
        assert (provider["msi_name"], provider["msi_resource_group"]) == ("raykd-nodes", provider["resource_group"])


def test_other_namespaces_read_metrics_where_they_are_let_in():
    (policy,) = [each for each in manifests("shared") if each["kind"] == "NetworkPolicy"]
    inside, metrics = policy["spec"]["ingress"]
    assert "ports" not in inside
    # KubeRay's default, from which the manifests do not differ.
    assert metrics["ports"] == [{"protocol": "TCP", "port": 8080}]
    assert all("metrics-export-port" not in (FOLDER / "kuberay" / f"{name}.yaml").read_text() for name in MANIFESTS)
    (source,) = metrics["from"]
    ((label, value),) = source["namespaceSelector"]["matchLabels"].items()
    assert f"kubectl label namespace NAMESPACE {label}={value}" in (ROOT / "docs" / "watching.md").read_text()


@pytest.mark.parametrize("name", CLOUDS)
def test_what_the_head_installs_besides_is_pinned(name: str):
    commands = read(name)["head_setup_commands"]
    if name == "aws":
        assert commands == [], "it is in the lock"
        assert re.search(r"^boto3==", (ROOT / "requirements/gpu.txt").read_text(), re.MULTILINE)
        return
    (command,) = commands
    packages = [word for word in command.split()[2:] if not word.startswith(("-", "/"))]
    assert packages and all(re.fullmatch(r"[\w-]+==[\w.]+", each) for each in packages)
    # The same on the machine from which the cluster is brought up.
    assert all(each in (FOLDER / "README.md").read_text() for each in packages)


def test_the_readme_names_what_is_to_be_filled_in():
    text = (FOLDER / "README.md").read_text()
    for file in FILES:
        if file.name == "README.md" or "FILL_IN_" not in file.read_text():
            continue
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{file.relative_to(FOLDER)}` | `FILL_")]
        assert set(re.findall(r"FILL_IN_\w+", file.read_text())) == set(re.findall(r"FILL_IN_\w+", row)), file
