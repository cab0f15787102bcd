"""Rendezvous of the ranks: Ray Train's own, on one machine over loopback alone.

Below Ray's public interface: `_TorchBackend`; `tests/end_to_end/test_readme.py` notices changes.
"""

import dataclasses
import datetime
import os
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from pipeline.run.distributed import create_group, on_one_machine


@dataclasses.dataclass
class GroupConfig(TorchConfig):
    """Ray's, with the backend below."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """See BackendConfig."""
        return _GroupBackend


class _GroupBackend(_TorchBackend):
    """Ray's backend; where rank 0 has a loopback address, the group is that of `create_group`."""

    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """See Backend."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        if not all(worker_group.execute(_meet, meeting)):
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(_set_torch_distributed_env_vars)
        timeout = datetime.timedelta(seconds=backend_config.timeout_s)
        ray.get(worker_group.execute_async(create_group, backend_config.backend, timeout))


def _meet(meeting: dict[str, str]) -> bool:
    """Runs on every rank: where it finds rank 0; whether that is on its own machine."""
    os.environ.update(meeting)
    return on_one_machine()
