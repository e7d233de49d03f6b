"""Every op against its float64 self, on every backend that runs here: `python -m benchmarks.smoke --out FILE`.

A line of JSON as soon as a case is done; a process an op, so that one that hangs or breaks the device stops no other.
The numbers are the oracle's: what is promised is an error of at most `bound`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sslops
from sslops import backend
from tests import oracle

from ._process import die_with_parent

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    op: str
    call: Callable[..., Any]  # (*inputs, backend=): a tensor, or what is compared bit by bit: several
    inputs: Callable[[], list[Tensor]]  # the floating ones; on the CPU, in float32
    dtypes: tuple[torch.dtype, ...] = FLOATS


def normal(*shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(shape) for shape in shapes]


def views(n: int, d: int) -> Callable[[], list[Tensor]]:
    """A pair that learning has begun on"""

    def make() -> list[Tensor]:
        first, second = torch.randn(2, n, d)
        return [first, first + second]

    return make


def ids(x: Tensor, count: int) -> Tensor:
    """[B, count] of the B rows of x, without repetition"""
    noise = torch.rand(len(x), 16, generator=torch.Generator().manual_seed(1))
    return noise.argsort(1)[:, :count].to(x.device)


def nearest(query: Tensor, support: Tensor, backend: str) -> Tensor:
    """Of the two best: what rounding takes for one another has nearly the same product"""
    return sslops.nearest(query, support, k=2, normalize=True, backend=backend).values


def supcon(z: Tensor, backend: str, **options: Any) -> Tensor:
    labels = torch.arange(z.shape[1], device=z.device) % 13
    return sslops.supcon(z, labels, reduction="none", backend=backend, **options)


def among_keys(z: Tensor, backend: str, **options: Any) -> Tensor:
    keys, labels = z.detach().flatten(0, 1).flip(0), torch.arange(z.shape[1], device=z.device) % 13
    of_keys = {"keys": keys, "key_labels": counts(keys) % 13, "query_ids": labels, "key_ids": counts(keys) % 11}
    return supcon(z, backend, weights=labels / 5, **of_keys, **options)


def weighed(z: Tensor, backend: str) -> Tensor:
    ids, weights = torch.arange(len(z), device=z.device) // 13 % 7, counts(z) % 3 / 2
    return sslops.supcon(z, ids % 5, query_ids=ids, weights=weights, reduction="none", backend=backend)


def crops(z: Tensor, backend: str, **options: Any) -> Tensor:
    ids = torch.arange(z.shape[1], device=z.device) % 60
    return sslops.nt_xent(z, query_ids=ids, temperature=0.1, reduction="none", backend=backend, **options)


def hard(query: Tensor, key: Tensor, negatives: Tensor, own: Tensor, backend: str, **options: Any) -> Tensor:
    """Masked, of all rows alike"""
    own = own[: len(query)]
    options |= {"paired_negatives": own, "paired_mask": (counts(own[0]) % 3 > 0).expand(len(own), -1)}
    options["negative_mask"] = (counts(negatives) % 4 > 0).expand(len(query), -1)
    return sslops.info_nce(query, key, negatives, temperature=0.1, reduction="none", backend=backend, **options)


def mse(pred: Tensor, backend: str) -> Tensor:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2)).bfloat16().to(pred)
    mask = (ids(pred, 16) > 5).to(torch.float32)
    return sslops.masked_patch_mse(pred, images, mask, 8, backend=backend)


def cross_entropy(hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
    labels = torch.arange(len(hidden), device=hidden.device) % len(weight)
    return sslops.masked_token_cross_entropy(hidden, weight, labels.where(labels % 6 == 0, -100), backend=backend)


def dino(student: Tensor, backend: str) -> Tensor:
    return sslops.dino(list(student), 2 * student.flip(2)[:2], bias=-student[:2].mean(1), backend=backend)


def ibot(student: Tensor, backend: str) -> Tensor:
    index = torch.arange(len(student), device=student.device) // 2
    return sslops.ibot(student, 2 * student.flip(1), index=index, weights=index / 9, backend=backend)


def ibot_of_features(student: Tensor, prototypes: Tensor, backend: str) -> Tensor:
    layers = {"prototypes": prototypes, "teacher_prototypes": prototypes.flip(0), "unit_prototypes": True}
    return sslops.ibot(student, 2 * student.flip(1), student_temp=0.3, backend=backend, **layers)


def swav_of_embeddings(scores: Tensor, prototypes: Tensor, backend: str) -> Tensor:
    return sslops.swav(F.normalize(scores, dim=2), prototypes=prototypes, unit_prototypes=True, backend=backend)


def update(target: Tensor, source: Tensor, backend: str) -> tuple[Tensor, ...]:
    target = target.clone()
    sslops.ema_update_([target], [source], 0.99, backend=backend)
    return (target,)


def mask(noise: Tensor, backend: str) -> tuple[Tensor, ...]:
    return tuple(sslops.random_mask(*noise.shape, 0.75, noise=noise, device=noise.device, backend=backend))


def padded(noise: Tensor, backend: str) -> tuple[Tensor, ...]:
    lengths = torch.arange(len(noise), device=noise.device) * 3
    return tuple(sslops.random_mask(*noise.shape, 0.75, lengths=lengths, noise=noise, backend=backend))


def blocks(noise: Tensor, backend: str) -> tuple[Tensor, ...]:
    generator = torch.Generator(noise.device).manual_seed(3)
    return sslops.block_mask(len(noise), (14, 14), 0.8, generator=generator, device=noise.device, backend=backend)


def multi_blocks(noise: Tensor, backend: str) -> tuple[Tensor, ...]:
    generator = torch.Generator(noise.device).manual_seed(3)
    return sslops.multi_block_mask(len(noise), (14, 14), generator=generator, device=noise.device, backend=backend)


def counts(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def corruption(noise: Tensor, backend: str) -> tuple[Tensor, ...]:
    words = (noise * 1000).long()
    generator = torch.Generator(noise.device).manual_seed(3)
    return sslops.random_token_corruption(words, 103, 1000, generator=generator, backend=backend)


ONE = (torch.float32,)
CASES = [
    *(
        Case("nt_xent", partial(sslops.nt_xent, temperature=tau, reduction="none"), views(*shape))
        for shape, tau in (((512, 128), 0.1), ((300, 100), 0.5), ((70, 600), 0.02))
    ),
    *(
        Case("info_nce", partial(sslops.info_nce, temperature=tau, reduction="none"), inputs)
        for tau, inputs in ((0.1, normal((256, 128), (256, 128), (4096, 128))), (0.2, views(300, 100)))
    ),
    *(
        Case("info_nce", partial(hard, decoupled=decoupled), normal((256, d), (256, d), (4096, d), (256, 40, d)))
        for d, decoupled in ((128, False), (300, True))
    ),
    *(Case("nt_xent", partial(crops, decoupled=decoupled), normal((3, 100, 128))) for decoupled in (False, True)),
    *(
        Case("clip", partial(sslops.clip, logit_scale=scale, reduction="none"), inputs)
        for inputs, scale in ((views(512, 128), 20.0), (normal((300, 700), (300, 700)), 100.0))
    ),
    Case("siglip", sslops.siglip, views(300, 700)),
    Case("nearest", nearest, normal((256, 128), (4096, 128)), ONE),
    *(
        Case("supcon", partial(supcon, where=where, temperature=tau), normal((2, *shape)))
        for where, shape, tau in (("out", (256, 128), 0.1), ("in", (150, 300), 0.02))
    ),
    *(Case("supcon", partial(among_keys, where=where), normal((2, 150, 128))) for where in ("out", "in")),
    Case("supcon", weighed, normal((300, 128))),
    *(
        Case("relic", partial(sslops.relic, temperature=tau, alpha=1.0, beta=1.0, reduction="none"), views(*shape))
        for shape, tau in (((512, 128), 0.1), ((300, 100), 0.03))
    ),
    *(
        Case(op.__name__, partial(op, route=route), views(*shape))
        for op in (sslops.barlow_twins, sslops.vicreg)
        for route, shape in (("gram", (128, 300)), ("panels", (300, 256)))
    ),
    Case("cross_correlation", sslops.cross_correlation, views(300, 130)),
    *(Case("dino", dino, normal(shape)) for shape in ((4, 16, 3000), (6, 16, 300))),
    *(
        Case("sigreg", lambda z, backend: sslops.sigreg(z, directions=F.normalize(z[:40].detach()), backend=backend),
             normal(shape))
        for shape in ((300, 64), (70, 200))
    ),
    Case("ibot", ibot, normal((64, 5000))),
    Case("ibot", ibot_of_features, normal((600, 70), (30000, 70))),
    Case("sinkhorn", partial(sslops.swav, epsilon=0.2), normal((4, 40, 300))),
    Case("dino", swav_of_embeddings, normal((2, 300, 70), (60000, 70))),
    Case("gather_patches", lambda x, backend: sslops.gather_patches(x, ids(x, 5), 8, backend=backend),
         normal((4, 3, 32, 32))),
    Case("gather_tokens", lambda x, backend: sslops.gather_tokens(x, ids(x, 5), backend=backend), normal((4, 16, 100))),
    Case("gather_tokens",
         lambda x, backend: sslops.gather_tokens(x, ids(x, 5), counts=counts(x), unique=True, backend=backend),
         normal((4, 16, 100))),
    Case("masked_token_cross_entropy", cross_entropy, normal((300, 64), (500, 64))),
    Case("masked_prediction", mse, normal((4, 16, 192))),
    Case("restore_tokens",
         lambda x, token, backend: sslops.restore_tokens(x, token, ids(x, 16), num_prefix=1, backend=backend),
         normal((4, 6, 100), (1, 1, 100))),
    Case("restore_tokens",
         lambda x, token, backend: sslops.restore_tokens(
             x, token, ids(x, 16), num_prefix=1, counts=counts(x), backend=backend),
         normal((4, 6, 100), (1, 1, 100))),
    Case("ema_update", update, normal((1000, 33), (1000, 33)), FLOATS),
    *(Case("random_mask", call, lambda: [torch.rand(64, 196)], ONE) for call in (mask, padded, blocks)),
    Case("multi_block_mask", multi_blocks, lambda: [torch.rand(64, 1)], ONE),
    Case("random_token_corruption", corruption, lambda: [torch.rand(16, 512)], ONE),
]  # fmt: skip
SMALL = 48  # rows that are left of a case where the interpreter runs it


def compared(case: Case, name: str, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """Of the output and each gradient: our error, eager's and the bound"""
    inputs = case.inputs()
    if os.environ.get("TRITON_INTERPRET"):  # slow
        inputs = [x[..., :SMALL, :] for x in inputs]
    inputs = [x.to(device, dtype) for x in inputs]
    got = case.call(*inputs, backend=name)
    if isinstance(got, tuple):
        same = all(torch.equal(*pair) for pair in zip(got, case.call(*inputs, backend="eager"), strict=True))
        yield {"what": "bits", "ok": same}
        return
    found = oracle.evaluate(case.call, inputs, name)
    eager = oracle.evaluate(case.call, inputs, "eager")
    truth = oracle.evaluate(case.call, inputs, "eager", torch.float64)
    for k, (ours, theirs, exact) in enumerate(zip(found, eager, truth, strict=True)):
        errors = (oracle.errors(x, exact) for x in (ours, theirs))
        for norm, error, other in zip(("2", "max"), *errors, strict=True):
            bound = oracle.EAGER_FACTOR * (other if other < float("inf") else 0.0) + oracle.FLOORS[dtype]
            what = f"gradient {k}" if k else "output"
            yield {"what": what, "norm": norm, "error": error, "eager": other, "bound": bound, "ok": error <= bound}


