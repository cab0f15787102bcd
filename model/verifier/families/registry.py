"""The families of networks that are verified, one file each."""

from model.verifier.errors import UnsupportedError, UnusableError, shown, take
from model.verifier.families.aol import Aol
from model.verifier.families.base import Family
from model.verifier.families.bronet import BRONet
from model.verifier.families.groupsort import GroupSort
from model.verifier.families.lipnext import LipNeXt
from model.verifier.families.liresnet import LiResNet
from model.verifier.families.sll import Sll
from model.verifier.families.soc import Soc
from model.verifier.families.sortnet import SortNet
from model.verifier.network_config import Config, checked

FAMILIES: dict[str, type[Family]] = {
    "lipnext": LipNeXt,
    "sll": Sll,
    "aol": Aol,
    "soc": Soc,
    "liresnet": LiResNet,
    "bronet": BRONet,
    "sortnet": SortNet,
    "groupsort": GroupSort,
}


def family_of(stored: Config, place: str) -> tuple[type[Family], Config]:
    """Family and checked configuration of a network.

    Raises:
        UnsupportedError: no proof is known for this network.
        UnusableError: a configuration that no network has.
    """
    kind = take(stored, "kind", str, place)
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(f"{place}.kind {shown(kind)} is not verified here; known: {known}")
    family = FAMILIES[kind]
    config = checked(stored, family.settings, place)
    if reason := family.misfit(config):
        raise UnusableError(f"{place}: {reason}")
    return family, config
