"""What users install: wheels from the tree's archives, in an environment that has torch and nothing else."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

# Run with the light import first: triton and torch._dynamo are slow to load, and may be absent.
LIGHT = """
import sys, torch

class Spy:
    def find_spec(self, name, path=None, target=None):
        assert name not in ("triton", "torch._dynamo"), f"import sslops loads {name}"

sys.meta_path.insert(0, Spy())
import sslops
assert not {"triton", "torch._dynamo"} & set(sys.modules)
"""

SMOKE = (
    LIGHT
    + """
sys.meta_path.pop(0)
assert sslops.__file__.startswith(sys.prefix), sslops.__file__
from importlib.metadata import version
from sslops import _C
build = _C.build_info()
assert sslops.__version__ == version("sslops") == build["version"]
print(build)
results = []
for backend in (None, "eager"):
    torch.manual_seed(0)
    z0, z1 = (torch.randn(96, 32, requires_grad=True) for _ in range(2))
    loss = sslops.nt_xent(z0, z1, temperature=0.2, backend=backend)
    loss.backward()
    results.append((loss, z0.grad, z1.grad))
torch.testing.assert_close(*results)
assert torch.isfinite(loss) and z0.grad.abs().max() > 0
explained = sslops.explain("nt_xent", z0, z1)
assert "eager" in explained and "cpu" in explained, explained
"""
)


def run(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def path_without_nvcc(folder: Path) -> str:
    """PATH, where a folder that holds nvcc is replaced by links to all else in it."""
    folders = []
    for number, name in enumerate(os.environ["PATH"].split(os.pathsep)):
        if Path(name, "nvcc").exists():
            shadow = folder / f"bin{number}"
            shadow.mkdir(parents=True)
            for file in Path(name).iterdir():
                if file.name != "nvcc":
                    (shadow / file.name).symlink_to(file)
            name = str(shadow)
        folders.append(name)
    return os.pathsep.join(folders)


def with_dependencies(name: str, found: set[str]) -> set[str]:
    if name not in found:
        found.add(name)
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                with_dependencies(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository of the files that git knows or would add here, uncommitted changes included."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git work tree")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    tree = tmp_path_factory.mktemp("tree with a space")
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    run("git", "init", "-q", cwd=tree)
    run("git", "add", "-A", cwd=tree)
    return tree


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment of torch and what torch requires: links to the files that their RECORDs list here."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    for name in with_dependencies("torch", set()):
        files = distribution(name).files
        assert files, f"{name} has no RECORD"
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution(name).locate_file(top))
    return home / "bin/python"


PIP = [sys.executable, "-m", "pip"]


def lend_objects(folder: Path) -> None:
    """To another tree this one's objects. Ninja remakes those whose sources or headers differ or are not there."""
    objects = Path("build", sysconfig.get_platform())
    if (ROOT / objects).exists():
        shutil.copytree(ROOT / objects, folder / objects)
    for file in folder.glob("csrc/**/*.*"):
        here = ROOT / file.relative_to(folder)
        if here.exists() and here.read_bytes() == file.read_bytes():
            shutil.copystat(here, file)  # as old as what the objects were made of


def unpacked(kind: str, tree: Path, folder: Path) -> Path:
    """The archive that a user would get, unpacked"""
    archive = folder / f"main.{kind}"
    top = run("git", "write-tree", cwd=tree).strip()
    run("git", "archive", "--prefix=sslops-main/", "-o", archive, top, cwd=tree)
    shutil.unpack_archive(archive, folder)
    lend_objects(folder / "sslops-main")
    return folder / "sslops-main"


def has_cuda_after_install(wheel: Path, tree: Path, python: Path, tmp_path: Path) -> bool:
    """Installs it, and looks whether it holds what it should and runs."""
    sources = [file.relative_to(tree) for top in ("sslops", "kernels") for file in (tree / top).rglob("*.*")]
    wanted = [
        file if file.parts[0] == "sslops" else Path("sslops", file)
        for file in sources
        if file.suffix in (".py", ".pyi", ".json", ".typed")
    ]
    native = "sslops/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    installed = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    assert {name for name in installed if ".dist-info/" not in name} == {native, *map(str, wanted)}
    assert any(name.endswith("/LICENSE") for name in installed)

    run(*PIP, "--python", python, "install", "-q", "--no-index", "--force-reinstall", "--no-deps", wheel, cwd=tmp_path)
    run(*PIP, "--python", python, "check", cwd=tmp_path)
    printed = run(python, "-I", "-c", SMOKE, cwd=tmp_path)
    run(python, "-I", "-m", "sslops", cwd=tmp_path)
    return "'cuda_archs': None" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "isolated", "build_cuda", "hide_nvcc"), [("tar.gz", True, "0", False), ("zip", False, "auto", True)]
)
def test_an_archive_installs_and_works_with_torch_alone(
    kind: str, isolated: bool, build_cuda: str, hide_nvcc: bool, tree: Path, python: Path, tmp_path: Path
) -> None:
    env = {"SSLOPS_BUILD_CUDA": build_cuda, "CUDA_HOME": ""}
    if hide_nvcc:
        env["PATH"] = path_without_nvcc(tmp_path)
    options = [] if isolated else ["--no-build-isolation"]
    run(*PIP, "wheel", "-q", "--no-deps", *options, "-w", tmp_path, unpacked(kind, tree, tmp_path), cwd=tmp_path, **env)
    assert not has_cuda_after_install(next(tmp_path.glob("*.whl")), tree, python, tmp_path)


@pytest.mark.slow
def test_the_published_wheel_works_with_torch_alone(tree: Path, python: Path, tmp_path: Path) -> None:
    """What `make wheel` makes of the sdist, for this Python"""
    maker = ROOT / ".venv-wheel/bin/python"
    if not maker.exists():
        pytest.skip("wants the tools: make .venv-wheel/installed")
    lend_objects(tree)
    run(maker, "packaging/wheels.py", sys.executable, "--out", tmp_path, cwd=tree, SSLOPS_BUILD_CUDA="auto")
    wheel = next(tmp_path.glob("*.whl"))
    assert "manylinux_2_28_" in wheel.name
    installed = {Path(name).name: name for name in zipfile.ZipFile(wheel).namelist()}
    core = next(name for name in installed if name.endswith(".so"))
    zipfile.ZipFile(wheel).extract(installed[core], tmp_path)
    symbols = run("nm", "--dynamic", "--defined-only", tmp_path / installed[core], cwd=tmp_path)
    assert symbols.split()[-1] == "PyInit__C"
    assert len(symbols.splitlines()) == 1, symbols  # none that libtorch's could be taken for
    held = zipfile.ZipFile(wheel).read(installed["sslops.cdx.json"]).decode()
    has_cuda = has_cuda_after_install(wheel, tree, python, tmp_path)
    assert has_cuda == ("CUDA runtime" in held) == (shutil.which("nvcc") is not None)


def test_asking_for_cuda_without_nvcc_says_so(tree: Path, tmp_path: Path) -> None:
    env = {"SSLOPS_BUILD_CUDA": "1", "CUDA_HOME": "", "PATH": path_without_nvcc(tmp_path)}
    with pytest.raises(AssertionError, match=r"SSLOPS_BUILD_CUDA=1, but there is no nvcc .*: install the CUDA toolkit"):
        run(sys.executable, "setup.py", "build_ext", cwd=tree, **env)


def test_import_is_light(tmp_path: Path) -> None:
    run(sys.executable, "-c", LIGHT, cwd=tmp_path)
