"""Visible patches and their embedding beside eager PyTorch and the limits. Shapes: images x pixels x patch x width.

"video": the embedding of 16 frames of each, in tubelets of 2 x patch x patch.
"""

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import cases, peak_memory, record, record_memory

RATIO = 0.75
CASES = {
    "cpu": [
        *cases("64x224x16x768", "float32", "gather"),
        *cases("64x224x16x768", "float32", "embed memory"),
        *cases("8x224x16x768", "float32", "video"),
    ],
    "cuda": cases("512x224x16x768", "float32 bfloat16", "gather embed"),
    "small": cases("2x24x8x20", "float32 bfloat16", "gather embed video"),
}
WORK = {("gather", "512 images, 224, patch 16"): {"bytes": 4 * 512 * 49 * 768}}


def visible(shape, device):
    """ids [B, K] in a random order"""
    b, side, p, _ = shape
    count = (side // p) ** 2
    return torch.rand(b, count, device=device).argsort(1)[:, : int(count * (1 - RATIO))].contiguous()


def pixels(shape, dtype, device):
    return torch.randn(shape[0], 3, shape[1], shape[1], device=device).to(dtype)


def facts(case):
    return dict(zip(("images", "pixels", "patch", "width"), case.shape, strict=True)) | {"dtype": case.dtype}


def patchify_gather(images, ids, p):
    """All patches, then the visible ones."""
    b, c, h, w = images.shape
    patches = images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)
    return patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2]))


def indexed(images, ids, p):
    """The strongest eager form: an index into a view of the patches."""
    b, c, h, w = images.shape
    grid = images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return grid[torch.arange(b, device=ids.device)[:, None], ids // (w // p), ids % (w // p)].flatten(2)


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    torch._dynamo.reset()
    (gather if case.part == "gather" else embed)(benchmark, device, case)


def gather(benchmark, device, case):
    p = case.shape[2]
    images, ids = pixels(case.shape, case.dtype, device), visible(case.shape, device)
    out = indexed(images, ids, p)
    target, compiled = torch.empty_like(out), torch.compile(indexed, dynamic=False)
    variants = {
        "sslops": lambda: sslops.gather_patches(images, ids, p),
        "eager": lambda: patchify_gather(images, ids, p),
        "indexed": lambda: indexed(images, ids, p),
        "compile": lambda: compiled(images, ids, p),
        "bytes": lambda: target.copy_(out),
    }
    record(benchmark, variants, limit="bytes", **facts(case), part="gather", bytes=2 * out.nbytes)


class Embedding:
    """Tokens of visible patches with positions, three ways on the same weights."""

    def __init__(self, shape, part, dtype, device):
        b, side, p, width = shape
        video = part == "video"
        size, self.patch = ((16, side, side), (2, p, p)) if video else ((side, side), (p, p))
        self.module = sslops.nn.MaskedPatchEmbed(size, self.patch, 3, width).to(device, dtype)
        count = self.module.num_patches
        self.images = torch.randn(b, 3, *size, device=device).to(dtype)
        self.ids = torch.rand(b, count, device=device).argsort(1)[:, : int(count * (1 - RATIO))].contiguous()
        self.positions = torch.randn(1, count, width, device=device).to(dtype)
        self.grad = torch.randn(b, self.ids.shape[1], width, device=device).to(dtype)

    def sslops(self):
        return self.module(self.images, self.ids, self.positions)

    def eager(self):
        tokens = self.module.proj(self.images).flatten(2).transpose(1, 2) + self.positions
        return tokens.gather(1, self.ids[:, :, None].expand(-1, -1, tokens.shape[2]))

    def patches(self):
        """The strongest eager form of the visible ones"""
        if self.images.dim() == 4:
            return indexed(self.images, self.ids, self.patch[0])
        b, c, *size = self.images.shape
        (f, t), (h, p), (w, q) = ((side // each, each) for side, each in zip(size, self.patch, strict=True))
        grid = self.images.view(b, c, f, t, h, p, w, q).permute(0, 2, 4, 6, 1, 3, 5, 7)
        of_image = torch.arange(b, device=self.ids.device)[:, None]
        return grid[of_image, self.ids // (h * w), self.ids // w % h, self.ids % w].flatten(2)

    def indexed(self):
        tokens = F.linear(self.patches(), self.module.proj.weight.flatten(1), self.module.proj.bias)
        return tokens + F.embedding(self.ids, self.positions[0])

    def both(self, forward):
        return torch.autograd.grad(forward(), list(self.module.parameters()), self.grad)


def embed(benchmark, device, case):
    e = Embedding(case.shape, case.part, case.dtype, device)
    forwards = {"sslops": e.sslops, "eager": e.eager, "indexed": e.indexed}
    forwards["compile"] = torch.compile(e.eager, dynamic=False)
    patches = e.patches().flatten(0, 1)
    weight, grad = e.module.proj.weight.detach().flatten(1), e.grad.flatten(0, 1)
    tokens, d_weight = torch.empty_like(grad), torch.empty_like(weight)

    def products():
        torch.mm(patches, weight.t(), out=tokens)
        torch.mm(grad.t(), patches, out=d_weight)

    variants = {name: lambda f=f: e.both(f) for name, f in forwards.items()} | {"matmuls": products}
    flop = 4 * len(patches) * weight.numel()
    record(benchmark, variants, limit="matmuls", **facts(case), part=case.part, flop=flop)


def test_memory(benchmark, device, case):
    setup = "import torch; from benchmarks.bench_gather_patches import *; "
    setup += f"e = Embedding({case.shape}, '', {case.dtype}, 'cpu')"
    found = {name: peak_memory(setup, f"e.both(e.{name})") for name in ("sslops", "eager", "indexed")}
    record_memory(benchmark, found, **facts(case), part="memory")
