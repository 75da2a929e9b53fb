import pytest
import torch

from serve_app.models.demo import install_demo
from support.pictures import Demo


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(install_demo(tmp_path_factory.mktemp("models") / "demo"))
