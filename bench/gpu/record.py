"""A plugin of pytest that keeps a journal (journal.py) of tests: ``-p bench.gpu.record --journal FILE``.

Tests that are in the journal are left out, so that an interrupted run continues. A process whose GPU no longer answers,
as after an invalid write, ends at once, because every later test would fail in it.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.journal import Journal

BROKEN = 70
"""Exit status of a process whose GPU is gone."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="write each test and its outcome to this file, and skip what it has")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--journal")
    if path is not None:
        given = getattr(config, "workerinput", None)  # of a process of pytest-xdist
        size = path.stat().st_size if given is None and path.exists() else (given or {}).get("journal_size", 0)
        config.pluginmanager.register(Record(Journal(path), given is not None, size))


class Record:
    """``size``: bytes of the journal when the run began. All workers must leave out the same tests, including one that
    is started late to replace one that crashed."""

    def __init__(self, journal: Journal, worker: bool, size: int) -> None:
        self.journal, self.worker, self.size = journal, worker, size
        self.outcome: dict[str, tuple[str, str, float]] = {}
        self.known = {line["name"] for line in journal.lines(size) if line["event"] != "start"}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["journal_size"] = self.size

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.known])
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self.worker:
            self.journal.write("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.worker:
            return
        worst, reason, seconds = self.outcome.get(report.nodeid, ("passed", "", 0.0))
        if report.outcome != "passed" and worst != "failed":
            worst = report.outcome
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash is not None else str(report.longrepr)
            if isinstance(report.longrepr, tuple):
                reason = report.longrepr[2]
        self.outcome[report.nodeid] = (worst, reason, seconds + report.duration)
        if report.when not in ("setup", "call", "teardown"):  # its worker crashed: no other report follows
            self.pytest_runtest_logfinish(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if not self.worker and nodeid in self.outcome:
            outcome, reason, seconds = self.outcome.pop(nodeid)
            self.journal.write("done", nodeid, outcome=outcome, reason=reason[:500], seconds=round(seconds, 3))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        if item.config.getoption("--device", "cpu") == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(BROKEN)
        return result
