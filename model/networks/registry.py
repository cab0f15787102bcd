"""The families of networks, and from configuration to network.

A new family is one file (or a folder) with a configuration and a network, and one line of
`FAMILIES`: training, certification, the planner and the command line ask these two for everything.
To be promoted it needs a line in `model/verifier/families/registry.py` as well, and for trials its
two sizes in `jobs/comparison/trials.py`.
"""

from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator, SerializeAsAny, TypeAdapter

from model.errors import ModelError, known_names
from model.networks.base import CertifiedNetwork
from model.networks.config import NetworkConfig
from model.networks.linf.groupsort import GroupSort, GroupSortConfig
from model.networks.linf.sortnet import SortNet, SortNetConfig
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.lipnext.network import LipNeXt
from model.networks.liresnet.bronet import BRONet, BRONetConfig
from model.networks.liresnet.network import LiResNet, LiResNetConfig
from model.networks.sll.aol import Aol, AolConfig
from model.networks.sll.network import Sll, SllConfig
from model.networks.soc.network import LipConvnet, SocConfig


class Family(NamedTuple):
    """One kind of network: the class of its configuration and its own, built from one."""

    config: type[NetworkConfig]
    network: type[CertifiedNetwork]


FAMILIES: dict[str, Family] = {
    "lipnext": Family(LipNeXtConfig, LipNeXt),
    "liresnet": Family(LiResNetConfig, LiResNet),
    "bronet": Family(BRONetConfig, BRONet),
    "sortnet": Family(SortNetConfig, SortNet),
    "groupsort": Family(GroupSortConfig, GroupSort),
    "sll": Family(SllConfig, Sll),
    "soc": Family(SocConfig, LipConvnet),
    "aol": Family(AolConfig, Aol),
}
"""By `kind`."""


def family(kind: object) -> Family:
    """The family of that name.

    Raises:
        ModelError: there is none.
    """
    if kind not in FAMILIES:
        raise ModelError(f"no network family {kind!r}{known_names(kind, FAMILIES)}")
    return FAMILIES[str(kind)]


def _parse(value: Any) -> NetworkConfig:
    if isinstance(value, NetworkConfig):
        return value
    if not isinstance(value, dict):
        raise ModelError(f"a network configuration has fields, this is {type(value).__name__}")
    config = family(value.get("kind")).config
    return TypeAdapter(config).validate_python(value)


AnyNetwork = Annotated[SerializeAsAny[NetworkConfig], BeforeValidator(_parse)]
"""Type of a field that holds the configuration of any family; JSON keeps all of its fields."""


def build_network(config: NetworkConfig) -> CertifiedNetwork:
    """The network that `config` describes, with parameters allocated but not set.

    Works on the meta device and under deepspeed.zero.Init; parameters carry their manifold and
    the kind of their initial value. Call `initialise` or load weights before use.
    """
    return family(config.kind).network(config)


def on_meta_device(config: NetworkConfig) -> CertifiedNetwork:
    """The network that `config` describes, of which nothing is allocated."""
    with torch.device("meta"):
        return build_network(config)


def parameter_count(config: NetworkConfig) -> int:
    """Trained values of the network that `config` describes; nothing is allocated."""
    return sum(p.numel() for p in on_meta_device(config).parameters())
