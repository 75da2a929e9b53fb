"""Fixtures that several folders use, and the rule that a skipped test is a failed one.

Threads are set before torch is imported anywhere.
"""

import os

import pytest

from support.databases import any_database, database
from support.postgres import postgres_url

__all__ = ["any_database", "database", "postgres_url"]

os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A test that did not run keeps no promise: skips fail the session."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if skipped and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
