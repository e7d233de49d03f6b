"""The house's rails: one stem everywhere, imports that point one way, nothing from outside the project.

Each rule maps a tree to the places that break it; it must find none here, and must find the ones planted below.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The named homes of what several ops share; every other stem in kernels/, csrc/cpu/ and csrc/cuda/ is an op's.
SHARED = {
    "csrc/cpu/bf16_gemm.cpp",
    "csrc/cpu/columns.cpp",
    "csrc/cpu/exceeding.cpp",
    "csrc/cpu/prototypes.cpp",
    "csrc/cuda/probe.cu",
    "kernels/cpu/columns.py",
    "kernels/cpu/exceeding.py",
    "kernels/cpu/memory.py",
    "kernels/cpu/prototypes.py",
    "kernels/cuda/device.py",
    "kernels/native/call.py",
    "kernels/native/patches.py",
    "kernels/triton/candidates.py",
    "kernels/triton/columns.py",
    "kernels/triton/exceeding.py",
    "kernels/triton/last_layer.py",
    "kernels/triton/launch.py",
    "kernels/triton/off_diagonal.json",
    "kernels/triton/off_diagonal.py",
    "kernels/triton/paired.py",
    "kernels/triton/pairs.json",
    "kernels/triton/pairs.py",
    "kernels/triton/prototypes.py",
    "kernels/triton/relic_tiles.py",
    "kernels/triton/rows.py",
    "kernels/triton/views.py",
    "kernels/triton/w_z.py",
}


def ops(root: Path) -> set[str]:
    return {file.stem for file in root.glob("sslops/ops/*.py")} - {"__init__"}


def broken_stems(root: Path, shared: set[str]) -> list[str]:
    broken = [f"{name} is listed as shared but is not there" for name in sorted(shared) if not (root / name).exists()]
    for op in sorted(ops(root)):
        for wanted in (f"kernels/*/{op}.py", f"tests/test_{op}.py", f"benchmarks/bench_{op}.py"):
            if not any(root.glob(wanted)):
                broken.append(f"{op} has no {wanted}")
    for pattern in ("kernels/*/*.py", "kernels/*/*.json", "csrc/cpu/*.cpp", "csrc/cuda/*.cu"):
        for file in sorted(root.glob(pattern)):
            name = file.relative_to(root).as_posix()
            if file.stem not in ops(root) and name not in shared:
                broken.append(f"{name} belongs to no op")
    return broken


def imports(file: Path, module: str) -> Iterator[str]:
    """Absolute names of all that a file imports when it runs, inside functions too: `from a import b` is a.b."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(file.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(inner) for node in typing_only for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def may_import(root: Path, importer: str, name: str, shared: set[str]) -> bool:
    if name.split(".")[0] in sys.stdlib_module_names:
        return True
    if inside(importer, "sslops.kernels"):
        backend = importer.split(".")[2]
        # What serves two backends may ask what both have to say of their devices.
        folders = ("native", "cpu", "cuda") if backend == "native" else (backend,)
        homes = [Path(home).with_suffix("").as_posix().replace("/", ".") for home in shared]
        homes = [f"sslops.{home}" for home in homes if inside(home, *(f"kernels.{folder}" for folder in folders))]
        return inside(name, "torch", "triton", "sslops._C", *homes)
    if inside(importer, *(f"sslops.ops.{op}" for op in ops(root))):
        # What lies beside the ops: neither other ops, nor their names in sslops, nor kernels past the backend.
        homes = [file.stem for file in root.glob("sslops/*.py") if file.stem != "__init__"]
        return inside(name, "torch", "sslops._C", *(f"sslops.{home}" for home in homes))
    if importer == "sslops.__main__":  # the command that reports triton's version; nothing imports it
        return inside(name, "torch", "triton", "sslops")
    return inside(name, "torch", "sslops")


def broken_imports(root: Path, shared: set[str]) -> list[str]:
    broken = []
    for folder, package in (("sslops", "sslops"), ("kernels", "sslops.kernels")):
        for file in sorted((root / folder).rglob("*.py")):
            path = file.relative_to(root / folder)
            module = ".".join([package, *path.with_suffix("").parts]).removesuffix(".__init__")
            for name in imports(file, module):
                if not may_import(root, module, name, shared):
                    broken.append(f"{folder}/{path.as_posix()} imports {name}")
    return broken


OUTSIDE = re.compile(r"(?<![\w.~$}>-])/(?:home|root|work|tmp|opt|mnt|Users)/[\w.]|\.\./shared\b")


def outside_paths(root: Path, files: list[str]) -> list[str]:
    broken = []
    for name in files:
        file = root / name
        if file.is_symlink():
            if not file.resolve().is_relative_to(root.resolve()):
                broken.append(f"{name} links to {file.readlink()}")
        elif b"\0" not in file.read_bytes():
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if OUTSIDE.search(line):
                    broken.append(f"{name}:{number}: {line.strip()}")
    return broken


def test_one_stem() -> None:
    assert broken_stems(ROOT, SHARED) == []


def test_imports_point_one_way() -> None:
    assert broken_imports(ROOT, SHARED) == []


def test_nothing_tracked_points_outside() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git work tree")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert outside_paths(ROOT, [name for name in listed.split("\0") if name and (ROOT / name).exists()]) == []


