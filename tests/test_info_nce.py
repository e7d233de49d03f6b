import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops import _C
from sslops import backend as backends
from sslops.distributed import Part
from sslops.kernels.cpu import info_nce as kernel
from sslops.ops.info_nce import Arguments

from . import oracle

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


def arguments(query, key, negatives, ids=(None, None), wanted=(True,) * 5, temperature=0.2, backend="cpu", **beside):
    """As register fills them in"""
    options = temperature, True, False, 0, "", False, torch.float32, backend, list(wanted)
    return Arguments(query, key, negatives, *ids, *[None] * 4, *options)._replace(**beside)


def losses(query, key, negatives=None, **kwargs):
    return sslops.info_nce(query, key, negatives, reduction="none", **kwargs)


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
    + [(b, k, d, t) for b, k, d in [(67, 300, 33), (256, 1024, 128), (301, 2500, 40)] for t in (1.0, 0.1, 0.02, 0.005)],
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


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_every_instruction_set(isa, kind, dtype, temperature):
    with oracle.poisoned_memory():
        check(pairs(150, 72, 1100, dtype=dtype), "cpu", kind, temperature=temperature)


@each_target
@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_aligned_pairs(device, backend, kind, dtype, temperature):
    """Easy positives: the loss and the pull of the positive are small differences of large numbers."""
    inputs = pairs(600, 128, 1200, dtype=dtype, device=device, noise=1e-2)
    if temperature == 0.05 and dtype == torch.float32:
        assert losses(**inputs, temperature=temperature, backend=backend).max() < 1e-3
    check(inputs, backend, kind, temperature=temperature)


@each_target
@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_collapsed(device, backend, kind, dtype):
    """All embeddings equal: the gradient is zero, a sum of terms of size 1 / tau per row that cancel."""
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    inputs = {"query": row.repeat(300, 1), "key": row.repeat(300, 1), "negatives": row.repeat(300, 1)}
    size = 1 / 0.1 / float(row.float().norm()) / 64**0.5
    check(inputs, backend, kind, temperature=0.1, scale=dict.fromkeys(inputs, size))


@each_target
@each_kind
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-4, 1e4, 1e18, 1e25])
def test_magnitudes(device, backend, kind, magnitude):
    inputs = {name: x * magnitude for name, x in pairs(130, 24, 70, device=device).items()}
    check(inputs, backend, kind, temperature=0.1)


@each_target
@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.1, 1.0, 4.0])
def test_unnormalised(device, backend, kind, dtype, size):
    inputs = {name: x * size for name, x in pairs(301, 33, 290, dtype=dtype, device=device, noise=1.0).items()}
    check(inputs, backend, kind, temperature=0.7, normalize=False)


@each_target
@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.03])
@pytest.mark.parametrize("normalize", [True, False])
def test_temperature_gradient(device, backend, kind, dtype, temperature, normalize):
    inputs = {name: x * 0.3 for name, x in pairs(200, 48, 190, dtype=dtype, device=device).items()}
    negatives = inputs.pop("negatives")
    inputs["temperature"] = torch.tensor(temperature, device=device)
    if kind == "trainable":
        inputs["negatives"] = negatives

    def op(query, key, temperature, negatives_=None, **kwargs):
        if kind == "queue":
            negatives_ = negatives.to(query.dtype)
        return losses(query, key, negatives_, temperature=temperature, **kwargs)

    oracle.check(op, inputs, backend, dtype=dtype, normalize=normalize)


@each_target
@each_kind
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(device, backend, kind, dtype):
    def autocast():
        return torch.autocast(device, dtype)

    check(pairs(300, 64, 1100, device=device), backend, kind, dtype=dtype, temperature=0.1, context=autocast)


@each_target
@pytest.mark.parametrize("autocast", [False, True])
def test_a_queue_of_another_dtype(device, backend, autocast):
    """bf16 embeddings and a float32 queue, as autocast leaves them, and the other way around"""
    inputs = pairs(20, 16, 50, device=device)
    for half in ({"query", "key"}, {"negatives"}):
        mixed = {name: x.bfloat16() if name in half else x for name, x in inputs.items()}
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            ours, eager = (losses(**mixed, backend=each) for each in (backend, "eager"))
        torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)


def of_ids(query, key, negatives=None, **kwargs):
    """40 ids, so that a row has a few false negatives"""
    ids = torch.arange(len(query), device=query.device) % 40
    others = None if negatives is None else torch.arange(len(negatives), device=query.device) % 41
    return losses(query, key, negatives, query_ids=ids, negative_ids=others, **kwargs)


@each_target
@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_ids(device, backend, kind, dtype, temperature):
    check(pairs(120, 40, 1200, dtype=dtype, device=device), backend, kind, of_ids, temperature=temperature)


def bits(*shape, device="cpu"):
    """True for about two of three"""
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device) < 2 / 3


def of_mask(query, key, negatives=None, **kwargs):
    """Row 1 has no negative, and all but row 0 leave out the first 64 columns, the smallest chunk"""
    mask = bits(len(query), len(key if negatives is None else negatives), device=query.device)
    mask[1], mask[1:, :64], mask[0, :64] = False, False, True
    return losses(query, key, negatives, negative_mask=mask, **kwargs)


@each_target
@each_kind
@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(torch.float32, 0.1), (torch.float32, 0.02), (torch.bfloat16, 0.1), (torch.float16, 0.02)],
)
def test_mask(device, backend, kind, dtype, temperature):
    with oracle.poisoned_memory():
        check(pairs(120, 40, 1203, dtype=dtype, device=device), backend, kind, of_mask, temperature=temperature)


