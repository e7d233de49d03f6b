"""`make wheel`: an sdist, and from it a wheel for each CPython here, for glibc 2.28 and later, with CPU and CUDA code.

The objects are those of `make build`, GCC's and nvcc's; zig only links them, with the C++ and CUDA runtimes inside. A
wheel names these in an SBOM (CycloneDX, where PEP 770 has it), and its core is loaded by its Python;
tests/test_wheel.py installs and runs one beside torch alone. Not cibuildwheel: that needs containers, with a CUDA
toolkit in each; CI has none, and a release would be the first to try what it publishes.

`CXX=aarch64-linux-gnu-g++ make wheel`, with Debian's cross-compiler, makes those for aarch64, with the CPU's code, but
cannot run them; the release workflow makes them on such a machine, and does.
"""

import argparse
import ast
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
POLICY = "manylinux_2_28"
CXX = shlex.split(os.environ.get("CXX", "c++"))
PYTHONS = [f"python3.{minor}" for minor in range(10, 14)]
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sslops._C", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print(core.build_info())
"""


def run(*command: object, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def found(pythons: list[str]) -> list[str]:
    """Those that run; a version manager has commands for others, too"""
    there = filter(shutil.which, pythons)
    return [python for python in there if subprocess.run([python, "-V"], capture_output=True).returncode == 0]


def unpacked(sdist: Path, folder: Path, machine: str) -> Path:
    """The sdist's tree, nothing else, beside the objects that there are: those of other sources are made again"""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    objects = ROOT / "build" / f"linux-{machine}"
    objects.mkdir(parents=True, exist_ok=True)
    (tree / "build").mkdir()
    (tree / "build" / objects.name).symlink_to(objects)
    return tree


def sbom(info: dict) -> dict:
    """What the core holds of others, as CycloneDX has it"""
    gcc = run(*CXX, "-dumpfullversion").strip()
    held = [("pybind11", version("pybind11"), "BSD-3-Clause"),
            ("libstdc++ and libgcc", gcc, "GPL-3.0-or-later WITH GCC-exception-3.1")]  # fmt: skip
    if info["cuda_archs"]:
        home = os.environ.get("CUDA_HOME")
        nvcc = run(f"{home}/bin/nvcc" if home else "nvcc", "--version")
        held.append(("CUDA runtime", nvcc.split("release ")[1].split(",")[0], "LicenseRef-NVIDIA-CUDA-EULA"))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "library", "name": "sslops", "version": info["version"]}},
        "components": [
            {"type": "library", "name": name, "version": of, "licenses": [{"expression": licence}]}
            for name, of, licence in held
        ],
    }


def unversioned(core: Path) -> list[str]:
    """What the core wants of no library, Python apart: of a newer glibc, then, which is what auditwheel cannot tell"""
    names = re.findall(r"^ +U ([^@\n]+)$", run("nm", "--dynamic", "--undefined-only", core), re.M)
    return [name for name in names if not name.startswith(("Py", "_Py"))]


def abroad(python: str, machine: str) -> dict[str, str]:
    """What tells setuptools of another machine than this one"""
    suffix = run(python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").strip()
    suffix = suffix.replace(platform.machine(), machine)
    return {"_PYTHON_HOST_PLATFORM": f"linux-{machine}", "SETUPTOOLS_EXT_SUFFIX": suffix, "SSLOPS_BUILD_CUDA": "0"}


def build(python: str, machine: str, tree: Path, out: Path) -> tuple[Path, dict]:
    """A wheel in `out`, and its core's build_info()"""
    work = Path(tempfile.mkdtemp(dir=tree.parent))
    zig = f"{shlex.quote(sys.executable)} -m ziglang"
    # The tools are this interpreter's: another one imports them from here, and finds ninja on PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tools = {"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": path, "SSLOPS_ZIG": zig}
    native = machine == platform.machine()
    if not native:
        tools |= abroad(python, machine)
    run(shutil.which(python) or python, "setup.py", "-q", "bdist_wheel", "-d", work, cwd=tree, **tools)
    run(sys.executable, "-m", "wheel", "unpack", next(work.glob("*.whl")), "-d", work)
    (folder,) = (path for path in work.iterdir() if path.is_dir())
    (work / "packed").mkdir()
    (core,) = folder.glob("sslops/_C*.so")
    missing = unversioned(core)
    if missing:
        raise SystemExit(f"{core.name} would not load beside a {POLICY} glibc, which lacks {', '.join(missing)}")
    info = {"version": folder.name.split("-")[1], "isas": "not run", "cuda_archs": None}
    if native:
        info = ast.literal_eval(run(python, "-I", "-c", LOAD, core))
    (about,) = folder.glob("*.dist-info")
    (about / "sboms").mkdir()
    (about / "sboms/sslops.cdx.json").write_text(json.dumps(sbom(info), indent=1) + "\n")
    (licence,) = (file for file in distribution("pybind11").files or [] if file.name == "LICENSE")
    shutil.copy(licence.locate(), about / "licenses/LICENSE.pybind11")
    run(sys.executable, "-m", "wheel", "pack", folder, "-d", work / "packed")
    (packed,) = (work / "packed").glob("*.whl")
    plat = f"{POLICY}_{machine}" if native else "auto"  # auditwheel knows this machine's names only
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", plat, "-w", work / "repaired", packed, PATH=path)
    (wheel,) = (work / "repaired").glob("*.whl")
    return shutil.copy(wheel, out), info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pythons", nargs="*", default=found(PYTHONS), help=f"default: those here of {' '.join(PYTHONS)}"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    machine = run(*CXX, "-dumpmachine").split("-")[0]
    for old in (*arguments.out.glob("sslops-*.tar.gz"), *arguments.out.glob(f"sslops-*_{machine}.whl")):
        old.unlink()
    run(sys.executable, "setup.py", "-q", "sdist", "-d", arguments.out)
    (sdist,) = arguments.out.glob("sslops-*.tar.gz")
    print(f"{sdist.name}  {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
    tree = unpacked(sdist, ROOT / "build/wheels", machine)
    for python in arguments.pythons:
        start = time.perf_counter()
        wheel, info = build(python, machine, tree, arguments.out)
        with zipfile.ZipFile(wheel) as archive:
            size = sum(file.file_size for file in archive.infolist())
        print(
            f"{Path(wheel).name}  {Path(wheel).stat().st_size / 1e6:.2f} MB ({size / 1e6:.2f} MB installed, "
            f"CPU {info['isas']}, CUDA {info['cuda_archs']}), {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    run(sys.executable, "-m", "twine", "check", "--strict", *arguments.out.glob("sslops-*"))


if __name__ == "__main__":
    main()
