"""What Kubernetes and KubeRay accept of a manifest: closed and typed, an unknown field is refused.

The objects of Kubernetes are those of the package `lightkube-models`, which is generated from the
API's own description. Those of KubeRay (`ray.io/v1`, from release 1.6 on) have the fields that the
manifests use, with the types of its API reference; pods in them are Kubernetes' own.
"""
# ruff: noqa: N815 - the API's names

import json
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

_CLOSED = ConfigDict(extra="forbid", strict=True)
# Its models are plain dataclasses unless the client, which is not needed, offers another kind.
_KIND = {"DictMixin": object, "dataclass": dataclass, "field": field}
sys.modules.setdefault("lightkube.core.schema", types.SimpleNamespace(**_KIND))

from lightkube.models import batch_v1, core_v1, meta_v1  # noqa: E402 - after what they are made of

for _module in (batch_v1, core_v1, meta_v1):
    for _model in vars(_module).values():
        if is_dataclass(_model):
            _model.__pydantic_config__ = _CLOSED

_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Text = Annotated[str, Field(min_length=1)]


@dataclass(kw_only=True)
class _Closed:
    __pydantic_config__ = _CLOSED


@dataclass(kw_only=True)
class AuthOptions(_Closed):
    mode: Literal["disabled", "token"] = "disabled"
    secretName: str | None = None


@dataclass(kw_only=True)
class _Group(_Closed):
    template: core_v1.PodTemplateSpec
    rayStartParams: dict[str, str]
    labels: dict[str, str] | None = None


@dataclass(kw_only=True)
class WorkerGroup(_Group):
    groupName: _Text
    minReplicas: _Count
    maxReplicas: _Count
    replicas: _Count = 0


@dataclass(kw_only=True)
class RayClusterSpec(_Closed):
    headGroupSpec: _Group
    workerGroupSpecs: list[WorkerGroup]
    rayVersion: str
    authOptions: AuthOptions


@dataclass(kw_only=True)
class RayJobSpec(_Closed):
    entrypoint: str
    rayClusterSpec: RayClusterSpec
    metadata: dict[str, str] | None = None
    backoffLimit: _Count = 0
    activeDeadlineSeconds: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    ttlSecondsAfterFinished: _Count = 0
    shutdownAfterJobFinishes: bool = False
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = (
        "K8sJobMode"
    )


@dataclass(kw_only=True)
class _Object(_Closed):
    apiVersion: Literal["ray.io/v1"]
    metadata: meta_v1.ObjectMeta


@dataclass(kw_only=True)
class RayJob(_Object):
    kind: Literal["RayJob"]
    spec: RayJobSpec


@dataclass(kw_only=True)
class RayCronJobSpec(_Closed):
    schedule: str
    jobTemplate: RayJobSpec
    timeZone: _Text | None = None
    suspend: bool | None = None


@dataclass(kw_only=True)
class RayCronJob(_Object):
    kind: Literal["RayCronJob"]
    spec: RayCronJobSpec


_KINDS: Mapping[tuple[str, str], type] = MappingProxyType(
    {
        ("ray.io/v1", "RayJob"): RayJob,
        ("ray.io/v1", "RayCronJob"): RayCronJob,
        ("batch/v1", "CronJob"): batch_v1.CronJob,
    }
)
# Their API description says "text"; the values below are what the API server takes.
_QUANTITY = re.compile(r"(\d+\.?\d*|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_QUANTITIES = ("limits", "requests", "sizeLimit")
_CHOICES = {
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
    "concurrencyPolicy": {"Allow", "Forbid", "Replace"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "medium": {"", "Memory"},
}


def require_manifest(body: Mapping[str, Any]) -> None:
    """Check an object of a manifest.

    Raises:
        ValueError: a field that its kind lacks or that is missing, a value of another type, a
            quantity of no unit of Kubernetes, a word that is none of the choices; all are named.
        KeyError: no such kind.
    """
    kind = _KINDS[body["apiVersion"], body["kind"]]
    TypeAdapter(kind).validate_json(json.dumps(body))
    if wrong := list(_wrong(body, ())):
        raise ValueError("; ".join(wrong))


def _wrong(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    place = ".".join(path)
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _wrong(below, (*path, name))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from _wrong(below, (*path, str(number)))
    elif any(name in path[-2:] for name in _QUANTITIES):
        if not _QUANTITY.fullmatch(str(value)):
            yield f"{place}: {value!r} is no quantity"
    elif path[-1] in _CHOICES and value not in _CHOICES[path[-1]]:
        yield f"{place}: {value!r} is none of {sorted(_CHOICES[path[-1]])}"
