import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def honest(tmp_path_factory):
    from tests.model.certificate_maker import make  # what tests of a GPU do without

    return make(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def case(honest, tmp_path):
    return honest.copy(tmp_path / "case")
