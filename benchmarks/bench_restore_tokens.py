"""A decoder's input put together, beside MAE's eager code and torch.compile. Shapes: B x K x L x D, one prefix."""

import pytest
import torch

import sslops

from ._compare import cases, record

CASES = {
    "cpu": cases("64x49x196x512", "float32", "forward both"),
    "cuda": cases("64x49x196x512 1024x49x196x512", "float32 bfloat16", "forward both"),
    "small": cases("3x12x50x20", "float32 bfloat16", "forward both"),
}
WORK = {("both", "B=1024 K=49 L=196 D=512"): {"bytes": 4 * 1024 * 512 * (2 + 49 + 196)}}


def eager(x: torch.Tensor, token: torch.Tensor, ids: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    masked = token.repeat(len(x), ids.shape[1] + 1 - x.shape[1], 1)
    shuffled = torch.cat([x[:, 1:], masked], dim=1)
    restored = torch.gather(shuffled, 1, ids.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    return torch.cat([x[:, :1], restored], dim=1) + pos


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("positions", ["fixed", "learned"])
def test_time(benchmark, device, case, positions):
    (b, k, length, d), dtype, part = case
    torch._dynamo.reset()
    x, token, pos = (
        torch.randn(shape, device=device).to(dtype) for shape in ((b, 1 + k, d), (1, 1, d), (1, 1 + length, d))
    )
    learned = [x, token, pos][: 3 if positions == "learned" else 2]
    if part == "both":
        for y in learned:
            y.requires_grad_()
    ids = torch.rand(b, length, device=device).argsort(dim=1)
    counts = torch.full((b,), k, device=device)
    grad, out = torch.randn(2, b, 1 + length, d, device=device).to(dtype)

    def step(op):
        def run():
            for y in learned:
                y.grad = None
            result = op(x, token, ids, pos)
            if part == "both":
                result.backward(grad)

        return run

    variants = {
        "sslops": step(lambda *inputs: sslops.restore_tokens(*inputs, num_prefix=1)),
        "counts": step(lambda *inputs: sslops.restore_tokens(*inputs, num_prefix=1, counts=counts)),
        "eager": step(eager),
        "compile": step(torch.compile(eager, dynamic=False)),
        "memory": lambda: (out.copy_(grad), grad.sum(dim=0) if part == "both" else None),
    }
    size = b * d * dtype.itemsize * (2 if part == "both" else 1) * (2 + k + length)
    record(
        benchmark, variants, limit="memory", b=b, k=k, l=length, d=d, dtype=dtype, part=part, positions=positions,
        bytes=size,
    )  # fmt: skip
