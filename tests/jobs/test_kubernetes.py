"""The manifests: fields that exist, commands that parse, resources that fit each other."""

import copy
import re
import shlex
from pathlib import Path, PurePosixPath

import pytest
import tyro
import yaml

from jobs.schedule import rules_by_time, trigger
from jobs.scheduling.config import ScheduleConfig
from pipeline.pretrain import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "jobs/kubernetes"
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}
TRAININGS = ("pretrain", "pretrain-ethernet")


def ray_job(name="pretrain"):
    return MANIFESTS[name]["spec"]


def nightly():
    return MANIFESTS["evaluate-raycronjob"]["spec"]["jobTemplate"]


def pod(template):
    (container,) = template["spec"]["containers"]
    return container


def clusters():
    trainings = [ray_job(name)["rayClusterSpec"] for name in TRAININGS]
    return [*trainings, nightly()["rayClusterSpec"]]


def containers():
    for cluster in clusters():
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        yield from (pod(group["template"]) for group in groups)
    yield pod(MANIFESTS["evaluate-cronjob"]["spec"]["jobTemplate"]["spec"]["template"])


def environment(container):
    return {item["name"]: item.get("value") for item in container.get("env", ())}


def words(command):
    found = shlex.split(command)
    assert found[:2] == ["python", "-m"]
    return found[2], found[3:]


def schedules():
    container = pod(MANIFESTS["evaluate-cronjob"]["spec"]["jobTemplate"]["spec"]["template"])
    return [
        words(nightly()["entrypoint"]),
        words(shlex.join([*container["command"], *container["args"]])),
    ]


