"""A pytest plugin, `-p benchmarks.outcomes --outcomes FILE`: each test's outcome and traceback as soon as it is known.

Of a run that is killed the lines so far are there. --again runs only what failed in such a file.
"""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, metavar="FILE")
    parser.addoption("--again", type=Path, metavar="FILE")


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")  # of xdist; the reports reach the one that started it


def pytest_runtest_logreport(report):
    if _config is not None and (report.when == "call" or report.outcome != "passed"):
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            line["trace"] = report.longreprtext[-4000:]
        with _config.getoption("--outcomes").open("a") as file:
            file.write(json.dumps(line) + "\n")


_config: pytest.Config | None = None


def pytest_configure(config):
    global _config
    if config.getoption("--outcomes") and not _is_worker(config):
        _config = config


def pytest_collection_modifyitems(config, items):
    if config.getoption("--again"):
        lines = map(json.loads, config.getoption("--again").read_text().splitlines())
        failed = {line["test"] for line in lines if line["outcome"] == "failed"}
        items[:] = [item for item in items if item.nodeid in failed]
