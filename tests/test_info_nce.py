import oracle
import pytest
import torch

import sslops

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
TARGETS = oracle.targets("info_nce")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)
each_kind = pytest.mark.parametrize("kind", ["queue", "trainable", "in-batch"])


def pairs(b: int, d: int, k: int = 0, *, dtype=torch.float32, device="cpu", noise: float = 4.0):
    """Queries and keys [b, d]; with k also negatives [k, d] of lengths from 1/3 to 3."""
    g = torch.Generator().manual_seed(b * 1000 + d + k)
    query = torch.randn(b, d, generator=g)
    found = {"query": query, "key": query + noise * torch.randn(b, d, generator=g)}
    if k:
        found["negatives"] = torch.randn(k, d, generator=g) * 3 ** (2 * torch.rand(k, 1, generator=g) - 1)
    return {name: x.to(device, dtype) for name, x in found.items()}


def losses(query, key, negatives=None, **kwargs):
    return sslops.info_nce(query, key, negatives, reduction="none", **kwargs)


def losses_of_tensor_temperature(query, key, temperature, negatives=None, **kwargs):
    return losses(query, key, negatives, temperature=temperature, **kwargs)


def check(inputs, backend, kind, op=losses, **kwargs):
    """oracle.check with the negatives as a queue (only the query learns), trainable, or left out"""
    inputs = dict(inputs)
    if kind == "trainable":
        return oracle.check(op, inputs, backend, **kwargs)
    negatives = inputs.pop("negatives", None)
    if kind == "in-batch":
        return oracle.check(op, inputs, backend, **kwargs)
    key = inputs.pop("key")

    def of_query(query, *rest, **options):
        fixed = (x.to(query.dtype if query.dtype == torch.float64 else x.dtype) for x in (key, negatives))
        key_, negatives_ = fixed
        return op(query, key_, *rest, negatives=negatives_, **options)

    return oracle.check(of_query, inputs, backend, **kwargs)


@each_target
@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "k", "d", "temperature"),
    [(2, 5, 3, 0.5), (5, 33, 33, 0.1)]  # too few rows for eager's error to be typical at a lower temperature
    + [(67, 300, 33, t) for t in (1.0, 0.1, 0.02)]
    + [(b, k, d, t) for b, k, d in [(256, 1024, 128), (301, 2500, 40)] for t in (1.0, 0.1, 0.02, 0.005)],
)
def test_accuracy(device, backend, kind, dtype, b, k, d, temperature):
    with oracle.poisoned_memory():
        check(pairs(b, d, k, dtype=dtype, device=device), backend, kind, temperature=temperature)


def test_temperature_gradient_of_the_reference_in_batch():
    """What is masked out must not make it NaN."""
    query, key = torch.randn(2, 5, 4, dtype=torch.float64)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 1])

    def loss(temperature):
        return sslops.info_nce(query, key, temperature=temperature, query_ids=ids, backend="eager")

    assert torch.autograd.gradcheck(loss, temperature)
