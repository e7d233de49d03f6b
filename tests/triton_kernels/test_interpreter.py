"""The tests in <op>.py, through Triton's interpreter, which a process has from its start or not at all.

conftest.py makes it compute as a GPU does; arithmetic.py shows on known numbers that it then does.
"""

import os
import subprocess
import sys

import pytest

from .offline import HERE, OPS


@pytest.mark.parametrize("op", ["arithmetic", *OPS])
def test_interpreted(op: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / f"{op}.py"]
    process = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout
