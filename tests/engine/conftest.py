import pytest
import torch

from support.tiny import Zoo, tiny_zoo


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    return tiny_zoo()
