"""`python -m sslops bench OP`: an op's step on this machine, beside its reference, eager and by torch.compile."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C
from ._timer import cuda_peak, interleave, peak_memory
from .backend import choice
from .ops.barlow_twins import barlow_twins
from .ops.clip import clip
from .ops.cross_correlation import cross_correlation
from .ops.dino import dino
from .ops.ema_update import ema_update_
from .ops.gather_patches import gather_patches
from .ops.gather_tokens import gather_tokens
from .ops.ibot import ibot
from .ops.info_nce import info_nce
from .ops.masked_prediction import masked_patch_mse
from .ops.masked_token_cross_entropy import masked_token_cross_entropy
from .ops.multi_block_mask import multi_block_mask
from .ops.nearest import nearest
from .ops.nt_xent import nt_xent
from .ops.random_mask import random_mask
from .ops.random_token_corruption import random_token_corruption
from .ops.relic import relic
from .ops.restore_tokens import restore_tokens
from .ops.siglip import siglip
from .ops.sigreg import sigreg
from .ops.sinkhorn import sinkhorn
from .ops.skip_gram import skip_gram
from .ops.supcon import supcon
from .ops.vicreg import vicreg

SECONDS = 6.0  # of timing; with torch.compile and memory, each in a process of its own, a table is there in a minute


class Inputs(NamedTuple):
    device: torch.device
    dtype: torch.dtype

    def data(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        return self.data(*shape).requires_grad_()

    def ids(self, rows: int, count: int, of: int) -> Tensor:
        return torch.rand(rows, of, device=self.device).argsort(1)[:, :count].contiguous()


class Subject(NamedTuple):
    shape: str
    default: str
    make: Callable[..., tuple[Callable[..., Any], list[Any]]]  # of Inputs and the shape: a function, its arguments


def _patches(x: Inputs, b: int, side: int, p: int) -> tuple[Callable[..., Any], list[Any]]:
    count = (side // p) ** 2
    return partial(gather_patches, patch_size=p), [x.data(b, 3, side, side), x.ids(b, count // 4, count)]


def _masked(x: Inputs, b: int, side: int, p: int) -> tuple[Callable[..., Any], list[Any]]:
    count = (side // p) ** 2
    mask = (x.ids(b, count, count) >= count // 4).float()
    return partial(masked_patch_mse, patch_size=p), [x.leaf(b, count, 3 * p * p), x.data(b, 3, side, side), mask]


def _restored(x: Inputs, b: int, k: int, length: int, d: int) -> tuple[Callable[..., Any], list[Any]]:
    positions = x.data(1, 1 + length, d)
    return partial(restore_tokens, pos_embed=positions, num_prefix=1), [
        x.leaf(b, 1 + k, d), x.leaf(d), x.ids(b, length, length)
    ]  # fmt: skip


def _labelled(x: Inputs, n: int, v: int, d: int) -> tuple[Callable[..., Any], list[Any]]:
    labels = torch.randint(v, (n,), device=x.device)
    labels[n // 6 :] = -100
    return masked_token_cross_entropy, [x.leaf(n, d), x.leaf(v, d), labels]


def _classes(x: Inputs, n: int, d: int) -> tuple[Callable[..., Any], list[Any]]:
    return supcon, [x.leaf(n, d), torch.arange(n, device=x.device) % max(1, n // 40)]


def _words(x: Inputs, v: int, d: int, b: int) -> tuple[Callable[..., Any], list[Any]]:
    ids = [torch.randint(v, shape, device=x.device) for shape in ((b,), (b,), (b, 5))]
    return skip_gram, [x.leaf(v, d), x.leaf(v, d), *ids]


# fmt: off
SUBJECTS = {
    "nt_xent": Subject("M x D, M = 2N", "4096x128", lambda x, m, d:
        (partial(nt_xent, temperature=0.1), [x.leaf(m // 2, d), x.leaf(m // 2, d)])),
    "supcon": Subject("M x D, classes of 40", "4096x128", _classes),
    "info_nce": Subject("B x K x D, K negatives in a queue", "256x65536x128", lambda x, b, k, d:
        (partial(info_nce, temperature=0.2), [x.leaf(b, d), x.data(b, d), x.data(k, d)])),
    "clip": Subject("N x D", "4096x512", lambda x, n, d: (clip, [x.leaf(n, d), x.leaf(n, d)])),
    "siglip": Subject("N x D", "4096x512", lambda x, n, d: (siglip, [x.leaf(n, d), x.leaf(n, d)])),
    "nearest": Subject("B x K x D", "256x65536x256", lambda x, b, k, d: (nearest, [x.data(b, d), x.data(k, d)])),
    "relic": Subject("B x D, all negatives", "4096x128", lambda x, b, d:
        (partial(relic, temperature=0.1, alpha=1.0, beta=1.0), [x.leaf(b, d), x.data(b, d)])),
    "barlow_twins": Subject("N x D", "256x2048", lambda x, n, d: (barlow_twins, [x.leaf(n, d), x.leaf(n, d)])),
    "cross_correlation": Subject("N x D", "1024x2048", lambda x, n, d:
        (cross_correlation, [x.leaf(n, d), x.leaf(n, d)])),
    "vicreg": Subject("N x D", "256x2048", lambda x, n, d: (vicreg, [x.leaf(n, d), x.leaf(n, d)])),
    "dino": Subject("V x B x K, two teacher crops", "10x32x65536", lambda x, v, b, k:
        (dino, [x.leaf(v, b, k), x.data(2, b, k)])),
    "ibot": Subject("R x K", "256x65536", lambda x, r, k: (ibot, [x.leaf(r, k), x.data(r, k)])),
    "sigreg": Subject("V x N x D x M, along M directions", "8x128x64x1024", lambda x, v, n, d, m:
        (partial(sigreg, directions=x.data(m, d).float() / d**0.5), [x.leaf(v, n, d)])),
    "sinkhorn": Subject("B x K, three iterations", "512x3000", lambda x, b, k: (sinkhorn, [x.data(b, k).tanh()])),
    "skip_gram": Subject("V x D x B, five negatives, sparse gradients", "100000x300x8192", _words),
    "random_mask": Subject("B x L, a quarter kept", "4096x196", lambda x, b, length:
        (partial(random_mask, b, length, 0.75, device=x.device), [])),
    "multi_block_mask": Subject("B x H x W", "1024x14x14", lambda x, b, height, width:
        (partial(multi_block_mask, b, (height, width), device=x.device), [])),
    "random_token_corruption": Subject("B x L", "1024x512", lambda x, b, length:
        (partial(random_token_corruption, mask_token_id=103, vocab_size=30522), [x.ids(b, length, length)])),
    "masked_token_cross_entropy": Subject("N x V x D, a sixth labelled", "2048x30522x768", _labelled),
    "gather_tokens": Subject("B x L x K x D", "64x196x49x768", lambda x, b, length, k, d:
        (gather_tokens, [x.leaf(b, length, d), x.ids(b, k, length)])),
    "restore_tokens": Subject("B x K x L x D, one prefix", "64x49x196x512", _restored),
    "gather_patches": Subject("images x pixels x patch, a quarter visible", "64x224x16", _patches),
    "masked_prediction": Subject("images x pixels x patch, a quarter visible", "64x224x16", _masked),
    "ema_update": Subject("tensors x elements", "150x150000", lambda x, count, size:
        (partial(ema_update_, momentum=0.996), [[x.data(size) for _ in range(count)] for _ in range(2)])),
}
# fmt: on


def variants(op: str, shape: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """Functions that take a step, forward and backward"""
    function, arguments = SUBJECTS[op].make(Inputs(device, dtype), *shape)
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]

    def step(run: Callable[..., Any]) -> None:
        for leaf in leaves:
            leaf.grad = None
        out = run(*arguments)
        if leaves:
            out.sum().backward()

    eager = partial(function, backend="eager")
    runs: dict[str, Callable[..., Any]] = {
        "sslops": function,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    return {name: partial(step, run) for name, run in runs.items()}


def measure(op: str, shape: list[int], dtype: torch.dtype, device: torch.device) -> list[list[str]]:
    """Rows of a table: a variant, milliseconds, times ours, MB"""
    steps, failed = variants(op, shape, dtype, device), dict[str, str]()
    times = interleave(steps, seconds=SECONDS, failed=failed, ours="sslops")
    rows = [["", "ms", "", "times ours", "MB added"]]
    ours = times["sslops"]
    for name, taken in times.items():
        if taken is None:
            rows.append([name, failed.get(name, "out of memory")])
            continue
        if device.type == "cuda":
            memory: float | None = cuda_peak(steps[name])
        else:
            call = f"variants({op!r}, {shape}, {dtype}, torch.device('cpu'))[{name!r}]"
            memory = peak_memory(f"import torch; from sslops._bench import variants; step = {call}", "step()")
        spread = 50 * (taken["high"] - taken["low"]) / taken["median"]
        ratio = f"{taken['median'] / ours['median']:.2f}x" if ours and name != "sslops" else ""
        mb = "out of memory" if memory is None else f"{memory:.1f}"
        rows.append([name, f"{taken['median']:.3g}", f"±{spread:.0f}%", ratio, mb])
    return rows


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m sslops bench", description=__doc__.partition(": ")[2])
    parser.add_argument("op", choices=SUBJECTS, metavar="OP", help=", ".join(SUBJECTS))
    parser.add_argument("--shape", help="such as 4096x128; of what, is said with the result")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    asked = parser.parse_args(words)
    subject = SUBJECTS[asked.op]
    shape = [int(n) for n in (asked.shape or subject.default).split("x") if n.isdecimal()]
    if len(shape) != subject.default.count("x") + 1:
        parser.error(f"--shape: {asked.op} wanted {subject.shape}, such as {subject.default}, got {asked.shape}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, asked.dtype)
    taken, _ = choice(asked.op, device, dtype)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{_C.isa()}, {torch.get_num_threads()} threads"
    print(
        f"{asked.op}, {subject.shape}: {'x'.join(map(str, shape))}, {asked.dtype}, forward and backward\n"
        f"{device.type} ({where}), torch {torch.__version__}; sslops takes its {taken} backend\n",
        flush=True,
    )
    rows = measure(asked.op, shape, dtype, device)
    widths = [max(len(row[k]) for row in rows if k < len(row) and len(row) > 2) for k in range(len(rows[0]))]
    for row in rows:
        first, *numbers = row
        print("  ".join([first.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=False))]))
    print(
        "\nTimed in turn: medians, ± half the distance between the quartiles. MB: what a step adds at its peak.\n"
        "eager: the op's reference in plain PyTorch; torch.compile: of that."
    )