def interpret() -> None:
    """The Triton backend on CPU tensors, as a GPU computes"""
    from sslops.kernels.triton import launch
    from tests.triton_kernels import common, gpu_arithmetic

    backend._ORDER["cpu"] = ("cpu", "triton")
    gpu_arithmetic.install()
    launch.multiply = common.multiply


def backends(op: str, device: str, dtype: torch.dtype) -> list[str]:
    at = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return [name for name in backend.BACKENDS if name != "eager" and backend.refusal(name, op, at, dtype) is None]


def run(op: str, device: str, out: Path) -> None:
    for number, case in enumerate(case for case in CASES if case.op == op):
        for dtype in case.dtypes:
            for name in backends(op, device, dtype):
                start = time.perf_counter()
                line = {"op": op, "case": number, "dtype": str(dtype).removeprefix("torch."), "backend": name}
                try:
                    torch.manual_seed(0)
                    lines = [line | each for each in compared(case, name, dtype, device)]
                except Exception:
                    lines = [line | {"ok": False, "trace": traceback.format_exc()[-4000:]}]
                took = round(time.perf_counter() - start, 2)
                with out.open("a") as file:
                    file.write("".join(json.dumps(each | {"seconds": took}) + "\n" for each in lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--op", choices=backend.ops(), help="in this process; by default all, each in its own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    if arguments.op:
        if os.environ.get("TRITON_INTERPRET"):
            interpret()
        run(arguments.op, arguments.device, arguments.out)
        return 0
    command = [sys.executable, "-m", "benchmarks.smoke", "--out", arguments.out, "--device", arguments.device, "--op"]

    def child(op: str) -> int:
        return subprocess.run([*command, op], preexec_fn=die_with_parent).returncode

    ops = list(dict.fromkeys(case.op for case in CASES))
    with ThreadPoolExecutor(arguments.workers) as pool:
        died = {op: code for op, code in zip(ops, pool.map(child, ops), strict=True) if code}
    lines = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    for line in lines:
        if not line["ok"]:
            print({k: v for k, v in line.items() if k != "trace"}, line.get("trace", ""))
    print(f"{len(lines)} results, {sum(not line['ok'] for line in lines)} not as promised; died: {died or 'none'}")
    return int(bool(died) or not all(line["ok"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
