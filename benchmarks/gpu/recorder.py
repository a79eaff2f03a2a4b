"""A pytest plugin (``-p benchmarks.gpu.recorder``) that keeps a journal for ``supervise``.

Tests that are in the journal are not run again. After a failure that destroyed the GPU's context
the process ends, because no later test could pass in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import process, supervise
from benchmarks.gpu.checks import JOURNAL


class Recorder:
    """The hooks."""

    def __init__(self, path: Path) -> None:
        self._journal = supervise.Journal(path)
        self._outcome, self._text, self._seconds = "passed", "", 0.0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self._journal.done]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self._journal.done:
            self._journal.finish(
                report.nodeid, outcome="failed", problem=str(report.longrepr)[-500:]
            )

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._journal.start(item.nodeid)
        self._outcome, self._text, self._seconds = "passed", "", 0.0
        yield
        text = {"problem": self._text} if self._outcome == "failed" else {}
        reason = {"reason": self._text} if self._outcome == "skipped" else {}
        self._journal.finish(
            item.nodeid, outcome=self._outcome, seconds=self._seconds, **text, **reason
        )
        if self._outcome == "failed" and torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except Exception as error:
                pytest.exit(f"the GPU's context is lost: {error}", returncode=supervise.LOST)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.outcome == "passed" or self._outcome == "failed":
            return
        self._outcome = report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        if crash is not None:
            self._text = crash.message[:500]
        elif isinstance(report.longrepr, tuple):  # (path, line, reason) of a skip
            self._text = str(report.longrepr[2])
        else:
            self._text = str(report.longrepr)[-500:]


def pytest_configure(config: pytest.Config) -> None:
    process.obey_canaries()
    config.pluginmanager.register(Recorder(Path(os.environ[JOURNAL])), "fusedrnn-recorder")
