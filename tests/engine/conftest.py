import pytest
import torch

from support.reference import ERRORS
from support.tiny import Zoo, tiny_zoo


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    return tiny_zoo()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figure that parity is about, whenever it was measured."""
    if ERRORS:
        terminalreporter.write_line(
            f"parity with diffusers: {len(ERRORS)} cases, worst relative error {max(ERRORS):.1e}"
        )