GOOD = {
    "sslops/__init__.py": "from .ops.a import a",
    "sslops/backend.py": "import importlib",
    "sslops/_check.py": "",
    "sslops/__main__.py": "import triton",
    "sslops/ops/__init__.py": "",
    "sslops/ops/a.py": "import torch\nfrom ..backend import resolve\nfrom .. import _check",
    "sslops/ops/b.py": "from sslops.backend import resolve",
    "kernels/cpu/a.py": "import math\nimport torch.nn\nfrom sslops import _C\nfrom .tiles import TILE",
    "kernels/cpu/b.py": "import sslops._C",
    "kernels/cpu/tiles.py": "",
    "kernels/native/a.py": "from ..cpu.tiles import TILE",
    "kernels/triton/a.py": "import triton.language as tl",
    "kernels/triton/a.json": "{}",
    "csrc/cpu/a.cpp": "",
    "csrc/cuda/b.cu": "",
    "tests/test_a.py": "",
    "tests/test_b.py": "",
    "benchmarks/bench_a.py": "",
    "benchmarks/bench_b.py": "",
}
GOOD_SHARED = {"kernels/cpu/tiles.py"}


def plant(root: Path, files: dict[str, str | None]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            file.unlink()
        else:
            file.write_text(text)


def test_a_good_tree_passes(tmp_path: Path) -> None:
    plant(tmp_path, GOOD)
    assert broken_stems(tmp_path, GOOD_SHARED) == []
    assert broken_imports(tmp_path, GOOD_SHARED) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ({"kernels/cpu/b.py": None}, "b has no kernels/*/b.py"),
        ({"tests/test_a.py": None}, "a has no tests/test_a.py"),
        ({"benchmarks/bench_a.py": None}, "a has no benchmarks/bench_a.py"),
        ({"kernels/cuda/c.py": ""}, "kernels/cuda/c.py belongs to no op"),
        ({"kernels/triton/c.json": "{}"}, "kernels/triton/c.json belongs to no op"),
        ({"csrc/cpu/c.cpp": ""}, "csrc/cpu/c.cpp belongs to no op"),
        ({"csrc/cuda/c.cu": ""}, "csrc/cuda/c.cu belongs to no op"),
        ({"kernels/triton/tiles.py": ""}, "kernels/triton/tiles.py belongs to no op"),
        ({"kernels/cpu/tiles.py": None}, "kernels/cpu/tiles.py is listed as shared but is not there"),
    ],
)
def test_a_broken_stem_is_found(tmp_path: Path, planted: dict[str, str | None], found: str) -> None:
    plant(tmp_path, GOOD)
    plant(tmp_path, planted)
    assert broken_stems(tmp_path, GOOD_SHARED) == [found]


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("kernels/cpu/a.py", "import sslops", "sslops"),
        ("kernels/cpu/a.py", "from sslops.backend import resolve", "sslops.backend.resolve"),
        ("kernels/cpu/a.py", "from ...backend import resolve", "sslops.backend.resolve"),
        ("kernels/cpu/a.py", "def f():\n    from sslops import backend", "sslops.backend"),
        ("kernels/cpu/a.py", "from .b import forward", "sslops.kernels.cpu.b.forward"),
        ("kernels/triton/a.py", "from ..cpu.tiles import TILE", "sslops.kernels.cpu.tiles.TILE"),
        ("kernels/native/a.py", "from ..cpu.b import forward", "sslops.kernels.cpu.b.forward"),
        ("kernels/triton/a.py", "import numpy", "numpy"),
        ("kernels/triton/a.py", "from tests import oracle", "tests.oracle"),
        ("sslops/ops/a.py", "from .b import b", "sslops.ops.b.b"),
        ("sslops/ops/a.py", "from . import b", "sslops.ops.b"),
        ("sslops/ops/a.py", "from sslops.ops import b", "sslops.ops.b"),
        ("sslops/ops/a.py", "import sslops.ops.b as other", "sslops.ops.b"),
        ("sslops/ops/a.py", "from .. import ops", "sslops.ops"),
        ("sslops/ops/a.py", "import sslops", "sslops"),
        ("sslops/ops/a.py", "from sslops import b", "sslops.b"),
        ("sslops/ops/a.py", "from ..kernels.cpu import a", "sslops.kernels.cpu.a"),
        ("sslops/backend.py", "import triton", "triton"),
        ("sslops/backend.py", "from tests.oracle import check", "tests.oracle.check"),
        ("sslops/__init__.py", "import benchmarks.peers", "benchmarks.peers"),
        ("sslops/__init__.py", "from examples import pretrain", "examples.pretrain"),
    ],
)
def test_a_broken_import_is_found(tmp_path: Path, file: str, line: str, found: str) -> None:
    plant(tmp_path, GOOD)
    plant(tmp_path, {file: line})
    assert broken_imports(tmp_path, GOOD_SHARED) == [f"{file} imports {found}"]


def test_an_outside_path_is_found(tmp_path: Path) -> None:
    bad = ["see .{}shared/notes".format("./"), "open('{}home/me/data')".format("/"), "cp {}tmp/x .".format("/")]
    fine = ["#!/usr/bin/env bash", "see https://example.org/home/x", "kernels -> ../kernels", "$HOME/work/x", "./tmp/x"]
    plant(tmp_path, {"a.md": "\n".join(bad + fine)})
    (tmp_path / "in").symlink_to("a.md")
    (tmp_path / "out").symlink_to("../b.md")
    assert outside_paths(tmp_path, ["a.md", "in", "out"]) == [
        *(f"a.md:{number}: {line}" for number, line in enumerate(bad, 1)),
        "out links to ../b.md",
    ]
