import pytest
import torch

from tests.model.certificate_maker import Case, make


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def honest(tmp_path_factory) -> Case:
    return make(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def case(honest, tmp_path) -> Case:
    return honest.copy(tmp_path / "case")
