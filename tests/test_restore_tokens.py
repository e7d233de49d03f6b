import pytest
import torch

import sslops

from . import oracle

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("restore_tokens"))
# B, P, K, L, D
SIZES = [(3, 1, 49, 196, 64), (2, 0, 7, 7, 33), (1, 2, 0, 5, 8), (5, 1, 1, 40, 130), (2, 3, 0, 0, 8), (0, 1, 2, 4, 8)]
SIZES += [(70, 1, 13, 50, 24), (2, 0, 0, 0, 4)]


def case(b, p, k, length, d, *, dtypes=(F32, F32, F32), device="cpu", pos=True):
    g = torch.Generator().manual_seed(b * 1000 + length)
    shapes = {"visible": (b, p + k, d), "mask_token": (1, 1, d), "pos_embed": (1, p + length, d)}
    inputs = {n: torch.randn(s, generator=g).to(device, t) for (n, s), t in zip(shapes.items(), dtypes, strict=True)}
    ids = torch.rand(b, length, generator=g).argsort(dim=1).to(device)
    if not pos:
        del inputs["pos_embed"]
    return inputs, ids


def restore(ids, p):
    """With the float inputs alone, for the oracle"""

    def op(visible, mask_token, pos_embed=None, *, backend):
        return sslops.restore_tokens(visible, mask_token, ids, pos_embed, p, backend=backend)

    return op


@each_target
@pytest.mark.parametrize("pos", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("b", "p", "k", "length", "d"), SIZES)
def test_accuracy(device, backend, dtype, pos, b, p, k, length, d):
    inputs, ids = case(b, p, k, length, d, dtypes=(dtype,) * 3, device=device, pos=pos)
    with oracle.poisoned_memory():
        oracle.check(restore(ids, p), inputs, backend)
        args = (inputs["visible"], inputs["mask_token"], ids, inputs.get("pos_embed"), p)
        got, eager = (sslops.restore_tokens(*args, backend=b) for b in (backend, "eager"))
    assert torch.equal(got, eager)


@each_target
@pytest.mark.parametrize("dtypes", [(BF16, F32, F32), (F16, F32, F32), (F32, BF16, F16), (BF16, F16, BF16)])
def test_promotes_as_torch_does(device, backend, dtypes):
    inputs, ids = case(3, 1, 5, 20, 40, dtypes=dtypes, device=device)
    oracle.check(restore(ids, 1), inputs, backend, dtype=min(dtypes, key=lambda t: -torch.finfo(t).eps))


@each_target
def test_autocast(device, backend):
    """MAE's decoder_embed gives half precision there, its mask token and positions are float32."""
    inputs, ids = case(3, 1, 5, 20, 40, dtypes=(BF16, F32, F32), device=device)
    oracle.check(restore(ids, 1), inputs, backend, dtype=BF16, context=lambda: torch.autocast(device, BF16))


