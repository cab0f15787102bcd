"""What was measured on a machine, in the place of data sheets and assumptions.

`python -m benchmarks.calibrate` writes such a file, `python -m pipeline.plan --measured` reads it.
"""

from pathlib import Path

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from data_shards.untrusted.json_input import read_object
from data_shards.untrusted.limits import UntrustedError
from pipeline.errors import PipelineError


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Measured:
    """Rates of one rank while all ranks do the same; those between ranks are 0 for one rank."""

    hardware: str
    """Processor, threads, accelerator, version of torch."""
    date: str
    device: str
    """Name of the device of a rank."""
    precision: str
    """Of the working weights."""
    increment: str
    """Precision of the manifold step's products, `optim.increment`."""
    ranks: int = Field(ge=1)
    nodes: int = Field(ge=1)
    width: int = Field(ge=1)
    """Of the matrices that were multiplied."""
    tokens: int = Field(ge=1)
    """Rows that were multiplied with them."""
    memory_gb: float = Field(gt=0)
    """10^9 bytes that a rank can have."""
    working_flops: float = Field(gt=0)
    """FLOP/s of products of tokens with a matrix in the working precision, forward and backward."""
    single_flops: float = Field(gt=0)
    """FLOP/s of products of two matrices in fp32."""
    pass_efficiency: float = Field(gt=0)
    """Share of `working_flops` at which forward and backward passes have their products done."""
    step_efficiency: float = Field(gt=0)
    """Share of `single_flops` at which the manifold step has its products done."""
    exchange_gbps: float = Field(ge=0)
    """10^9 bits per second that a rank sends in an all-to-all."""
    gather_gbps: float = Field(ge=0)
    """The same in an all-gather of one block."""
    scatter_gbps: float = Field(ge=0)
    """The same in a reduce-scatter of one bucket."""
    latency_s: float = Field(ge=0)
    """Seconds of an all-to-all of a few bytes."""
    decode_rate: float = Field(gt=0)
    """Images per second that one CPU core decodes and crops to the network's input."""
    overlap: bool
    """Whether collectives and decoding run beside products; on CPUs they use the same cores."""

    def to_json(self) -> str:
        """As text, for a file."""
        return TypeAdapter(type(self)).dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """What a file holds.

        Raises:
            PipelineError: it cannot be read, or is not such a file.
        """
        try:
            with path.open("rb") as file:
                return TypeAdapter(cls).validate_python(read_object(file, path.name))
        except OSError as error:
            raise PipelineError(f"--measured {path}: {error.strerror or error}") from error
        except (UntrustedError, ValidationError) as error:
            raise PipelineError(f"--measured {path}: {error}") from error
