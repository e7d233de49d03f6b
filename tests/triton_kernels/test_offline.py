"""The kernels compiled under the triton installed here; `offline.py` itself runs under others too.

All of them, about 900, are too many for each change: here the newest chips and all that the default is for, in `make
sanitize`, under the oldest Triton and for faults only, the others. What resources.tsv has is compiled again where its
source has changed, and of the rest a sample.
"""

from functools import partial
from unittest import mock

import pytest
import torch
import triton

from sslops.kernels.triton import launch

from . import offline, resources

CHIPS = ["sm_100", "gfx942", "default on sm_80", "default on gfx942"]
SAMPLE = 20  # one in so many


def test_every_kernel() -> None:
    compilers, listed = resources.read()
    listed = [row for row in listed if row.chip in CHIPS and row.call != "CUDA"]
    same = compilers.startswith(f"triton {triton.__version__} ")
    rows, faults = offline.compile_all(CHIPS, [row for n, row in enumerate(listed) if same and n % SAMPLE])
    assert not faults
    if same:
        assert not resources.changes(rows, listed), "run python -m benchmarks.kernel_report --write, and look at it"


@pytest.mark.parametrize(
    ("chip", "kernel", "config", "expected"),
    [
        ("sm_90", "flash", (128, 128, 128, 8, 2), "spills"),
        ("gfx942", "flash", (64, 64, 128, 4, 3), "shared memory"),
        ("sm_100", "forward", (128, 64, 128, 16, 2), "not with tcgen05.mma"),
    ],
)
def test_a_bad_config_is_found(chip: str, kernel: str, config: tuple[int, ...], expected: str) -> None:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    kernels = launch.configs("nt_xent")[chip]["half"]["128"] | {kernel: dict(zip(names, config, strict=True))}
    bad = {chip: {precision: {"128": kernels} for precision in ("half", "tf32", "tf32x3", "ieee")}}
    wanted = {"forward": "_negative_sums", "flash": "_flash"}[kernel]
    configs = mock.patch.object(launch, "configs", return_value=bad | {"default": bad[chip]})
    with configs, mock.patch.object(offline, "OPS", ["nt_xent"]):
        faults = [
            offline.compiled(*work)[1]
            for work in offline.works([chip])
            if work[2].startswith("bf16 D=128") and work[3].kernel.__name__ == wanted
        ]
    assert any(fault and expected in fault for fault in faults), faults


@pytest.mark.parametrize("op", offline.TUNED)
def test_every_table_has_every_chip(op: str) -> None:
    """So that only other chips take the default"""
    assert launch.configs(op).keys() == {chip.split()[-1] for chip in offline.CHIPS} | {"default"}


@pytest.mark.parametrize("op", [op for op in offline.TUNED if "tf32x3" in launch.configs(op)["default"]])
def test_exact_float32_adds_up_no_more_columns_than_the_interpreter(op: str) -> None:
    """Which has the default's configs, and with them float32's error; of more columns it is larger"""
    listed = {chip: lists["tf32x3"] for chip, lists in launch.configs(op).items() if "tf32x3" in lists}
    for widths in listed.values():
        for width, kernels in widths.items():
            for kernel, config in kernels.items():
                assert config["BLOCK_K"] <= listed["default"][width][kernel]["BLOCK_K"]


def test_precision_is_as_torch_multiplies() -> None:
    of_float32 = partial(launch.precision, "pairs", torch.float32)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        with mock.patch.object(torch.version, "hip", "7.0"):
            assert of_float32() == "ieee"
        assert of_float32() == "tf32x3"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert of_float32() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert launch.precision("pairs", torch.bfloat16) == "ieee"


def test_unknown_widths_and_chips_have_configs() -> None:
    configs = launch.configs("nt_xent")
    with mock.patch.object(launch, "chip", return_value="sm_999"):
        assert launch.nearest("nt_xent", torch.device("cpu"), torch.bfloat16, 7)["forward"].items() >= (
            configs["default"]["half"]["64"]["forward"].items()
        )
    with mock.patch.object(launch, "chip", return_value="sm_90"):
        for width, listed in ((100, "128"), (128, "128"), (129, "256"), (9000, "512")):
            found = launch.nearest("nt_xent", torch.device("cpu"), torch.float16, width)
            assert found["forward"].items() >= configs["sm_90"]["half"][listed]["forward"].items()
