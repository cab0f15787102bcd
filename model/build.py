"""From configuration to network."""

from model.config import NetworkConfig
from model.contract import CertifiedNetwork
from model.lipnext import LipNeXt


def build_network(config: NetworkConfig) -> CertifiedNetwork:
    """The network that `config` describes, with parameters allocated but not set.

    Works on the meta device and under deepspeed.zero.Init; parameters carry their manifold and
    the kind of their initial value. Call `initialise` or load weights before use.
    """
    return LipNeXt(config)
