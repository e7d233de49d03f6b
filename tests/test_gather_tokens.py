import pytest
import torch

import sslops

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("gather_tokens"))
SIZES = [
    (3, 196, 49, 64),
    (2, 7, 7, 33),
    (1, 50, 1, 1),
    (4, 5, 40, 130),
    (2, 300, 150, 768),
    (0, 4, 2, 8),
    (2, 4, 0, 8),
]
SIZES += [(2, 4, 2, 0)]


def case(b: int, length: int, k: int, d: int, *, dtype=torch.float32, device="cpu", unique=False):
    g = torch.Generator().manual_seed(b * 1000 + length)
    tokens = torch.randn(b, length, d, generator=g).to(device, dtype)
    if unique:
        ids = torch.rand(b, length, generator=g).argsort(dim=1)[:, :k].contiguous()
    else:
        ids = torch.randint(length, (b, k), generator=g)
    return tokens, ids.to(device)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize(("b", "length", "k", "d"), SIZES)
def test_accuracy(device, backend, dtype, unique, b, length, k, d):
    if unique and k > length:
        pytest.skip("no such ids")
    tokens, ids = case(b, length, k, d, dtype=dtype, device=device, unique=unique)
    with oracle.poisoned_memory():
        oracle.check(sslops.gather_tokens, {"tokens": tokens}, backend, ids=ids, unique=unique)
        assert torch.equal(sslops.gather_tokens(tokens, ids, unique=unique, backend=backend), tokens.gather(
            1, ids[..., None].expand(-1, -1, d)))  # fmt: skip


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_for_all(device, backend, dtype):
    tokens, ids = case(2, 9, 500, 40, dtype=dtype, device=device)
    oracle.check(sslops.gather_tokens, {"tokens": tokens}, backend, ids=torch.full_like(ids, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    tokens, ids = case(3, 20, 37, 70, dtype=dtype)
    oracle.check(sslops.gather_tokens, {"tokens": tokens}, "cpu", ids=ids)


@each_target
def test_strided(device, backend):
    tokens, ids = case(3, 40, 20, 48, device=device)
    wide = torch.randn(6, 41, 96, device=device)
    for strided in (wide[::2, 1:, :48], wide[:3, 1:, ::2], tokens.transpose(0, 1).contiguous().transpose(0, 1)):
        oracle.check(sslops.gather_tokens, {"tokens": strided}, backend, ids=ids.t().contiguous().t())
    expanded = tokens[:, :1].expand(-1, 40, -1)
    assert torch.equal(sslops.gather_tokens(expanded, ids, backend=backend), expanded[:, :20])


@each_target
def test_int32_ids(device, backend):
    tokens, ids = case(3, 9, 5, 8, device=device)
    for chosen in (backend, "eager"):
        got, expected = (oracle.evaluate(sslops.gather_tokens, [tokens], chosen, ids=i) for i in (ids.int(), ids))
        assert all(map(torch.equal, got, expected))


@each_target
def test_same_bits_every_run_and_for_all_threads(device, backend):
    tokens, ids = case(4, 30, 600, 100, device=device)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        runs.append(oracle.evaluate(sslops.gather_tokens, [tokens], backend, ids=ids))
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@each_target
@pytest.mark.parametrize("unique", [True, False])
def test_opcheck(device, backend, unique):
    tokens, ids = case(2, 7, 5, 8, device=device, unique=True)
    arguments = (tokens.requires_grad_(), ids, None, unique, backend)
    torch.library.opcheck(torch.ops.sslops.gather_tokens.default, arguments)
    grad = torch.randn(2, 5, 8, device=device)
    torch.library.opcheck(torch.ops.sslops.gather_tokens_backward.default, (grad, tokens.detach(), *arguments[1:]))


@each_target
def test_compile_and_second_derivative(device, backend):
    tokens, ids = case(16, 10, 6, 8, device=device)
    oracle.assert_compiles(lambda x: sslops.gather_tokens(x * 2, ids[: len(x)], backend=backend), tokens)
    out = sslops.gather_tokens(tokens.requires_grad_(), ids, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


def test_reference_compiles_and_has_a_second_derivative():
    tokens, ids = case(4, 10, 6, 8)
    torch.compile(lambda x: sslops.gather_tokens(x, ids, backend="eager"), fullgraph=True, backend="aot_eager")(tokens)
    x = tokens.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: sslops.gather_tokens(x, ids), x)


def test_ids_out_of_range_are_refused_by_position():
    tokens, ids = case(3, 7, 5, 8)
    for value in (7, -1, 2**40):
        bad = ids.clone()
        bad[1, 3] = value
        for backend in ("cpu", "eager"):
            oracle.assert_refused(
                ValueError,
                "gather_tokens",
                "ids[1, 3]",
                lambda b=backend, i=bad: sslops.gather_tokens(tokens, i, backend=b),
            )
        with pytest.raises(ValueError, match=r"gather_tokens: ids\[1, 3\]"):
            torch.ops.sslops.gather_tokens_backward(torch.ones(3, 5, 8), tokens, bad, None, False, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("unique", [True, False])
def test_ids_out_of_range_on_a_gpu(unique):
    tokens, ids = case(3, 7, 5, 8, device="cuda", unique=True)
    tokens.requires_grad_()
    ids[1, 3], ids[2, 0] = 2**40, -1
    out = sslops.gather_tokens(tokens, ids, unique=unique)
    assert torch.equal(out.isnan().all(dim=2), (ids < 0) | (ids >= 7))
    (gradient,) = torch.autograd.grad(out, tokens, torch.ones_like(out))
    assert gradient.sum() == 8 * (15 - 2)


def test_bad_input():
    tokens, ids = case(3, 7, 5, 8)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "gather_tokens", argument, lambda: sslops.gather_tokens(*args, **kwargs))

    refused(TypeError, "tokens", [1.0], ids)
    refused(TypeError, "tokens", tokens.int(), ids)
    refused(ValueError, "tokens", tokens[0], ids)
    refused(TypeError, "ids", tokens, ids.short())
    refused(ValueError, "ids", tokens, ids[0])
    refused(ValueError, "ids", tokens, ids[:2])
    refused(ValueError, "ids", tokens, ids.to("meta"))
    refused(TypeError, "unique", tokens, ids, unique=1)
    refused(ValueError, "backend", tokens, ids, backend="tpu")
    with pytest.raises(ValueError, match="gather_tokens: grad"):
        torch.ops.sslops.gather_tokens_backward(torch.ones(3, 4, 8), tokens, ids, None, False, "cpu")


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize(("b", "length", "k", "d"), [(3, 40, 20, 33), (4, 5, 40, 130), (3, 0, 4, 8), (2, 4, 2, 0)])
def test_counts(device, backend, dtype, unique, b, length, k, d):
    """Behind them ids are not looked at: zeros, whose gradient goes nowhere, NaN or not"""
    if unique and k > length:
        unique = False
    tokens, ids = case(b, max(length, 1), k, d, dtype=dtype, device=device, unique=unique)
    tokens = tokens[:, :length]
    counts = torch.tensor([k if length else 0, 0, k // 2 if length else 0, 1][:b], device=device)
    behind = torch.arange(k, device=device) >= counts[:, None]
    ids[behind] = torch.randint(-3, 2**40, ids.shape, device=device)[behind]
    with oracle.poisoned_memory():
        oracle.check(sslops.gather_tokens, {"tokens": tokens}, backend, ids=ids, counts=counts, unique=unique)
        leaf = tokens.clone().requires_grad_()
        out = sslops.gather_tokens(leaf, ids, counts=counts.int(), unique=unique, backend=backend)
        assert torch.equal(out.isnan().any(2), torch.zeros_like(behind))
        assert not out[behind].any()
        (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out).masked_fill(behind[..., None], torch.nan))
    assert torch.equal(gradient.float().sum((1, 2)).long(), counts * d)


@each_target
def test_counts_on_a_gpu_are_taken_as_the_nearest(device, backend):
    tokens, ids = case(3, 9, 5, 8, device=device)
    counts = torch.tensor([-7, 99, 2], device=device)
    if device == "cpu":
        oracle.assert_refused(ValueError, "gather_tokens", "counts[0]",
                              lambda: sslops.gather_tokens(tokens, ids, counts=counts, backend=backend))  # fmt: skip
    else:
        found = sslops.gather_tokens(tokens, ids, counts=counts, backend=backend)
        assert torch.equal(found, sslops.gather_tokens(tokens, ids, counts=counts.clamp(0, 5), backend=backend))


def test_bad_counts():
    tokens, ids = case(3, 7, 5, 8)

    def refused(error, argument, counts, ids=ids):
        oracle.assert_refused(
            error, "gather_tokens", argument, lambda: sslops.gather_tokens(tokens, ids, counts=counts)
        )

    counts = torch.tensor([5, 0, 3])
    refused(TypeError, "counts", 3)
    refused(TypeError, "counts", counts.float())
    refused(ValueError, "counts", counts[:2])
    refused(ValueError, "counts", counts.to("meta"))
    refused(ValueError, "counts[0]", counts + 1)
    ids = ids.clone()
    ids[2, 3] = ids[0, 4] = -1  # only one is behind its count
    refused(ValueError, "ids[0, 4]", counts, ids)
