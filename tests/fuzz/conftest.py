from collections import Counter

import pytest

COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="session")
def counted():
    def count(what: str, times: int = 1) -> None:
        COUNTS[what] += times

    return count


def pytest_terminal_summary(terminalreporter):
    for what, times in COUNTS.items():
        terminalreporter.write_line(f"{times} {what}")