def of_paired(query, key, *rest, negatives=None, masked=True, **kwargs):
    """rest: the shared negatives, unless they are in `negatives` or there are none, and the paired ones"""
    *shared, paired = rest
    negatives = shared[0] if shared else negatives
    mask = bits(*paired.shape[:2], device=query.device)
    mask[2] = False
    return losses(
        query, key, negatives, paired_negatives=paired, paired_mask=mask if masked else None, **kwargs
    )  # fmt: skip


def with_paired(b, d, k, m, **options):
    inputs = pairs(b, d, k, **options)
    own = pairs(b * m, d, noise=1.0, **options)["key"].view(b, m, d)
    return inputs | {"paired": own + 0.3 * inputs["query"][:, None]}  # harder than the shared ones


@each_target
@each_kind
@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(torch.float32, 0.1), (torch.float32, 0.02), (torch.bfloat16, 0.1), (torch.float16, 0.02)],
)
@pytest.mark.parametrize("masked", [True, False])
def test_paired(device, backend, kind, dtype, temperature, masked):
    """37: more than two vectors of them, and no whole one"""
    inputs = with_paired(67, 33, 300, 37, dtype=dtype, device=device)
    with oracle.poisoned_memory():
        check(inputs, backend, kind, of_paired, temperature=temperature, masked=masked)


@each_target
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e18, 1e25])
def test_magnitudes_of_paired(device, backend, magnitude):
    inputs = {name: x * magnitude for name, x in with_paired(30, 24, 70, 5, device=device).items()}
    inputs["paired"][3, 1] = 0
    check(inputs, backend, "trainable", of_paired, temperature=0.1, masked=False)


