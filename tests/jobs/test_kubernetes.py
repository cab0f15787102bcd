"""The manifests: fields that exist, commands that parse, resources that fit each other."""

import re
import shlex
from pathlib import Path

import pytest
import tyro
import yaml

from jobs.schedule import rules_by_time, trigger
from jobs.scheduling.config import ScheduleConfig
from pipeline.pretrain import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "jobs/kubernetes"
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}
# Fields of KubeRay 1.7 and Kubernetes 1.31 that are used here.
RAY_JOB = {
    "entrypoint", "metadata", "backoffLimit", "submissionMode", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished", "activeDeadlineSeconds", "rayClusterSpec",
}  # fmt: skip
GROUP = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "labels", "rayStartParams", "template",
}  # fmt: skip


def ray_job():
    return MANIFESTS["pretrain"]["spec"]


def nightly():
    return MANIFESTS["evaluate-raycronjob"]["spec"]["jobTemplate"]


def pod(template):
    (container,) = template["spec"]["containers"]
    return container


def clusters():
    return [ray_job()["rayClusterSpec"], nightly()["rayClusterSpec"]]


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
        "evaluate-raycronjob": ("ray.io/v1", "RayCronJob"),
        "evaluate-cronjob": ("batch/v1", "CronJob"),
    }
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert {cluster["rayVersion"] for cluster in clusters()} == {pinned}
    images = {container["image"] for container in containers()}
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert images == {f"REGISTRY/certified-pretrain:{version}"}
    assert images.pop() in (FOLDER / "Dockerfile").read_text()


def test_fields_are_known():
    for job in (ray_job(), nightly()):
        assert set(job) <= RAY_JOB
        assert job["shutdownAfterJobFinishes"]
    for cluster in clusters():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
        for group in cluster["workerGroupSpecs"]:
            assert set(group) <= GROUP
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # Nothing but the control plane and the drivers runs on the head.
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    cron = MANIFESTS["evaluate-raycronjob"]["spec"]
    assert set(cron) == {"schedule", "timeZone", "suspend", "jobTemplate"}
    plain = MANIFESTS["evaluate-cronjob"]["spec"]
    assert plain["concurrencyPolicy"] == "Forbid"
    assert plain["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_the_pretraining_command_parses_and_fits_the_nodes():
    module, arguments = words(ray_job()["entrypoint"])
    assert module == "pipeline.pretrain"
    config = parse(arguments)
    assert config.start_or_resume  # a retry is the same command
    training, evaluation = ray_job()["rayClusterSpec"]["workerGroupSpecs"]
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
    assert ".git" in (FOLDER / "Dockerfile.dockerignore").read_text().split()