def test_kinds_and_versions():
    kinds = {name: (body["apiVersion"], body["kind"]) for name, body in MANIFESTS.items()}
    assert kinds == {
        "pretrain": ("ray.io/v1", "RayJob"),
        "pretrain-ethernet": ("ray.io/v1", "RayJob"),
        "evaluate-raycronjob": ("ray.io/v1", "RayCronJob"),
        "evaluate-cronjob": ("batch/v1", "CronJob"),
    }
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert {cluster["rayVersion"] for cluster in clusters()} == {pinned}
    images = {container["image"] for container in containers()}
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert images == {f"REGISTRY/certified-pretrain:{version}"}
    assert images.pop() in (FOLDER / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def require_manifest():
    pytest.importorskip("lightkube.models", reason="the test extra installs lightkube-models")
    from tests.jobs.kubernetes_schemas import require_manifest

    return require_manifest


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_kubernetes_and_kuberay_accept_the_manifests(name, require_manifest):
    require_manifest(MANIFESTS[name])


JOB = "spec.rayClusterSpec.workerGroupSpecs.0"
POD = f"{JOB}.template.spec"
CONTAINER = f"{POD}.containers.0"


def changed(name, path, value):
    """A manifest in which the value at a path is another one, or is missing."""
    body = copy.deepcopy(MANIFESTS[name])
    *parents, last = path.split(".")
    place = body
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    if value is None:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return body


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("pretrain", "spec.entryPoint", "python"),
        ("pretrain", f"{JOB}.maxReplica", 4),
        ("pretrain", f"{POD}.hostnetwork", True),
        ("pretrain", f"{CONTAINER}.resources.limit", {"cpu": "1"}),
        ("pretrain", f"{CONTAINER}.securityContext.capabilities.adds", ["IPC_LOCK"]),
        ("evaluate-cronjob", "spec.jobTemplate.spec.backOffLimit", 1),
        ("evaluate-raycronjob", "spec.timezone", "Etc/UTC"),
        ("pretrain", "spec.backoffLimit", "3"),
        ("pretrain", f"{JOB}.replicas", "4"),
        ("pretrain", f"{JOB}.rayStartParams", {"num-cpus": 0}),
        ("pretrain", f"{POD}.hostNetwork", "true"),
        ("pretrain", f"{CONTAINER}.env.0", {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": 240}),
        ("evaluate-cronjob", "spec.successfulJobsHistoryLimit", 2.5),
        ("pretrain", f"{CONTAINER}.resources.limits.memory", "900GB"),
        ("pretrain", f"{CONTAINER}.resources.requests.cpu", "104 cores"),
        ("pretrain", f"{POD}.volumes.0.emptyDir.sizeLimit", "200gib"),
        ("pretrain", "spec.submissionMode", "K8SJobMode"),
        ("pretrain", f"{POD}.dnsPolicy", "ClusterFirstWithHostnet"),
        ("pretrain", "spec.rayClusterSpec.authOptions.mode", "Token"),
        ("pretrain", f"{JOB}.groupName", None),
        ("pretrain", f"{CONTAINER}.name", None),
        ("evaluate-cronjob", "spec.schedule", None),
    ],
)
def test_a_wrong_field_type_or_unit_is_found(name, path, value, require_manifest):
    with pytest.raises(ValueError, match=re.escape(path.rpartition(".")[2])):
        require_manifest(changed(name, path, value))


def test_the_clusters_keep_strangers_and_tasks_away():
    for job in (*map(ray_job, TRAININGS), nightly()):
        assert job["shutdownAfterJobFinishes"]
    for cluster in clusters():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # Nothing but the control plane and the drivers runs on the head.
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    plain = MANIFESTS["evaluate-cronjob"]["spec"]
    assert plain["concurrencyPolicy"] == "Forbid"
    assert plain["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", TRAININGS)
def test_the_pretraining_command_parses_and_fits_the_nodes(name):
    module, arguments = words(ray_job(name)["entrypoint"])
    assert module == "pipeline.pretrain"
    config = parse(arguments)
    assert config.start_or_resume  # a retry is the same command
    training, evaluation = ray_job(name)["rayClusterSpec"]["workerGroupSpecs"]
    assert config.cluster.placement == training["labels"]
    assert config.checkpoint.evaluate_placement == evaluation["labels"]
    limits = pod(training["template"])["resources"]["limits"]
    gpus = training["replicas"] * int(limits["nvidia.com/gpu"])
    assert config.cluster.workers == gpus
    per_node = config.cluster.workers // training["replicas"] * config.cluster.cpus_per_worker
    assert per_node <= int(limits["cpu"])
    assert config.checkpoint.evaluate_gpus > 0
    # Ray serves tasks from /dev/shm; NCCL needs it too.
    mounts = [mount["mountPath"] for mount in pod(training["template"])["volumeMounts"]]
    assert "/dev/shm" in mounts
    assert any(config.data.stream.disk_cache.startswith(mount) for mount in mounts)


def test_several_nodes_have_the_network_that_the_plan_assumes():
    for name in TRAININGS:
        group = ray_job(name)["rayClusterSpec"]["workerGroupSpecs"][0]
        container, spec = pod(group["template"]), group["template"]["spec"]
        limits, set_ = container["resources"]["limits"], environment(container)
        assert limits == container["resources"]["requests"]
        fast = "rdma/ib" in limits
        assert fast == (group["replicas"] > 1), name
        assert set_["NCCL_SOCKET_IFNAME"]
        assert fast == (set_.get("NCCL_IB_DISABLE") != "1")
        assert fast == bool(spec.get("hostNetwork"))
        if fast:
            assert limits["rdma/ib"] == limits["nvidia.com/gpu"]  # an adapter for each GPU
            assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
            assert spec["dnsPolicy"] == "ClusterFirstWithHostNet"


@pytest.mark.parametrize("template", ["headGroupSpec", "workerGroupSpecs"])
def test_a_stop_leaves_time_for_a_checkpoint(template):
    groups = ray_job()["rayClusterSpec"][template]
    group = groups if isinstance(groups, dict) else groups[0]
    wait = int(environment(pod(group["template"]))["RAY_JOB_STOP_WAIT_TIME_S"])
    assert 3 < wait < group["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("number", [0, 1])
def test_the_evaluation_commands_parse(number):
    module, arguments = schedules()[number]
    assert module == "jobs.schedule"
    config = tyro.cli(ScheduleConfig, args=arguments)
    assert config.once
    assert config.claims_url.startswith("s3://")
    for when in rules_by_time(config):
        trigger(when, config)
    assert config.tasks.num_gpus > 0


def test_schedules_are_cron_expressions():
    for name in ("evaluate-raycronjob", "evaluate-cronjob"):
        spec = MANIFESTS[name]["spec"]
        trigger(spec["schedule"], ScheduleConfig(timezone=spec["timeZone"]))


def test_the_image_has_what_the_manifests_ask_for():
    lines = (FOLDER / "Dockerfile").read_text()
    assert "constraints.txt" in lines
    assert re.search(r"^USER ray$", lines, re.MULTILINE)
    assert "CERTIFIED_PRETRAIN_COMMIT" in lines
    # A rank has the threads of its CPUs, and the image no tools of the tests.
    assert "OMP_NUM_THREADS" not in lines
    assert "-c /tmp/project/constraints.txt" in lines
    assert "-r /tmp/project/constraints.txt" not in lines
    assert re.search(r"^FROM \$BASE$", lines, re.MULTILINE)


def test_the_base_of_the_image_is_one_release_and_its_digest_can_be_given():
    lines = (FOLDER / "Dockerfile").read_text()
    image, tag = re.search(r"^ARG BASE=([a-z]+):(\S+)$", lines, re.MULTILINE).groups()
    assert image == "python"
    assert re.fullmatch(r"3\.\d+-slim-[a-z]+", tag), "a release, not latest"
    page = (ROOT / "docs/how-to/kubernetes.md").read_text()
    for text in (lines, page):
        assert f"docker buildx imagetools inspect {image}:{tag}" in text
        assert f"BASE={image}:{tag}@" in text


def test_no_secret_gets_into_the_image():
    patterns = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    anywhere = [p.removeprefix("**/") for p in patterns if p.startswith("**/")]
    at_root = [p for p in patterns if "/" not in p]
    for name in (
        ".env", ".env.local", "a/.env", "tls.key", "a/b/tls.key", "ca.pem", "x/ca.pem", ".netrc",
        "x/id_rsa", "id_ed25519", "keys/store.p12", ".aws", "home/.aws", ".kube", ".ssh", ".git",
    ):  # fmt: skip
        path = PurePosixPath(name)
        assert any(map(path.match, anywhere if "/" in name else anywhere + at_root)), name
    for name in ("jobs/schedule.py", "pyproject.toml", "constraints.txt", "a/keys.py"):
        assert not any(map(PurePosixPath(name).match, anywhere)), name