@each_target
def test_temperature_gradient_of_paired_alone(device, backend):
    """Unnormalised, beside no shared negative and under a learned temperature"""
    inputs = with_paired(40, 20, 0, 9, device=device)
    inputs["temperature"] = torch.tensor(2.0, device=device)

    def op(query, key, paired, temperature, **kwargs):
        return losses(query, key, key[:0], paired_negatives=paired, temperature=temperature, **kwargs)

    oracle.check(op, inputs, backend, normalize=False)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_paired_are_shared_ones_that_a_mask_leaves_to_one_query(backend, decoupled):
    """[B, M, D] as [B M, D], losses, gradients and metrics"""
    query, key, negatives, paired = with_paired(9, 8, 30, 5).values()
    counts, ids = bits(9, 5), {"query_ids": torch.arange(9) % 4, "negative_ids": torch.arange(30) % 9}
    own = (torch.eye(9, dtype=torch.bool)[:, :, None] & counts).flatten(1)
    results = []
    for options in (
        {"negatives": negatives, "paired_negatives": paired, "paired_mask": counts, **ids},
        {
            "negatives": torch.cat([negatives, paired.flatten(0, 1)]),
            "negative_mask": torch.cat([torch.ones(9, 30, dtype=torch.bool), own], 1),
            "query_ids": ids["query_ids"],
            "negative_ids": torch.cat([ids["negative_ids"], torch.full((45,), -1)]),
        },
    ):
        learnt = [query, key, *(options[name] for name in ("negatives", "paired_negatives") if name in options)]
        learnt = [x.requires_grad_() for x in learnt]
        loss, metrics = sslops.info_nce(
            query, key, **options, temperature=0.3, decoupled=decoupled, return_metrics=True, backend=backend
        )
        gradients = torch.autograd.grad(loss, learnt)
        results.append([loss, *metrics, *gradients[:2], torch.cat([x.flatten(0, -2) for x in gradients[2:]])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert 0 < results[0][1] < 1


def test_paired_against_the_formula():
    """Beside a queue, the batch and nothing"""
    query, key, negatives, paired = with_paired(4, 3, 5, 2, dtype=torch.float64).values()
    q, k, n, p = (F.normalize(x, dim=-1) for x in (query, key, negatives, paired))
    mask = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    for given, shared in (
        (negatives, [list(n)] * 4),
        (key[:0], [[]] * 4),
        (None, [[*k[:i], *k[i + 1 :]] for i in range(4)]),
    ):
        expected = []
        for i in range(4):
            own = torch.exp(q[i] @ k[i] / 0.3)
            others = shared[i] + [p[i, j] for j in range(2) if mask[i, j]]
            expected.append(-torch.log(own / (own + sum(torch.exp(q[i] @ other / 0.3) for other in others))))
        found = losses(query, key, given, paired_negatives=paired, paired_mask=mask, temperature=0.3)
        torch.testing.assert_close(found, torch.stack(expected))


def test_hard_negatives_that_are_everyones():
    """docs/methods/moco.md: sentence-transformers' loss, a cross entropy over all keys and all hard negatives"""
    query, key, hard = with_paired(7, 5, 0, 3).values()
    candidates = F.normalize(torch.cat([key, hard.flatten(0, 1)]))
    expected = F.cross_entropy(F.normalize(query) @ candidates.t() / 0.05, torch.arange(7), reduction="none")
    rows, own = torch.cat([key, hard.flatten(0, 1)]), torch.arange(len(key))
    ids = torch.cat([own, torch.full((len(rows) - len(key),), -1)])
    found = losses(query, key, rows, query_ids=own, negative_ids=ids, temperature=0.05)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_a_mask_leaves_out_is_not_looked_at(backend, bad, normalize):
    """As if it was not there; NaN, of a shared one, for the one query that does look"""
    inputs = {name: x.requires_grad_() for name, x in with_paired(40, 24, 30, 3).items()}
    mask, counts = bits(40, 30), bits(40, 3)
    mask[:, 7] = counts[:, 1] = False
    options = {"normalize": normalize, "temperature": 0.5, "backend": backend}

    def evaluate(negatives, paired, mask, counts):
        tensors = {**inputs, "negatives": negatives, "paired_negatives": paired}
        del tensors["paired"]
        loss = losses(**tensors, negative_mask=mask, paired_mask=counts, **options)
        return loss, *torch.autograd.grad(loss.sum(), list(tensors.values()))

    shared, own = torch.arange(30) != 7, torch.arange(3) != 1
    expected = evaluate(
        inputs["negatives"].detach()[shared].requires_grad_(), inputs["paired"].detach()[:, own].requires_grad_(),
        mask[:, shared], counts[:, own],
    )  # fmt: skip
    with torch.no_grad():
        inputs["negatives"][7, 2] = bad
        inputs["paired"][:, 1, 5] = bad
    loss, dquery, dkey, dnegatives, dpaired = evaluate(inputs["negatives"], inputs["paired"], mask, counts)
    for ours, theirs in zip((loss, dquery, dkey, dnegatives[shared], dpaired[:, own]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not dnegatives[7].any()
    assert not dpaired[:, 1].any()
    for look in (mask[3:4, 7], counts[3:4, 1]):
        look[:] = True
        loss, dquery, *_ = evaluate(inputs["negatives"], inputs["paired"], mask, counts)
        look[:] = False
        assert torch.equal(loss.isnan(), torch.arange(40) == 3)
        assert torch.equal(dquery.isnan().any(1), torch.arange(40) == 3)


@pytest.mark.parametrize("backend", ["cpu"])
def test_masks_of_any_strides(backend):
    query, key, negatives, paired = with_paired(37, 16, 300, 11).values()
    for mask, counts in ((bits(37, 300), bits(37, 11)), (bits(300).expand(37, -1), bits(11).expand(37, -1))):
        dense = mask.contiguous(), counts.contiguous()
        options = {"paired_negatives": paired, "backend": backend}
        expected = losses(query, key, negatives, negative_mask=dense[0], paired_mask=dense[1], **options)
        for laid_out in (lambda x: x, lambda x: x.t().contiguous().t(), lambda x: torch.stack([x, ~x], 2)[..., 0]):
            masks = {"negative_mask": laid_out(mask), "paired_mask": laid_out(counts)}
            found = losses(query, key, negatives, **masks, **options)
            assert torch.equal(found, expected)


@each_target
def test_no_paired_negative_is_none(device, backend):
    query, key, negatives = (x.requires_grad_() for x in pairs(10, 8, 30, device=device).values())
    for given in (negatives, None, key.detach()[:0]):
        empty = query.new_empty(10, 0, 8).requires_grad_()
        loss = losses(query, key, given, paired_negatives=empty, backend=backend)
        assert torch.equal(loss, losses(query, key, given, backend=backend))
        assert torch.autograd.grad(loss.sum(), empty)[0].shape == (10, 0, 8)
    nobody = {"paired_negatives": query.new_empty(0, 3, 8).requires_grad_(), "backend": backend}
    loss = losses(query[:0], key[:0], negatives, **nobody)
    assert torch.autograd.grad(loss.sum(), nobody["paired_negatives"])[0].shape == (0, 3, 8)


def test_a_queue_and_paired_negatives_before_backward():
    """Only the query learns: what the gradient came from may change"""
    query, key, negatives, paired = with_paired(10, 8, 30, 4).values()
    options = {"paired_negatives": paired, "paired_mask": bits(10, 4), "negative_mask": bits(10, 30), "backend": "cpu"}
    expected = torch.autograd.grad(losses(query.requires_grad_(), key, negatives, **options).sum(), query)
    loss = losses(query, key, negatives, **options)
    for x in (negatives, paired, options["paired_mask"], options["negative_mask"]):
        x.zero_()
    assert torch.equal(*torch.autograd.grad(loss.sum(), query), *expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_paired_negatives_may_change(backend, normalize):
    query, key, negatives, paired = with_paired(10, 8, 30, 4).values()
    options = {"paired_negatives": paired, "normalize": normalize, "backend": backend}
    expected = torch.autograd.grad(losses(query.requires_grad_(), key, negatives, **options).sum(), query)
    loss = losses(query, key, negatives, **options)
    negatives.zero_(), paired.zero_()
    assert torch.equal(*torch.autograd.grad(loss.sum(), query), *expected)


def test_paired_negatives_of_another_dtype():
    query, key, negatives, paired = with_paired(10, 8, 30, 4).values()
    paired = paired.bfloat16().requires_grad_()
    ours, eager = (losses(query, key, negatives, paired_negatives=paired, backend=each) for each in ("cpu", "eager"))
    torch.testing.assert_close(ours, eager)
    gradients = [torch.autograd.grad(loss.sum(), paired)[0] for loss in (ours, eager)]
    assert gradients[0].dtype == torch.bfloat16
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)


def decoupled(*args, **kwargs):
    return losses(*args, decoupled=True, **kwargs)


@each_target
@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_decoupled(device, backend, kind, dtype, temperature):
    check(pairs(70, 40, 1200, dtype=dtype, device=device), backend, kind, decoupled, temperature=temperature)


def weighted(query, *rest, **kwargs):
    return losses(query, *rest, decoupled=True, positive_weights=torch.linspace(0.5, 2, len(query)), **kwargs)


@each_kind
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_positive_weights(kind, temperature):
    """DCLW's; in bf16 they are float32 to us"""
    check(pairs(70, 40, 200), "cpu", kind, weighted, temperature=temperature)
    query, key, negatives = pairs(5, 4, 7).values()
    w = torch.tensor([0.5, 1.0, 0.0, 2.0, 3.0]).bfloat16()
    found, plain = (
        losses(query, key, negatives, temperature=0.3, decoupled=True, positive_weights=each) for each in (w, None)
    )
    torch.testing.assert_close(found, plain + (1 - w.float()) * F.cosine_similarity(query, key) / 0.3)


def test_decoupled_against_the_formula():
    query, key, negatives = pairs(5, 4, 7, dtype=torch.float64).values()
    q, k, n = (F.normalize(x) for x in (query, key, negatives))
    expected = (q @ n.t() / 0.3).logsumexp(1) - (q * k).sum(1) / 0.3
    torch.testing.assert_close(losses(query, key, negatives, temperature=0.3, decoupled=True), expected)
    logits = (q @ k.t() / 0.3).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(
        losses(query, key, temperature=0.3, decoupled=True), logits.logsumexp(1) - (q * k).sum(1) / 0.3
    )


@each_target
@pytest.mark.parametrize("temperature", [0.2, 0.005])
def test_no_negative_when_decoupled(device, backend, temperature):
    """-inf, and its gradient is the positive's"""
    query, key, _ = (x.requires_grad_() for x in pairs(5, 16, 7, device=device).values())
    tau = torch.tensor(temperature, device=device, requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool, device=device).triu(1)
    for tau_, leaves in ((temperature, (query, key)), (tau, (query, key, tau))):
        options = {"negative_mask": mask, "temperature": tau_}
        found = [decoupled(query, key, **options, backend=each) for each in (backend, "eager")]
        torch.testing.assert_close(*found)
        assert found[0].isinf().tolist() == [False] * 4 + [True]
        gradients = (torch.autograd.grad(each.sum(), leaves) for each in found)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 / temperature)


@each_target
def test_ids_leave_out_what_they_name(device, backend):
    """With and without the false negatives in the queue"""
    inputs = pairs(10, 8, 30, device=device)
    query_ids, negative_ids = torch.arange(10), torch.cat([torch.arange(10).repeat(2), torch.arange(100, 110)])
    inputs["query"] = inputs["query"][:1].repeat(10, 1)
    for i in range(10):
        left = negative_ids != i
        expected = losses(inputs["query"], inputs["key"], inputs["negatives"][left.to(device)], backend=backend)[i]
        ours = losses(**inputs, query_ids=query_ids.to(device), negative_ids=negative_ids.to(device), backend=backend)[
            i
        ]
        torch.testing.assert_close(ours, expected)
    same = torch.zeros(30, dtype=torch.int64, device=device)  # no negative at all
    assert not losses(**inputs, query_ids=same[:10], negative_ids=same, temperature=0.02, backend=backend).any()


@each_target
@pytest.mark.parametrize("kind", ["queue", "in-batch"])
def test_ids_below_zero_are_equal_to_none(device, backend, kind):
    """-1 is what a queue has where no id was given"""
    inputs = pairs(6, 8, 10, device=device)
    if kind == "in-batch":
        del inputs["negatives"]
    ids = {"query_ids": torch.tensor([-1, 3, -1, 4, 3, -7], device=device)}
    if kind == "queue":
        ids["negative_ids"] = torch.tensor([-1, 3, -1, 5, -7, 4, 3, -1, -1, 2], device=device)
    expected = {
        name: torch.where(x < 0, -1000 * (i + 1) - torch.arange(len(x), device=device), x)
        for i, (name, x) in enumerate(ids.items())
    }
    if kind == "queue":  # no negative id is another's, so that this is the same by equality alone
        assert not torch.isin(expected["query_ids"][expected["query_ids"] < 0], expected["negative_ids"]).any()
    for each in (backend, "eager"):
        found = losses(**inputs, **ids, backend=each)
        assert torch.equal(found, losses(**inputs, **expected, backend=each))
        assert (found[0] == losses(**inputs, backend=each)[0]).item()
        assert (found[1] < losses(**inputs, backend=each)[1]).item()


@each_target
def test_ids_of_32_bits(device, backend):
    inputs, ids = pairs(20, 8, 30, device=device), torch.arange(30, device=device) % 7
    for each in (backend, "eager"):
        expected = losses(**inputs, query_ids=ids[:20], negative_ids=ids, backend=each)
        for queries, others in ((ids[:20].int(), ids.int()), (ids[:20].int(), ids), (ids[:20], ids.int())):
            assert torch.equal(losses(**inputs, query_ids=queries, negative_ids=others, backend=each), expected)


@each_target
def test_ids_that_differ_in_their_high_bits_only(device, backend):
    inputs, ids = pairs(6, 8, 9, device=device), torch.arange(9, device=device)
    high = ids + 2**32
    found = losses(**inputs, query_ids=ids[:6], negative_ids=high, backend=backend)
    assert torch.equal(found, losses(**inputs, backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_left_out_is_not_looked_at(backend, bad, normalize):
    """A negative that is not finite: as if it was not there, for those who leave it out; NaN for the others"""
    inputs = {name: x.requires_grad_() for name, x in pairs(40, 24, 30).items()}
    with torch.no_grad():
        inputs["negatives"][7, 2] = bad
    ids, row = torch.full((40,), 5), torch.arange(30) == 7

    def evaluate(negatives, query_ids, negative_ids):
        tensors = {**inputs, "negatives": negatives}
        loss = losses(
            **tensors, query_ids=query_ids, negative_ids=negative_ids, normalize=normalize, temperature=0.5,
            backend=backend,
        )  # fmt: skip
        return loss, *torch.autograd.grad(loss.sum(), list(tensors.values()))

    found = evaluate(inputs["negatives"], ids, torch.where(row, 5, 6))
    expected = evaluate(inputs["negatives"].detach()[~row].requires_grad_(), ids, torch.full((29,), 6))
    torch.testing.assert_close(found[:3], expected[:3])
    torch.testing.assert_close(found[3][~row], expected[3])
    assert not found[3][row].any()
    ids[3] = 6  # one of them looks
    loss, dquery, _, dnegatives = evaluate(inputs["negatives"], ids, torch.where(row, 5, 7))
    assert torch.equal(loss.isnan(), torch.arange(40) == 3)
    assert torch.equal(dquery.isnan().any(1), torch.arange(40) == 3)
    assert dnegatives[row].isnan().any()


@each_target
@each_kind
@pytest.mark.parametrize("temperature", [0.048, 0.046, 0.02])
def test_one_row_opposite_all_others(device, backend, kind, temperature):
    """The smallest exponentials that there are, on both sides of the temperature where the maximum is no longer fixed;
    the loss as GradScaler scales it."""
    row = torch.randn(16, generator=torch.Generator().manual_seed(0))
    query, key, negatives = 1e-2 * torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(1)) - row
    query[0] += 2 * row
    inputs = {"query": query.to(device), "key": key.to(device), "negatives": negatives.to(device)}
    check(inputs, backend, kind, lambda *x, **kwargs: 65536 * losses(*x, **kwargs), temperature=temperature)


@each_target
@pytest.mark.parametrize("temperature", [1e10, 1e30])
def test_high_temperatures(device, backend, temperature):
    oracle.check(losses, pairs(30, 8, 20, device=device), backend, temperature=temperature)


@each_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_under_another_default_dtype(device, backend, dtype):
    inputs = list(pairs(80, 16, 60, device=device).values())
    expected = oracle.evaluate(losses, inputs, backend)
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, expected, oracle.evaluate(losses, inputs, backend)))
    finally:
        torch.set_default_dtype(torch.float32)


@each_target
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(device, backend, reduction):
    def op(*tensors, **kwargs):
        return sslops.info_nce(*tensors, reduction=reduction, **kwargs)

    oracle.check(op, pairs(150, 32, 100, device=device), backend)


def test_against_the_formula():
    """The reference itself, against the definition written as loops."""
    inputs = {name: x.double() for name, x in pairs(4, 3, 5).items()}
    q, k, n = (F.normalize(x) for x in inputs.values())
    for negatives in (n, None):
        expected = torch.zeros(4, dtype=torch.float64)
        for i in range(4):
            own = torch.exp(q[i] @ k[i] / 0.3)
            others = [k[j] for j in range(4) if j != i] if negatives is None else list(n)
            expected[i] = -torch.log(own / (own + sum(torch.exp(q[i] @ other / 0.3) for other in others)))
        ours = losses(inputs["query"], inputs["key"], negatives, temperature=0.3)
        torch.testing.assert_close(ours, expected)


def test_gradients_of_the_reference():
    inputs = [x.double().requires_grad_() for x in pairs(3, 4, 5).values()]
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def op(query, key, negatives, temperature):
        return losses(query, key, negatives, temperature=temperature) + losses(query, key, temperature=temperature)

    assert torch.autograd.gradcheck(op, (*inputs, temperature))
    assert torch.autograd.gradgradcheck(op, (*inputs, temperature))


@each_target
@each_kind
@pytest.mark.parametrize(("b", "k"), [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_empty_and_single(device, backend, kind, b, k):
    query, key = torch.randn(2, b, 8, device=device)
    query.requires_grad_()
    negatives = None if kind == "in-batch" else torch.randn(k, 8, device=device, requires_grad=kind == "trainable")
    learnt = [x for x in (query, negatives) if x is not None and x.requires_grad]
    results = []
    for each in (backend, "eager"):
        loss = losses(query, key, negatives, backend=each)
        results.append((loss, *torch.autograd.grad(loss.sum(), learnt)))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)
    if (b == 1 and negatives is None) or (k == 0 and negatives is not None):
        assert not results[0][0].any()  # the positive is the only candidate
    assert sslops.info_nce(query, key, negatives, backend=backend).isnan() == (b == 0)


@each_target
@each_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["query", "key", "negatives"])
def test_non_finite_rows_as_eager(device, backend, kind, bad, where):
    inputs = pairs(40, 8, 30, device=device)
    inputs[where][3, 2] = bad
    negatives = inputs.pop("negatives")
    if kind != "in-batch":
        inputs["negatives"] = negatives
    learnt = ["query"] if kind == "queue" else list(inputs)
    results = []
    for each in (backend, "eager"):
        leaves = {name: x.detach().requires_grad_(name in learnt) for name, x in inputs.items()}
        loss = losses(**leaves, backend=each)
        results.append((loss, *torch.autograd.grad(loss.sum(), [leaves[name] for name in learnt])))
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), eager.isnan())


