"""The accuracy promise as one check, and the other checks that every op shares.

An op's truth is its eager reference in float64. Its error, for the output and for every gradient, may be at most twice
the error of the eager reference in the input's own dtype, plus the floor of that dtype. Errors are relative, in the
2-norm and in the maximum norm.

On one small tensor an error is luck, and the luck depends on how a matmul sums, so on the machine: where both err
alike, one number in three has more than twice the other's error. So the promise is about root mean squares over draws
of the rounding. Most cases keep it on the first draw, which is then the only one; one that does not is drawn again,
what failed staying in the mean, until the mean keeps it or there are DRAWS. How often one number, or the 2-norm of ten,
fails, with normal errors and no floor (simulated; in brackets on one draw alone):

    our error / eager's     0.7       1           1.4         2           3           4
    one number            0 (22%)   0 (30%)   0.3% (39%)   10% (50%)   42% (62%)   60% (70%)
    ten numbers           0 (0)     0 (2%)      0 (14%)    10% (50%)   87% (89%)   98% (98%)

So a right kernel fails nowhere, and a fault shows in what has many numbers, like a gradient, nearly as on one draw.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from sslops._contrastive import Metrics
from sslops._schema import Schema
from sslops.backend import BACKENDS, refusal

# Two units in the last place of float32. Half-precision errors come from rounded operands and results, which eager
# shares: an eighth of a unit covers the chance that eager's own error is small.
FLOORS = {
    torch.float32: 2 * torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float16).eps / 8,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 8,
}
EAGER_FACTOR = 2.0
DRAWS = 32


def lowered(x: Any) -> list[Any]:
    """An op's arguments as torch.ops.sslops takes them"""
    return Schema(type(x)).lower(x)


def targets(op: str) -> list[tuple[str, str]]:
    """(device, backend) pairs whose fused kernel can run on this machine."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [
        (device, backend)
        for device in devices
        for backend in BACKENDS
        if backend != "eager" and refusal(backend, op, torch.device(device), torch.float32) is None
    ]


def errors(x: Tensor, truth: Tensor, scale: float = 0.0) -> tuple[float, float]:
    """Relative errors of x, in the 2-norm and the maximum norm.

    scale: the root-mean-square size of terms that cancel in the truth, where it is smaller than they are.
    """
    difference = x.double() - truth
    norms = []
    for order, size in ((2, max(1, truth.numel()) ** 0.5), (torch.inf, 1.0)):
        reference = max(float(torch.linalg.vector_norm(truth, order)), scale * size)
        error = float(torch.linalg.vector_norm(difference, order))
        norms.append(error / reference if reference > 0 else error)
    return norms[0], norms[1]


def draws(inputs: Sequence[Tensor], dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """The inputs; then all of them, but for 0-d ones, longer by some units in the last place of dtype.

    What collapses, agrees or cancels does so in every draw, but each number is rounded anew.
    """
    for draw in range(DRAWS):
        factor = 1 + draw * torch.finfo(dtype).eps
        yield [factor * x if draw and x.dim() else x for x in inputs]


def assert_promise(
    names: Sequence[str],
    answers: Callable[[list[Tensor]], Sequence[Sequence[Tensor]]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    scale: Mapping[str, float] | None = None,
) -> None:
    """answers(draw of inputs): three lists, ours, eager's and the truth, of what the names name. scale: for `errors`"""
    squares: dict[tuple[str, str], Tensor] = {}  # sums over draws, of ours and of eager's
    for count, draw in enumerate(draws(inputs, dtype), 1):
        for name, got, eager, truth in zip(names, *answers(draw), strict=True):
            assert got.shape == eager.shape == truth.shape, f"{name}: {got.shape}, eager has {eager.shape}"
            assert got.dtype == eager.dtype, f"{name}: {got.dtype}, eager has {eager.dtype}"
            if not got.numel():
                continue
            found = (errors(x, truth, (scale or {}).get(name, 0.0)) for x in (got, eager))
            for norm, ours, theirs in zip(("2", "max"), *found, strict=True):
                if not theirs < float("inf"):  # eager overflowed: what we give must still be right
                    theirs = 0.0
                square = torch.tensor([ours, theirs], dtype=torch.float64) ** 2
                squares[name, norm] = square + squares.get((name, norm), 0.0)
        failed = []
        for (name, norm), square in squares.items():
            ours, theirs = (square / count).sqrt().tolist()
            bound = EAGER_FACTOR * theirs + FLOORS[dtype]
            if not ours <= bound:
                failed.append(f"{name}: error {ours:.2e} ({norm}-norm) above {bound:.2e}; eager has {theirs:.2e}")
        if not failed:
            return
    raise AssertionError("\n".join(failed))


