"""How many launches a call takes, which is what a small batch costs: Triton's kernels and torch's own, no more.

Counted on tensors without memory: nothing is compiled, and nothing runs.
"""

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslops.kernels.triton.nt_xent import PANELS, _schedule
from sslops.kernels.triton.w_z import BLOCKS, _span

from . import info_nce, nt_xent, off_diagonal, offline, pairs, prototypes, relic, sigreg, supcon

GPU = "meta"
of_columns = partial(off_diagonal.call, n=256, d=2048, operands="bf16", device=GPU)
CALLS: dict[str, Callable[[], None]] = {
    "nt_xent": partial(nt_xent.call, 256, 128, "bf16", 0.1, GPU),
    "nt_xent, temperature learned": partial(nt_xent.call, 256, 128, "bf16", None, GPU),
    "info_nce, a queue": partial(info_nce.call, 256, 65536, 128, "bf16", 0.1, GPU),
    "info_nce, in-batch": partial(info_nce.call, 256, 0, 128, "bf16", 0.1, GPU),
    "relic": partial(relic.call, 256, 128, "bf16", 0.1, GPU),
    "relic, both learn": partial(relic.call, 256, 128, "bf16", 0.1, GPU, gradients=2),
    "relic, temperature learned": partial(relic.call, 256, 128, "bf16", None, GPU),
    "relic, 16 pairs of crops": partial(relic.call, 256, 128, "bf16", 0.1, GPU, crops=(8, 2), negatives=10),
    "clip": partial(pairs.call, "clip", 256, 256, 512, "bf16", GPU),
    "siglip": partial(pairs.call, "siglip", 256, 256, 512, "bf16", GPU),
    "nearest": partial(pairs.call, "nearest", 256, 65536, 256, "bf16", GPU),
    "supcon": partial(supcon.call, (256, 128), "bf16", 0.1, GPU),
    "barlow_twins, gram": partial(of_columns, "barlow_twins", route="gram"),
    "barlow_twins, panels": partial(of_columns, "barlow_twins", route="panels"),
    "vicreg, gram": partial(of_columns, "vicreg", route="gram"),
    "vicreg, panels": partial(of_columns, "vicreg", route="panels"),
    "cross_correlation": partial(of_columns, "cross_correlation"),
    "dino": partial(prototypes.call_dino, 10, 2, 64, 65536, "bf16", GPU),
    "ibot": partial(prototypes.call_ibot, 2458, 8192, "bf16", GPU, index=False),
    "sinkhorn": partial(prototypes.call_sinkhorn, 1, 128, 65536, "bf16", GPU),
    "sigreg": partial(sigreg.call, 8, 512, 64, 1024, "bf16", GPU),
}
# Triton's forward, torch's forward, Triton's backward, torch's backward
PROMISED = {
    "nt_xent": (3, 0, 3, 0),
    "nt_xent, temperature learned": (3, 0, 3, 3),
    "info_nce, a queue": (2, 0, 4, 0),
    "info_nce, in-batch": (2, 0, 4, 0),
    "relic": (3, 0, 3, 0),
    "relic, both learn": (3, 0, 3, 0),
    "relic, temperature learned": (3, 0, 3, 3),
    "relic, 16 pairs of crops": (3, 0, 3, 0),
    "clip": (4, 0, 5, 5),
    "siglip": (6, 5),
    "nearest": (4, 0),
    "supcon": (3, 0, 3, 0),
    "barlow_twins, gram": (6, 0, 4, 3),
    "barlow_twins, panels": (5, 2, 3, 0),
    "vicreg, gram": (6, 0, 3, 3),
    "vicreg, panels": (6, 3, 1, 0),
    "cross_correlation": (2, 1, 4, 3),
    "dino": (4, 0, 3, 0),
    "ibot": (4, 0, 3, 0),
    "sinkhorn": (7, 43),
    "sigreg": (4, 6, 2, 5),
}


class Torch(TorchDispatchMode):
    """Collects what torch would launch: neither views nor memory"""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if not op.is_view and name not in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"):
            self.found.append(name)
        return op(*args, **kwargs or {})


def counted(call: str) -> dict[str, list[str]]:
    """What forward and backward launch, by name"""
    op = call.split(",")[0]
    module = importlib.import_module(f"sslops.kernels.triton.{op}")
    found: dict[str, list[str]] = {}

    def within(direction: str, run: Callable[..., object]) -> Callable[..., object]:
        def counts(*args: object) -> object:
            before = len(launches)
            with Torch() as of_torch:
                result = run(*args)
            found[f"triton {direction}"] = [launch.kernel.__name__ for launch in launches[before:]]
            found[f"torch {direction}"] = of_torch.found
            return result

        return counts

    with offline.record("sm_90") as launches:
        directions = [name for name in ("forward", "backward") if hasattr(module, name)]
        patched = {name: within(name, getattr(module, name)) for name in directions}
        with mock.patch.multiple(module, **patched):
            CALLS[call]()
    return found


@pytest.mark.parametrize("processors", [108, 132, 148, 304])
def test_nt_xent_fills_a_chip(processors: int) -> None:
    """By the model that panels and spans are chosen by"""
    for search, (rows, columns) in itertools.product((False, True), ((64, 64), (256, 64), (128, 128), (64, 128))):
        tile = {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 8}
        for m in (*range(1, 70), *range(100, 100_000, 997)):
            panel, config = _schedule(m, m, search, tile, torch.bfloat16, processors)
            assert panel % config["BLOCK_M"] == panel % config["BLOCK_N"] == 0
            assert -(-m // panel) <= PANELS
        for m in (4096, 8192, 65536):
            panel, config = _schedule(m, m, search, tile, torch.bfloat16, processors)
            programs = (n := -(-m // panel)) * (n if search else n + 1) // (1 if search else 2)
            pairs = m**2 if search else m**2 // 2
            assert pairs / (-(-programs // processors) * processors * panel**2) > 0.75, (m, tile)
    for m in (4096, 8192, 65536):
        blocks = m // 128
        span = _span(m, blocks, 64, processors)
        programs = blocks * -(-m // span)
        assert programs <= BLOCKS * processors + blocks
        assert m * m / (-(-programs // processors) * processors * span * 128) > 0.84, m


@pytest.mark.parametrize("call", CALLS)
def test_launches(call: str) -> None:
    found = counted(call)
    assert tuple(map(len, found.values())) == PROMISED[call], found