def of_mae(x, mask_token, ids_restore, pos_embed):
    mask_tokens = mask_token.repeat(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], 1)
    x_ = torch.cat([x[:, 1:, :], mask_tokens], dim=1)
    x_ = torch.gather(x_, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    return torch.cat([x[:, :1, :], x_], dim=1) + pos_embed


@each_target
def test_is_mae(device, backend):
    inputs, ids = case(4, 1, 12, 49, 32, device=device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    x, token, pos = leaves
    expected = of_mae(x, token, ids, pos)
    got = sslops.restore_tokens(x, token, ids, pos, 1, backend=backend)
    assert torch.equal(got, expected)
    cotangent = torch.randn_like(got)
    gradients = [torch.autograd.grad(out, leaves, cotangent) for out in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_target
def test_undoes_random_masking(device, backend):
    tokens = torch.randn(3, 50, 16, device=device)
    visible, mask, ids_restore = sslops.random_masking(tokens, 0.6, backend=backend)
    restored = sslops.restore_tokens(visible, torch.zeros(16, device=device), ids_restore, backend=backend)
    assert torch.equal(restored, tokens * (1 - mask)[:, :, None])


@each_target
def test_ids_that_repeat(device, backend):
    inputs, ids = case(3, 1, 5, 20, 40, device=device)
    oracle.check(restore(ids % 7, 1), inputs, backend)


@each_target
@pytest.mark.parametrize("pos", [True, False])
def test_strided_and_shapes_without_ones(device, backend, pos):
    inputs, ids = case(3, 2, 5, 20, 40, device=device, pos=pos)
    wide = {n: x.repeat(1, 1, 2)[:, :, ::2].squeeze(0) for n, x in inputs.items()}
    wide["mask_token"] = wide["mask_token"].squeeze(0)
    oracle.check(restore(ids.t().contiguous().t(), 2), wide, backend)


@each_target
def test_int32_ids(device, backend):
    inputs, ids = case(3, 1, 5, 20, 40, device=device)
    for chosen in (backend, "eager"):
        got, expected = (oracle.evaluate(restore(i, 1), list(inputs.values()), chosen) for i in (ids.int(), ids))
        assert all(map(torch.equal, got, expected))


@each_target
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(device, backend, wanted):
    inputs, ids = case(3, 1, 5, 20, 40, device=device)
    every = oracle.evaluate(restore(ids, 1), list(inputs.values()), backend)[1:]
    leaves = [x.clone().requires_grad_(want) for x, want in zip(inputs.values(), wanted, strict=True)]
    out = restore(ids, 1)(*leaves, backend=backend)
    cotangent = torch.rand(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    out.backward(cotangent)
    for leaf, want, expected in zip(leaves, wanted, every, strict=True):
        assert torch.equal(leaf.grad, expected) if want else leaf.grad is None


@pytest.mark.parametrize("dtypes", [(F32,) * 3, (BF16,) * 3, (F16, F32, F32)])
def test_every_instruction_set(isa, dtypes):
    inputs, ids = case(3, 1, 9, 30, 70, dtypes=dtypes)
    oracle.check(restore(ids, 1), inputs, "cpu")


@each_target
def test_same_bits_every_run_and_for_all_threads(device, backend):
    inputs, ids = case(40, 1, 9, 30, 100, device=device)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        runs.append(oracle.evaluate(restore(ids, 1), list(inputs.values()), backend))
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@each_target
def test_positions_that_are_fixed(device, backend):
    inputs, ids = case(3, 1, 9, 30, 16, device=device)
    x, token, pos = inputs.values()
    leaves = [x.requires_grad_(), token.requires_grad_()]
    fixed = torch.autograd.grad(sslops.restore_tokens(x, token, ids, pos, 1, backend=backend).square().sum(), leaves)
    pos.requires_grad_()
    learned = torch.autograd.grad(sslops.restore_tokens(x, token, ids, pos, 1, backend=backend).square().sum(), leaves)
    assert all(map(torch.equal, fixed, learned))


@each_target
@pytest.mark.parametrize("pos", [True, False])
def test_opcheck(device, backend, pos):
    inputs, ids = case(2, 1, 3, 7, 8, device=device, pos=pos)
    x, token, *rest = (x.flatten(0, -2) if n != "visible" else x for n, x in inputs.items())
    token = token.flatten()
    position = rest[0].requires_grad_() if pos else None
    arguments = (x.requires_grad_(), token.requires_grad_(), ids, position, 1, None, backend, [True, True, pos])
    torch.library.opcheck(torch.ops.sslops.restore_tokens.default, arguments)
    detached = [y.detach() if isinstance(y, torch.Tensor) else y for y in arguments]
    grad = torch.randn(2, 8, 8, device=device)
    torch.library.opcheck(torch.ops.sslops.restore_tokens_backward.default, (grad, *detached))


@each_target
def test_compile_and_second_derivative(device, backend):
    inputs, ids = case(16, 1, 3, 7, 8, device=device)
    x, token, pos = inputs.values()

    def op(x):
        return sslops.restore_tokens(x * 2, token, ids[: len(x)], pos, 1, backend=backend)

    oracle.assert_compiles(op, x)
    (gradient,) = torch.autograd.grad(op(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


def test_gradients_of_the_reference():
    inputs, ids = case(2, 1, 3, 7, 4)
    leaves = [x.double().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: restore(ids, 1)(*x, backend=None), leaves)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_ids_out_of_range_on_a_gpu():
    inputs, ids = case(3, 1, 5, 20, 8, device="cuda")
    ids[1, 3], ids[2, 0] = 2**40, -1
    out = restore(ids, 1)(*inputs.values(), backend="cuda")
    assert torch.equal(out[:, 1:].isnan().all(dim=2), (ids < 0) | (ids >= 20))


def test_bad_input():
    inputs, ids = case(3, 1, 5, 20, 8)
    x, token, pos = inputs.values()

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "restore_tokens", argument, lambda: sslops.restore_tokens(*args, **kwargs))

    refused(ValueError, "visible", x[0], token, ids)
    refused(TypeError, "visible", x.int(), token, ids)
    refused(ValueError, "num_prefix", x, token, ids, pos, 7)
    refused(ValueError, "num_prefix", x, token, ids, pos, -1)
    refused(TypeError, "num_prefix", x, token, ids, pos, True)
    refused(TypeError, "ids_restore", x, token, ids.short(), pos, 1)
    refused(ValueError, "ids_restore", x, token, ids[:2], pos, 1)
    refused(ValueError, "ids_restore", x, token, ids[:, :4], pos, 1)
    refused(ValueError, "ids_restore", x, token, ids.to("meta"), pos, 1)
    refused(TypeError, "mask_token", x, None, ids, pos, 1)
    refused(TypeError, "mask_token", x, token.int(), ids, pos, 1)
    refused(ValueError, "mask_token", x, token[..., :7], ids, pos, 1)
    refused(ValueError, "mask_token", x, token.expand(3, 1, 8), ids, pos, 1)
    refused(ValueError, "pos_embed", x, token, ids, pos[:, 1:], 1)
    refused(TypeError, "pos_embed", x, token, ids, 1.0, 1)
    refused(ValueError, "pos_embed", x, token, ids, pos.to("meta"), 1)
    refused(ValueError, "backend", x, token, ids, pos, 1, backend="tpu")
    for value in (20, -1):
        bad = ids.clone()
        bad[2, 17] = value
        for backend in ("cpu", "eager"):
            refused(ValueError, "ids_restore[2, 17]", x, token, bad, pos, 1, backend=backend)
    with pytest.raises(ValueError, match="restore_tokens: grad"):
        torch.ops.sslops.restore_tokens_backward(
            torch.ones(3, 20, 8), x, token.flatten(), ids, pos[0], 1, None, "cpu", [True] * 3
        )
    with pytest.raises(RuntimeError, match=r"restore_tokens: backend 'cpu' cannot run here: no torch\.float64"):
        torch.ops.sslops.restore_tokens(x, token.flatten(), ids, pos[0].double(), 1, None, "cpu", [True] * 3)


@each_target
@pytest.mark.parametrize("pos", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("b", "p", "k", "length", "d"), [(3, 1, 9, 30, 33), (3, 0, 7, 7, 20), (3, 2, 0, 5, 8)])
def test_counts(device, backend, dtype, pos, b, p, k, length, d):
    """The visible tokens behind them are not there, NaN or not; their gradient is 0"""
    inputs, ids = case(b, p, k, length, d, dtypes=(dtype,) * 3, device=device, pos=pos)
    counts = torch.tensor([k, 0, k // 2], device=device)

    def op(visible, mask_token, pos_embed=None, *, backend, counts=counts):
        return sslops.restore_tokens(visible, mask_token, ids, pos_embed, p, counts=counts, backend=backend)

    with oracle.poisoned_memory():
        oracle.check(op, inputs, backend)
        behind = torch.arange(p + k, device=device) >= p + counts[:, None]
        inputs["visible"] = inputs["visible"].masked_fill(behind[..., None], torch.nan).requires_grad_()
        out = op(**inputs, backend=backend)
        assert torch.equal(out, op(**inputs, backend="eager"))
        assert not out.isnan().any()
        (gradient,) = torch.autograd.grad(out, inputs["visible"], torch.ones_like(out))
    assert torch.equal(gradient, (~behind)[..., None].expand_as(gradient).to(dtype))
    # Row by row it is what the tokens alone make.
    for row, count in enumerate(counts.tolist()):
        alone = {"visible": inputs["visible"][row : row + 1, : p + count], "mask_token": inputs["mask_token"]}
        ids_row = ids[row : row + 1]
        alone = sslops.restore_tokens(**alone, ids_restore=ids_row, pos_embed=inputs.get("pos_embed"), num_prefix=p)
        assert torch.equal(out[row], alone[0])


def test_bad_counts():
    inputs, ids = case(3, 1, 5, 20, 8)
    x, token, pos = inputs.values()

    def refused(error, argument, counts):
        oracle.assert_refused(error, "restore_tokens", argument,
                              lambda: sslops.restore_tokens(x, token, ids, pos, 1, counts=counts))  # fmt: skip

    counts = torch.tensor([5, 0, 3])
    refused(TypeError, "counts", [5, 0, 3])
    refused(TypeError, "counts", counts.bool())
    refused(ValueError, "counts", counts[:2])
    refused(ValueError, "counts[0]", counts + 1)
    refused(ValueError, "counts[1]", counts - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_result_past_the_caches(dtype):
    """A large result is stored otherwise, with the same bits"""
    b, k, length, d = 144, 64, 256, 256 * 4 // dtype.itemsize
    x, token, pos = (torch.randn(s).to(dtype) for s in ((b, k, d), (1, 1, d), (1, length, d)))
    ids = torch.rand(b, length).argsort(1)
    found = sslops.restore_tokens(x, token, ids, pos, backend="cpu")
    assert found.nbytes > 32 << 20
    parts = [sslops.restore_tokens(x[i : i + 16], token, ids[i : i + 16], pos, backend="cpu") for i in range(0, b, 16)]
    assert torch.equal(found, torch.cat(parts))