def evaluate(
    op: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    backend: str,
    dtype: torch.dtype | None = None,
    **kwargs: object,
) -> list[Tensor]:
    """op's output and the gradients of its inputs under a fixed random cotangent, in `dtype` if given."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]  # strides and all
    out = op(*leaves, backend=backend, **kwargs)
    cotangent = torch.rand(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def check(
    op: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    backend: str,
    *,
    dtype: torch.dtype | None = None,
    scale: Mapping[str, float] | None = None,
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    **kwargs: object,
) -> None:
    """The promise, for op(*inputs, backend=..., **kwargs). dtype: the row of FLOORS; None: the first input's."""

    def answers(draw: list[Tensor]) -> Sequence[Sequence[Tensor]]:
        truth = evaluate(op, draw, "eager", torch.float64, **kwargs)
        with context():
            return *(evaluate(op, draw, each, **kwargs) for each in (backend, "eager")), truth

    tensors = list(inputs.values())
    assert_promise(["output", *inputs], answers, tensors, dtype or tensors[0].dtype, scale)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN: what a kernel forgets to write, or reads before it is written, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def grown_memory(setup: str, statement: str) -> float:
    """MB by which `statement`, after `setup`, raises the peak memory of a process of its own."""
    script = f"""
import sslops, torch
def peak():  # not getrusage's, which a child inherits
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
{setup}
before = peak()
{statement}
print(peak() - before)
"""
    return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


class Array:
    """As numpy's: what it is compared with, the answer has no truth"""

    def __eq__(self, other: object) -> bool:
        raise ValueError("The truth value of an array is ambiguous")


def assert_refused(error: type[Exception], op: str, argument: str, call: Callable[[], object]) -> None:
    """call() raises `error`, and the message names the op, the argument, what was wanted and what came."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{op}: {argument}: wanted "), message
    assert ", got " in message, message


def assert_compiles(op: Callable[..., Tensor], *inputs: Tensor, backend: str = "aot_eager") -> None:
    """fullgraph, the plain call's output and gradients, and no new graph for every batch size."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(op, fullgraph=True, backend=graphs)
    for rows in (len(inputs[0]), *range(2, len(inputs[0]), max(1, len(inputs[0]) // 4))):
        for call in (op, compiled):
            leaves = [x[:rows].detach().clone().requires_grad_() for x in inputs]
            out = call(*leaves)
            grads = torch.autograd.grad(out.sum(), leaves)
            if call is op:
                expected = [out, *grads]
        rounding = 1e-6 if backend == "inductor" else 0.0  # it sums in an order of its own
        for ours, theirs in zip([out, *grads], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding, equal_nan=True)
    assert graphs.frame_count <= 2, f"{graphs.frame_count} graphs: one for the first batch size and one for all others"


def assert_metrics(found: Metrics, positive: Tensor, others: Tensor, dtype: torch.dtype) -> None:
    """Against float64 similarities with the positives [N] and with everything else [N, K]"""
    above = (others > positive[:, None]).sum(1)
    close = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 0.02, "check_dtype": False}
    torch.testing.assert_close(found.top1, (above < 1).double().mean(), **close)
    torch.testing.assert_close(found.top5, (above < 5).double().mean(), **close)
    torch.testing.assert_close(found.positive_similarity, positive.mean(), **close)
    assert not any(x.requires_grad for x in found)
    assert 0.05 < found.top1 < found.top5 <= 1
    assert found.top1 < 0.95
