"""MAE's loss beside eager PyTorch, torch.compile and the bytes it cannot avoid. Shapes: images x pixels x patch.

"video": 16 frames of each, and tubelets of 2 x patch x patch.
"""

import pytest
import torch

import sslops
from sslops.kernels.cpu import memory

from ._compare import cases, peak_memory, record, record_memory

RATIO = 0.75
CASES = {
    "cpu": [
        *cases("64x224x16", "float32", "both memory"),
        *cases("8x224x16", "float32", "video"),
    ],
    "cuda": [
        *cases("64x224x16 512x224x16", "float32 bfloat16", "both"),
        *cases("64x224x16", "float32 bfloat16", "video"),
    ],
    "small": cases("2x24x8", "float32 bfloat16", "both video"),
}
WORK = {("both", "512 images, 224, patch 16"): {"bytes": 2 * 512 * 768 * (2 * 147 + 196)}}


def tubelet(shape, part):
    """Of images [B, 3, frames, side, side]"""
    return (2, shape[2], shape[2]) if part == "video" else (1, shape[2], shape[2])


def inputs(shape, part, dtype, device):
    """pred [B, L, 3 t p p], images [B, 3, T, side, side], and a mask of the same number of patches in each"""
    b, side, p = shape
    frames, t = (16, 2) if part == "video" else (1, 1)
    count = frames // t * (side // p) ** 2
    pred = torch.randn(b, count, 3 * t * p * p, device=device).to(dtype).requires_grad_()
    mask = torch.rand(b, count, device=device).argsort(1).argsort(1) >= int(count * (1 - RATIO))
    return pred, torch.randn(b, 3, frames, side, side, device=device).to(dtype), mask.float()


def eager(pred, images, mask, patch):
    """As MAE's code: every patch, normalised, and its error, before the mask."""
    b, c, *size = images.shape
    (f, t), (h, p), (w, q) = ((side // each, each) for side, each in zip(size, patch, strict=True))
    target = images.view(b, c, f, t, h, p, w, q).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(pred.shape)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    errors = ((pred - target) ** 2).mean(-1)
    return (errors * mask).sum() / mask.sum()


def gathered(pred, images, mask, patch):
    """The strongest eager form: the masked patches first, by index."""
    b, c, *size = images.shape
    (f, t), (h, p), (w, q) = ((side // each, each) for side, each in zip(size, patch, strict=True))
    image, id = mask.nonzero(as_tuple=True)
    grid = images.view(b, c, f, t, h, p, w, q).permute(0, 2, 4, 6, 3, 5, 7, 1)
    target = grid[image, id // (h * w), id // w % h, id % w].flatten(1)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    return (pred[image, id] - target).square().mean()


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    torch._dynamo.reset()
    pred, images, mask = inputs(case.shape, case.part, case.dtype, device)
    losses = {
        "sslops": sslops.masked_patch_mse,
        "eager": eager,
        "gathered": gathered,
        "compile": torch.compile(eager, dynamic=False),
    }

    def both(loss):
        return lambda: torch.autograd.grad(loss(pred, images, mask, tubelet(case.shape, case.part)), pred)

    # pred and pixels of the masked patches in, all of the gradient out: as one copy of as many bytes. The gradient is a
    # new tensor, and no new memory of the system's is had without its being cleared: on a CPU, whose allocator keeps no
    # large blocks, the limit writes as much of it to new memory. "copy" writes to memory that is there.
    b, count, size = pred.shape
    masked = b * (count - int(count * (1 - RATIO)))
    bytes_moved = pred.element_size() * size * (2 * masked + b * count)
    source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).fill_(0)
    written = min(pred.nbytes, len(source))

    def copy_to_new():
        memory.empty(written, dtype=torch.uint8).copy_(source[:written])
        target[written:].copy_(source[written:])

    variants = {name: both(loss) for name, loss in losses.items()} | {"copy": lambda: target.copy_(source)}
    limit = "bytes" if device == "cpu" else "copy"
    if device == "cpu":
        variants[limit] = copy_to_new
    record(
        benchmark, variants, limit=limit, images=b, pixels=case.shape[1], patch=case.shape[2], dtype=case.dtype,
        part=case.part, bytes=bytes_moved,
    )  # fmt: skip


def test_memory(benchmark, device, case):
    b, side, p = case.shape
    patch = tubelet(case.shape, case.part)
    setup = "import torch; from benchmarks.bench_masked_prediction import *; "
    setup += f"xs = inputs({case.shape}, '', {case.dtype}, 'cpu')"
    found = {}
    for name, loss in (("sslops", "sslops.masked_patch_mse"), ("eager", "eager"), ("gathered", "gathered")):
        found[name] = peak_memory(setup, f"torch.autograd.grad({loss}(*xs, {patch}), xs[0])")
    record_memory(benchmark, found, images=b, pixels=side, patch=p, dtype=case.dtype, part="memory")
