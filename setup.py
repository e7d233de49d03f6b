"""Builds sslops._C, the native core, with ninja and without torch; the metadata is in pyproject.toml.

SSLOPS_BUILD_CUDA   auto (default): CUDA code where nvcc is found; 0: none; 1: an error where nvcc is absent
SSLOPS_EMULATE_AMX  1: AMX tiles in plain C++ (tests/amx_emulation), to test their users on a CPU that has AVX-512 with
                    bf16, and not them; all other objects are the usual build's
SSLOPS_SANITIZE     "address,undefined" or "thread": with these sanitizers, without CUDA; see tests/fuzz/sanitized.sh
SSLOPS_CUDA_ARCHS   GPU architectures, "80,90,100" by default; the last one is also kept as PTX, for newer GPUs
CUDA_HOME           where bin/nvcc is looked for before PATH
CXX, MAX_JOBS       the C++ compiler, the number of parallel jobs
SSLOPS_ZIG          a command that runs zig: links for glibc 2.28 and later, with all else inside (packaging/wheels.py)
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CXX = os.environ.get("CXX", "c++")
SANITIZE = os.environ.get("SSLOPS_SANITIZE", "")
EMULATED = os.environ.get("SSLOPS_EMULATE_AMX") == "1"
CUDA_ARCHS = os.environ.get("SSLOPS_CUDA_ARCHS", "80,90,100").split(",")
FLAGS = "-O3 -DNDEBUG -std=c++17 -Icsrc"
LINK_FLAGS = ""
if SANITIZE:
    LINK_FLAGS = f" -fsanitize={SANITIZE}"
    FLAGS += f" -O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all{LINK_FLAGS}"
HOST_FLAGS = "-fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi"

# Every csrc/cpu/<op>.cpp is compiled once per ISA, as namespace sslops::<isa>; which one runs is decided at run time.
ISAS = {"portable": ""}
MACHINE = sysconfig.get_platform().rpartition("-")[2]  # another than this one for a cross-compiler: packaging/wheels.py
if MACHINE == "x86_64":
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = ISAS["avx2"] + " -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    ISAS["amx"] = ISAS["avx512"] + " -mavx512bf16 -mamx-tile -mamx-bf16"


def find_nvcc() -> str | None:
    wanted = "0" if SANITIZE else os.environ.get("SSLOPS_BUILD_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise PlatformError(f"SSLOPS_BUILD_CUDA: wanted 0, 1 or auto, got {wanted!r}")
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which(f"{home}/bin/nvcc")) or shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        raise PlatformError(
            "SSLOPS_BUILD_CUDA=1, but there is no nvcc in CUDA_HOME/bin or on PATH: "
            "install the CUDA toolkit, or build without CUDA (SSLOPS_BUILD_CUDA=0)"
        )
    return None if wanted == "0" else nvcc


RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = $link -o $out $in $libraries
  description = $out
"""


def linker(nvcc: str | None) -> tuple[str, str]:
    """The command that links objects, and the libraries that come after them"""
    if zig := os.environ.get("SSLOPS_ZIG"):
        # GCC's objects fit every glibc. It is the linker who writes down which one it has met: zig brings an old one's.
        link = f"{zig} cc -target {MACHINE}-linux-gnu.2.28 -shared -s -Wl,--gc-sections"
        link += " -Wl,--version-script=csrc/manylinux/exports.map"
        # Inside, but for the unwinder, which torch needs too: inside, GCC 12's would ask for glibc 2.35.
        names = ["libstdc++.a", "libgcc_s.so.1", "libgcc.a"]
        found = [subprocess.check_output([*shlex.split(CXX), f"-print-file-name={name}"], text=True) for name in names]
        libraries = " ".join(map(str.strip, found))
        if nvcc:
            told = subprocess.run([nvcc, "-dryrun", "-shared", "x.o"], stderr=subprocess.PIPE, text=True).stderr
            (folders,) = (line.split("=", 1)[1] for line in told.splitlines() if line.startswith("#$ LIBRARIES="))
            libraries += f" {folders} -lcudart_static"
        return link, f"{libraries} -lpthread -lrt -ldl"
    if nvcc:
        return f"{shlex.quote(nvcc)} -shared --no-device-link -cudart static -Xlinker --exclude-libs,ALL", "-ldl"
    return f"{CXX} -shared{LINK_FLAGS}", "-ldl"


