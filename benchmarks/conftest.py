"""What every bench_<op>.py gets: its cases, devices and threads from the command line, and a progress bar.

A file whose tests take the fixture `case` has CASES: device -> the selection that runs when nothing else is asked for,
and "small", ragged ones that no time is worth measuring of.
test_memory gets those whose part is "memory", the other tests all others.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

from sslops import _C

from ._compare import cases, products_are_slow, settings
from ._process import die_with_parent

try:
    from tqdm import tqdm
except ImportError:  # on a machine with nothing but torch and pytest
    tqdm = None

START = time.monotonic()
PACKAGES = ("torch", "triton", "lightly", "solo-learn", "timm")


def pytest_addoption(parser):
    group = parser.getgroup("sslops")
    group.addoption("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--isa", help="of our kernels; benchmarks/compare.py has what torch's libraries are told")
    group.addoption("--busy", type=int, default=0, help="so many processes spin meanwhile, as data loaders do")
    group.addoption("--parts", help="of 'forward backward both memory'; these four are lists in quotes")
    group.addoption("--shapes", help="such as '4096x128 8192x512'; the op's file says of what")
    group.addoption("--dtypes", help="such as 'float32 bfloat16'")
    group.addoption("--threads", help="such as '1 2'; default: 1 and all cores")
    group.addoption("--seconds", type=float, default=settings.seconds, help="spent on timing a row, at least 3 rounds")
    group.addoption("--minutes", type=float, default=float("inf"), help="after which no other row is begun")
    group.addoption("--small", action="store_true", help="small shapes, for a sanitizer: with --benchmark-disable")
    group.addoption("--only-ours", action="store_true", help="leave the other variants out")
    group.addoption("--beside", help="leave out all others but these, such as 'eager compile', and the limits")
    group.addoption("--key", action="store_true", help="of each file the rows that matter most")
    group.addoption("--rows", type=Path, metavar="FILE", help="each row as a line of JSON, as soon as it is measured")


def pytest_configure(config):
    if config.getoption("--isa"):
        _C.set_isa(config.getoption("--isa"))
    settings.seconds, settings.only_ours = config.getoption("--seconds"), config.getoption("--only-ours")
    settings.busy = config.getoption("--busy")
    for _ in range(settings.busy):
        spin = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=die_with_parent)
        config.add_cleanup(spin.kill)
    if config.getoption("--beside") is not None:
        settings.beside = config.getoption("--beside").split()
    if config.getoption("--device") == "cpu":
        # Too large a matrix must end in an error that can be recorded, not in a kill; children inherit the limit.
        limit = int(_memory("MemAvailable") * 0.8)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def pytest_runtest_setup(item):
    if time.monotonic() - START > 60 * item.config.getoption("--minutes"):
        pytest.skip("no time left")


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device = option("--device")
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [device])
    if "threads" in metafunc.fixturenames:
        cores = len(os.sched_getaffinity(0))
        counts = list(dict.fromkeys([1, cores] if device == "cpu" else [cores]))
        if option("--threads"):
            counts = [int(count) for count in option("--threads").split()]
        metafunc.parametrize("threads", counts, indirect=True, ids="{}thread".format)
    if "case" in metafunc.fixturenames:
        table = metafunc.module.CASES
        selection = table["small" if option("--small") else device]
        if option("--key") and not option("--small"):
            selection = table.get("key", selection[:1])
        if device == "cpu" and not option("--small"):  # eager's and compile's rows would take hours: when asked for
            selection = [case for case in selection if not (case.dtype.itemsize == 2 and products_are_slow(case.dtype))]
        words = [option(name) for name in ("--shapes", "--dtypes", "--parts")]
        if any(words):
            columns = zip(*(str(case).split("-") for case in selection), strict=True)
            selection = cases(*(asked or " ".join(dict.fromkeys(c)) for asked, c in zip(words, columns, strict=True)))
        weighs = metafunc.function.__name__ == "test_memory"
        metafunc.parametrize("case", [case for case in selection if (case.part == "memory") == weighs], ids=str)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def device_name(device: str) -> str:
    """As a folder's name: cpu-xeon-amx-2core, nvidia-h200"""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = dict(re.findall(r"(.*?)\s*: (.*)", Path("/proc/cpuinfo").read_text()))
        noise = r"\(\w+\)|@.*|\b(?:CPU|Processor|Intel|AMD|\d+-Core)\b"
        words = re.sub(noise, " ", cpu.get("model name", platform.machine()))
        if (cpu.get("vendor_id"), cpu.get("cpu family")) == ("AuthenticAMD", "26"):  # a rented one hides its number
            words += " zen5"
        name = f"cpu {words} {_C.isa()} {len(os.sched_getaffinity(0))}core"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine(device: str) -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions["torch"] = torch.__version__  # with what it was built for
    return {
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(_memory("MemTotal") / 2**30),
        "isa": _C.isa(),
        "versions": versions,
        "sslops": _C.__file__,
    }


def commit() -> dict:
    """pytest-benchmark's facts of the commit; what `--save` writes is no change"""
    info = get_commit_info()
    if info["dirty"]:
        stored = (":!benchmarks/results", ":!RESULTS.md", ":!README.md")
        changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *stored]
        root = Path(__file__).parents[1]
        info["dirty"] = bool(subprocess.run(changed, cwd=root, capture_output=True, check=True).stdout)
    return info


def _write(config: pytest.Config, line: dict) -> None:
    if config.getoption("--rows"):
        with config.getoption("--rows").open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_runtest_makereport(item, call):
    """What was measured is kept, whatever happens next"""
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if call.when == "call" and call.excinfo is None and benchmark is not None and benchmark.extra_info:
        _write(item.config, {"fullname": item.nodeid, "extra_info": benchmark.extra_info})


class Progress:
    """A bar in place of pytest's dots"""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_collection_finish(self, session):
        self.bar = tqdm(total=len(session.items), unit="row", file=self.terminal, dynamic_ncols=True)

    def pytest_runtest_logstart(self, nodeid):
        self.bar.set_postfix_str(nodeid.split("::")[-1])

    def pytest_runtest_logfinish(self):
        self.bar.update()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        if report.passed:
            return report.outcome if report.when == "call" else "", "", ""
        return None

    def pytest_sessionfinish(self):
        if hasattr(self, "bar"):
            self.bar.close()


def pytest_sessionstart(session):
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    about = {"machine_info": machine(session.config.getoption("--device")), "commit_info": commit()}
    _write(session.config, about | {"datetime": now})
    with contextlib.suppress(OSError):  # no terminal
        terminal = Path("/dev/tty").open("w")  # noqa: SIM115, for the session; pytest captures stderr
        if tqdm is not None:
            session.config.pluginmanager.register(Progress(terminal))
