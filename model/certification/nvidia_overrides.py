"""Variables of the environment that change NVIDIA's products without torch knowing of it."""

import os
from collections.abc import Mapping

_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_EMULATE_SINGLE_PRECISION",
    "CUBLAS_EMULATE_DOUBLE_PRECISION",
)


def library_overrides(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Those that are set to something else than 0, as `NAME=value`.

    They round the factors of float32 products to TF32, or emulate float32 and float64 products by
    several of fewer bits: other errors than those that `model.certification.rounding` charges.
    """
    found = ((name, environment.get(name, "").strip()) for name in _VARIABLES)
    return [f"{name}={value}" for name, value in found if value not in ("", "0")]