@each_target
@each_kind
def test_zero_rows(device, backend, kind):
    inputs = pairs(40, 8, 30, device=device)
    for x in inputs.values():
        x[5] = 0
    check(inputs, backend, kind)


@each_target
def test_non_contiguous(device, backend):
    inputs = {name: x.repeat(2, 2)[::2, 1:41] for name, x in pairs(96, 40, 50, device=device).items()}
    inputs["key"] = inputs["key"].t().contiguous().t()
    oracle.check(losses, inputs, backend)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_run(device, backend, dtype):
    inputs = list(pairs(300, 64, 2100, dtype=dtype, device=device).values())
    threads = torch.get_num_threads()
    first = oracle.evaluate(losses, inputs, backend)
    for _ in range(2):
        assert all(map(torch.equal, first, oracle.evaluate(losses, inputs, backend)))
    if backend == "cpu":
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            assert all(map(torch.equal, first, oracle.evaluate(losses, inputs, backend)))
        finally:
            torch.set_num_threads(threads)


@each_target
@pytest.mark.parametrize("learnt", ["key", "negatives", "query key", "query negatives", "temperature"])
def test_gradients_of_some(device, backend, learnt):
    inputs = {**pairs(50, 16, 40, device=device), "temperature": torch.tensor(0.2, device=device)}
    everything = torch.autograd.grad(
        losses(**{name: x.requires_grad_() for name, x in inputs.items()}, backend=backend).sum(), inputs.values()
    )
    expected = dict(zip(inputs, everything, strict=True))
    leaves = {name: x.detach().requires_grad_(name in learnt.split()) for name, x in inputs.items()}
    losses(**leaves, backend=backend).sum().backward()
    for name, leaf in leaves.items():
        if name in learnt.split():
            assert torch.equal(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


@each_target
@pytest.mark.parametrize("kind", ["queue", "in-batch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics(device, backend, kind, dtype):
    inputs = pairs(300, 32, 700, dtype=dtype, device=device, noise=2.0)
    if kind == "in-batch":
        del inputs["negatives"]
    inputs["query"].requires_grad_()
    loss, found = sslops.info_nce(**inputs, return_metrics=True, backend=backend)
    assert loss.requires_grad
    q, k, *rest = (F.normalize(x.detach().double()) for x in inputs.values())
    positive, others = (q * k).sum(1), q @ (rest[0] if rest else k).t()
    if not rest:
        others.fill_diagonal_(-2)
    oracle.assert_metrics(found, positive, others, dtype)


@each_target
@each_kind
@pytest.mark.parametrize("with_options", [False, True])
def test_opcheck(device, backend, kind, with_options):
    inputs = {name: x.requires_grad_() for name, x in pairs(6, 8, 9, device=device).items()}
    negatives = None if kind == "in-batch" else inputs["negatives"]
    if kind == "queue":
        negatives.requires_grad_(False)
        inputs["key"].requires_grad_(False)
    temperature = torch.tensor(0.3, device=device, requires_grad=True) if with_options else 0.3
    ids = [torch.arange(n, device=device) for n in (6, 9)] if with_options else [None] * 2
    if negatives is None:
        ids[1] = None
    wanted = [True, kind != "queue", kind == "trainable", with_options, False]
    x = arguments(inputs["query"], inputs["key"], negatives, ids, wanted, temperature=temperature, backend=backend)
    values = oracle.lowered(x)
    torch.library.opcheck(torch.ops.sslops.info_nce.default, values)
    with torch.no_grad():
        found, *saved = torch.ops.sslops.info_nce(*values)
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in values]
        torch.library.opcheck(torch.ops.sslops.info_nce_backward.default, (found, *detached, *saved))


@each_target
@pytest.mark.parametrize("with_ids", [False, True])
def test_parts_of_the_batch(device, backend, with_ids):
    """As ranks have them, in-batch: queries 3 to 8 of 9, whose keys are all candidates"""
    query, key = pairs(9, 8, device=device).values()
    ids = torch.arange(9, device=device) % 4 if with_ids else None
    run = backends.kernel(backend, "info_nce")
    grad = torch.linspace(0, 2, 9, device=device)
    x = arguments(query, key, None, (ids, ids), backend=backend)
    whole = run.forward(x)
    gradient = run.backward(grad, x, whole[4])[0]
    parts = []
    for first, last in ((0, 3), (3, 8), (8, 9)):
        part = Part(first, last - first, None)
        own = x._replace(query=query[first:last], query_ids=ids[first:last] if with_ids else None)
        parts.append(run.forward(own, part))
        gradient = gradient - run.backward(grad[first:last], own, parts[-1][4], part)[0]
    for name, expected, *each in zip(("losses", "logged", "dquery", "dtemperature"), whole, *parts, strict=False):
        torch.testing.assert_close(torch.cat(each, 1 if name == "logged" else 0), expected)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@each_target
def test_compile(device, backend):
    negatives = torch.randn(40, 16, device=device)

    def step(query, key):
        queue = sslops.info_nce(query * 2, key.detach(), negatives, temperature=0.2, backend=backend)
        return queue + sslops.info_nce(query, key, temperature=0.2, backend=backend)

    oracle.assert_compiles(step, *pairs(64, 16, device=device).values())


@each_target
def test_compile_with_inductor_ids_and_tensor_temperature(device, backend):
    def step(query, key):
        temperature = query.detach().mean() * 0 + 0.2
        loss, found = sslops.info_nce(
            query, key, temperature=temperature, query_ids=torch.arange(len(query)), return_metrics=True,
            backend=backend,
        )  # fmt: skip
        return loss + found.top1

    oracle.assert_compiles(step, *pairs(16, 8, device=device).values(), backend="inductor")


def test_export():
    class Head(torch.nn.Module):
        def forward(self, *tensors):
            return sslops.info_nce(*tensors)

    inputs = tuple(pairs(8, 4, 6).values())
    exported = torch.export.export(Head(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), sslops.info_nce(*inputs))


@each_target
def test_second_derivative(device, backend):
    query, key = (x.requires_grad_() for x in pairs(6, 8, device=device).values())
    (gradient,) = torch.autograd.grad(sslops.info_nce(query, key, backend=backend), query, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


@pytest.mark.parametrize("learnt", ["query", "query negatives"])
def test_memory_is_linear(learnt):
    """B = 4096, K = 65536, D = 32: in a process of their own, forward and backward grow by a few K x D at most, where
    B x K takes 1 GB."""
    grown = oracle.grown_memory(
        "x = {n: torch.randn(s, 32) for n, s in (('query', 4096), ('key', 4096), ('negatives', 65536))}; "
        f"[x[n].requires_grad_() for n in {learnt.split()}]; "
        "sslops.info_nce(*(v[:300] for v in x.values())).backward()",
        "sslops.info_nce(**x).backward()",
    )
    assert grown < 64, f"{grown:.0f} MB"


@pytest.mark.parametrize("learnt", [True, False])
def test_memory_of_paired_negatives(learnt):
    """[512, 64, 256] are 34 MB: forward and backward grow by their gradient, if they learn, and by little more; so they
    do beside a mask [512, 65536], of a quarter of the logits' bytes"""
    grown = oracle.grown_memory(
        f"own = torch.randn(512, 64, 256).requires_grad_({learnt}); q, k = torch.randn(2, 512, 256).requires_grad_(); "
        "n, mask = torch.randn(65536, 256), torch.ones(512, 65536, dtype=torch.bool); "
        "sslops.info_nce(q[:3], k[:3], n, paired_negatives=own[:3], negative_mask=mask[:3]).backward()",
        "sslops.info_nce(q, k, n, paired_negatives=own, negative_mask=mask).backward()",
    )
    assert grown < 34 * learnt + 20, f"{grown:.0f} MB"


def test_bad_input():
    query, key, negatives = pairs(4, 8, 6).values()
    ids, six = torch.arange(4), torch.arange(6)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "info_nce", argument, lambda: sslops.info_nce(*args, **kwargs))

    refused(TypeError, "query", None, key)
    refused(ValueError, "query", query[0], key)
    refused(TypeError, "query", query.long(), key.long())
    refused(ValueError, "key", query, key[:3])
    refused(ValueError, "key", query, key.half())
    refused(ValueError, "negatives", query, key, negatives[:, :7])
    refused(ValueError, "negatives", query, key, negatives.double())
    refused(ValueError, "negatives", query.double(), key.double(), negatives)
    refused(ValueError, "negatives", query, key, negatives.to("meta"))
    refused(TypeError, "negatives", query, key, negatives.long())
    refused(TypeError, "negatives", query, key, negatives.to_sparse())
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        refused(ValueError, "temperature", query, key, temperature=wrong)
    refused(TypeError, "temperature", query, key, temperature="low")
    refused(ValueError, "temperature", query, key, temperature=torch.ones(2))
    refused(TypeError, "normalize", query, key, normalize=1)
    refused(ValueError, "reduction", query, key, reduction="max")
    refused(TypeError, "return_metrics", query, key, return_metrics=None)
    refused(TypeError, "negative_ids", query, key, negatives, query_ids=ids)
    refused(TypeError, "query_ids", query, key, negatives, negative_ids=six)
    refused(ValueError, "negative_ids", query, key, query_ids=ids, negative_ids=ids)
    refused(ValueError, "negative_ids", query, key, negatives, query_ids=ids, negative_ids=ids)
    refused(ValueError, "query_ids", query, key, negatives, query_ids=six, negative_ids=six)
    refused(TypeError, "query_ids", query, key, query_ids=ids.short())
    refused(ValueError, "query_ids", query, key, query_ids=ids.to("meta"))
    own, mask = query[:, None].repeat(1, 3, 1), torch.ones(4, 6, dtype=torch.bool)
    for wrong in (own[:3], own[..., :7], own[0], own.to("meta"), own.double()):
        refused(ValueError, "paired_negatives", query, key, negatives, paired_negatives=wrong)
    refused(TypeError, "paired_negatives", query, key, paired_negatives=own.long())
    refused(ValueError, "paired_mask", query, key, paired_mask=mask[:, :3])
    refused(ValueError, "paired_mask", query, key, paired_negatives=own, paired_mask=mask)
    refused(TypeError, "paired_mask", query, key, paired_negatives=own, paired_mask=own[..., 0])
    for wrong in (mask[:3], mask[:, :5], mask[0], mask.to("meta")):
        refused(ValueError, "negative_mask", query, key, negatives, negative_mask=wrong)
    refused(ValueError, "negative_mask", query, key, negative_mask=mask)
    refused(TypeError, "negative_mask", query, key, negatives, negative_mask=mask.int())
    refused(ValueError, "positive_weights", query, key, positive_weights=query[:, 0])
    refused(ValueError, "positive_weights", query, key, decoupled=True, positive_weights=query[:3, 0])


def test_the_op_checks_what_pointers_need():
    """People call torch.ops.sslops: nothing there may reach memory unchecked."""
    query, key, negatives = pairs(4, 8, 6).values()
    ids, six = torch.arange(4), torch.arange(6)
    x = arguments(query, key, negatives)
    for bad in (
        {"key": key[:3]},
        {"key": key[:, :7]},
        {"key": key.half()},
        {"negatives": negatives[:, :7]},
        {"negatives": negatives.double()},
        {"query_ids": six, "negative_ids": six},
        {"query_ids": ids, "negative_ids": ids},
        {"negatives": None, "query_ids": ids, "negative_ids": ids},
        {"negative_mask": six[:4, None] < six[:5]},
        {"negatives": None, "negative_mask": six[:4, None] < six},
        {"paired_negatives": query[:3, None]},
        {"paired_negatives": query[:, None], "paired_mask": ids[:, None] < six},
        {"positive_weights": query[:, 0]},
        {"needs_grad": []},
        {"temperature": torch.ones(2)},
        {"version": -1},
        {"version": 2**63 - 1},
    ):
        with pytest.raises(ValueError, match="info_nce: "):
            torch.ops.sslops.info_nce(*oracle.lowered(x._replace(**bad)))
    for bad in ({"query_ids": ids}, {"query_ids": ids.short(), "negative_ids": six}, {"query": query.long()}):
        with pytest.raises(TypeError, match="info_nce: "):
            torch.ops.sslops.info_nce(*oracle.lowered(x._replace(**bad)))
    _, logged, dquery, dtemperature, stats, seen = torch.ops.sslops.info_nce(*oracle.lowered(x))
    for bad in (
        (torch.ones(3), dquery, dtemperature, stats),
        (torch.ones(4), dquery[:3], dtemperature, stats),
        (torch.ones(4), dquery, dtemperature[:3], stats),
        (torch.ones(4), dquery, dtemperature, stats[:2]),
    ):
        grad, *kept = bad
        with pytest.raises(ValueError, match=r"info_nce: (grad|dquery|dtemperature|stats)"):
            torch.ops.sslops.info_nce_backward(grad, *oracle.lowered(x), logged, *kept, seen)
    other = oracle.lowered(x._replace(version=5))
    with pytest.raises(RuntimeError, match="info_nce: negatives"):
        torch.ops.sslops.info_nce_backward(
            torch.ones(4), *other, logged, dquery, dtemperature, stats, seen.new_empty(0)
        )


def test_odd_temperatures_on_a_tensor():
    for value in (-0.5, 0.0, float("nan")):
        assert losses(**pairs(10, 8, 20), temperature=torch.tensor(value), backend="cpu").isnan().all()


class TestTheOracleItself:
    """Broken kernels must not pass. Each breaks one thing that a refactoring could."""

    def refuse(self, kind, inputs=None, **kwargs):
        with pytest.raises(AssertionError, match="above"):
            check(inputs or pairs(300, 32, 1100), "cpu", kind, **kwargs)

    def plant(self, monkeypatch, direction, fault):
        """fault(run, *arguments) in place of a direction of the kernel"""
        run = getattr(kernel, direction)
        monkeypatch.setattr(kernel, direction, lambda *arguments: fault(run, *arguments))

    @each_kind
    def test_a_lost_chunk(self, monkeypatch, kind):
        def fault(run, x):
            return run(x._replace(key=x.key.clone().index_fill_(0, torch.arange(64), 0)))

        def of_queue(run, x):
            return run(x._replace(negatives=x.negatives[:-64]))

        self.plant(monkeypatch, "forward", fault if kind == "in-batch" else of_queue)
        self.refuse(kind)

    @pytest.mark.parametrize("name", ["paired_mask", "negative_mask"])
    def test_a_mask_that_is_not_read(self, monkeypatch, name):
        op, inputs = {
            "paired_mask": (of_paired, with_paired(67, 33, 300, 37)), "negative_mask": (of_mask, pairs(120, 40, 1203))
        }[name]  # fmt: skip
        for direction in ("forward", "backward"):
            with monkeypatch.context() as patch:
                at = 0 if direction == "forward" else 1
                self.plant(
                    patch, direction,
                    lambda run, *x, at=at: run(*x[:at], x[at]._replace(**{name: None}), *x[at + 1 :]),
                )  # fmt: skip
                self.refuse("trainable", inputs, op=op)

    def test_the_last_paired_negative_lost(self, monkeypatch):
        def fault(run, x):
            return run(x._replace(paired_negatives=x.paired_negatives[:, :-1].contiguous(), paired_mask=None))

        self.plant(monkeypatch, "forward", fault)
        self.refuse("queue", with_paired(67, 33, 300, 37), op=of_paired, masked=False)

    @each_kind
    def test_a_lost_block_of_queries(self, monkeypatch, kind):
        """In the candidates' own gradient; of a queue in the query's"""
        if kind == "queue":

            def fault(run, x):
                losses, logged, dquery, *rest = run(x)
                return losses, logged, dquery.index_fill_(0, torch.arange(256, 300), 0), *rest

            self.plant(monkeypatch, "forward", fault)
        else:
            self.plant(
                monkeypatch,
                "backward",
                lambda run, grad, *rest: run(grad.clone().index_fill_(0, torch.arange(256, 300), 0), *rest),
            )
        self.refuse(kind)

    def test_a_sloppy_temperature(self, monkeypatch):
        """About 10 roundings of float32 too far: as an exp of too few terms would be."""
        self.plant(monkeypatch, "forward", lambda run, x: run(x._replace(temperature=x.temperature * (1 + 1e-5))))
        self.refuse("queue")

    def test_norms_left_out(self, monkeypatch):
        def fault(run, x):
            unit = x._replace(query=F.normalize(x.query), key=F.normalize(x.key), normalize=False)
            return run(unit)

        self.plant(monkeypatch, "forward", fault)
        self.refuse("queue")

    def test_the_pull_of_the_positive_left_out(self, monkeypatch):
        def fault(run, grad, x, stats):
            return run(grad, x, stats * torch.tensor([[1.0], [1.0], [0.0]]))

        self.plant(monkeypatch, "backward", fault)
        self.refuse("in-batch")

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "info_nce_forward", lambda *args: None)
        with oracle.poisoned_memory():
            self.refuse("queue")