def ninja_graph(out: Path, tag: str, version: str) -> str:
    nvcc = find_nvcc()
    macros = [f'SSLOPS_VERSION="{version}"', f'SSLOPS_ISAS="{",".join(ISAS)}"']
    cxx_flags = f"{FLAGS} {HOST_FLAGS}"
    link, libraries = linker(nvcc)
    variables = {"builddir": str(out), "cxx": CXX, "link": link, "libraries": libraries}
    if nvcc:
        highest = CUDA_ARCHS[-1]
        archs = ",".join([*(f"sm_{arch}" for arch in CUDA_ARCHS), f"compute_{highest}"])
        macros += ["SSLOPS_CUDA=1", f'SSLOPS_CUDA_ARCHS="{archs}"']
        nvcc_flags = f"{FLAGS} --threads 2 -Xcompiler {HOST_FLAGS.replace(' ', ',')}"
        for arch in CUDA_ARCHS:
            nvcc_flags += f" -gencode arch=compute_{arch},code=sm_{arch}"
        nvcc_flags += f" -gencode arch=compute_{highest},code=compute_{highest}"
        variables["nvcc"] = shlex.quote(nvcc)
    edges, objects = [], []

    def compile(rule: str, sources: str, flags: str, variant: str = "") -> None:
        for source in sorted(Path("csrc").glob(sources)):
            at, own = out, flags
            if EMULATED and source.stem in ("isa", "bf16_gemm"):  # all that knows of tiles
                at, own = flavoured(out), f"{flags} -DSSLOPS_EMULATE_AMX -include tests/amx_emulation/amx_emulation.h"
            objects.append(str(at / source.with_suffix(f"{variant}.o")))
            edges.extend([f"build {objects[-1]}: {rule} {source}", "  flags = " + own.replace("$", "$$")])

    # The one object that a Python's headers are for: all Pythons' builds share the others.
    includes = dict.fromkeys([pybind11.get_include(), *map(sysconfig.get_path, ("include", "platinclude"))])
    bindings = [cxx_flags, *(f"-isystem {shlex.quote(include)}" for include in includes)]
    compile("cxx", "module.cpp", " ".join([*bindings, *(shlex.quote(f"-D{macro}") for macro in macros)]), f".{tag}")
    compile("cxx", "common/*.cpp", cxx_flags)
    # Of an inline function that several objects hold, the linker keeps the first: with the portable ones in front, no
    # AVX instruction reaches code that runs on every CPU.
    for isa, isa_flags in ISAS.items():
        compile("cxx", "cpu/*.cpp", f"{cxx_flags} {isa_flags} -DSSLOPS_ISA={isa}", f".{isa}")
    if os.environ.get("SSLOPS_ZIG"):
        compile("cxx", "manylinux/*.cpp", cxx_flags)
    if nvcc:
        compile("nvcc", "cuda/*.cu", nvcc_flags, ".cuda")
    header = [f"{name} = {value.replace('$', '$$')}" for name, value in variables.items()]
    return "\n".join([*header, RULES, *edges, f"build {flavoured(out)}/_C.{tag}.so: link {' '.join(objects)}", ""])


def flavoured(out: Path) -> Path:
    """The folder of what the usual build has not"""
    return out / "emulated-amx" if EMULATED else out


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if sys.platform != "linux":
            raise PlatformError(f"sslops builds on Linux, and not yet on {sys.platform}")
        # Not in self.build_temp: an editable install makes that a fresh folder each time, and ninja would start anew.
        flavour = "-" + SANITIZE.replace(",", "-") if SANITIZE else ""
        out, tag = Path("build", sysconfig.get_platform() + flavour), sys.implementation.cache_tag
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{tag}.ninja").write_text(ninja_graph(out, tag, self.distribution.get_version()))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.call([Path(ninja.BIN_DIR, "ninja"), "-f", out / f"{tag}.ninja", *jobs]):
            raise CompileError("sslops._C did not build: ninja's output above says why")
        library = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(library))
        self.copy_file(flavoured(out) / f"_C.{tag}.so", library)


folders = sorted({file.parent for file in Path("kernels").glob("*/*.py")})
backends = {f"sslops.kernels.{folder.name}": folder.as_posix() for folder in folders}
setup(
    license="Apache-2.0",
    packages=[*find_packages(include=["sslops", "sslops.*"]), *backends],
    package_dir=backends,
    ext_modules=[Extension("sslops._C", ["csrc/module.cpp"], language="c++")],
    cmdclass={"build_ext": NinjaBuild},
)
