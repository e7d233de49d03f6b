import math

import pytest
import torch

import sslops
from sslops.ops.random_mask import random_token_mask

from . import oracle

each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("random_mask"))
SIZES = [(5, 196), (3, 7), (2, 1000), (1, 2500), (4, 1), (1, 64), (3, 65), (0, 5), (3, 0)]
NAN, INF = float("nan"), float("inf")


def of_mae(noise: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As MAE has it; its sort is not stable."""
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    mask = torch.ones_like(noise)
    mask[:, :keep] = 0
    return shuffle[:, :keep], mask.gather(1, restore), restore


def same(got, expected) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@each_target
@pytest.mark.parametrize(("batch", "length"), SIZES)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9999])
def test_is_mae(device, backend, batch, length, ratio):
    noise = torch.stack([torch.randperm(length) for _ in range(batch)]).float() if batch else torch.empty(0, length)
    noise = (noise / max(length, 1)).to(device)
    with oracle.poisoned_memory():
        got = sslops.random_mask(batch, length, ratio, noise=noise, backend=backend)
    same(got, of_mae(noise, int(length * (1 - ratio))))


@pytest.mark.parametrize(("length", "ratio", "keep"), [(20, 0.9, 1), (196, 0.75, 49), (10, 0.7, 3), (10, 0.95, 0)])
def test_keeps_as_many_as_mae(length, ratio, keep):
    ids_keep, mask, _ = sslops.random_mask(3, length, ratio)
    assert ids_keep.shape == (3, keep)
    assert mask.sum() == 3 * (length - keep)


@each_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ties_and_what_is_no_number(device, backend, dtype):
    """Equal ones stay in order, zeros are equal, NaN of either sign is last, behind infinity."""
    values = torch.tensor([0.5, -0.0, 0.0, NAN, -NAN, INF, -INF, 1e-7, -1e-7, -1.0, 0.25])
    noise = values[torch.randint(len(values), (7, 300))].to(device, dtype)
    got = sslops.random_mask(7, 300, 0.6, noise=noise, backend=backend)
    expected = noise.argsort(dim=1, stable=True)
    assert torch.equal(got[0], expected[:, :120])
    assert torch.equal(got[2], expected.argsort(dim=1))
    same(got, sslops.random_mask(7, 300, 0.6, noise=noise, backend="eager"))


@each_target
def test_strided_noise(device, backend):
    noise = torch.rand(300, 7, device=device)
    same(
        sslops.random_mask(7, 150, 0.6, noise=noise.t()[:, ::2], backend=backend),
        sslops.random_mask(7, 150, 0.6, noise=noise.t()[:, ::2].contiguous(), backend="eager"),
    )


@each_target
@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_one_key_one_mask(device, backend, batch, length):
    """Whatever draws it: the reference takes Philox from torch."""

    def draw(seed, backend):
        generator = torch.Generator(device).manual_seed(seed)
        return sslops.random_mask(batch, length, 0.75, generator=generator, device=device, backend=backend)

    same(draw(3, backend), draw(3, "eager"))
    if batch * length > 100:
        assert not torch.equal(draw(3, backend)[2], draw(4, backend)[2])


@pytest.mark.parametrize("length", [7, 196, 1000])
def test_every_instruction_set(isa, length):
    for noise in (torch.rand(5, length), None):
        torch.manual_seed(0)
        got = sslops.random_mask(5, length, 0.75, noise=noise, backend="cpu")
        torch.manual_seed(0)
        same(got, sslops.random_mask(5, length, 0.75, noise=noise, backend="eager"))


@each_target
def test_seeds(device, backend):
    def draw():
        return sslops.random_mask(4, 50, 0.5, device=device, backend=backend)[2]

    torch.manual_seed(1)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert torch.equal(second, draw())


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    drawn = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        drawn.append(sslops.random_mask(999, 196, 0.75, generator=torch.Generator().manual_seed(0)))
    torch.set_num_threads(before)
    same(drawn[0], drawn[1])
    same(drawn[0], drawn[2])


def lightly_mask(noise: torch.Tensor, ratio: float, mask_class_token: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """lightly.models.utils.random_token_mask, its noise given"""
    keep = int((noise.shape[1] - (not mask_class_token)) * (1 - ratio))
    if not mask_class_token:
        noise, keep = noise.clone(), max(1, keep + 1)
        noise[:, 0] = -1
    ids = noise.argsort(dim=1)
    return ids[:, :keep], ids[:, keep:]


@each_target
@pytest.mark.parametrize("mask_class_token", [True, False])
@pytest.mark.parametrize("length", [1, 50, 197])
def test_token_mask_is_lightly_s(device, backend, mask_class_token, length):
    noise = torch.rand(6, length, device=device)
    got = random_token_mask(6, length, 0.6, mask_class_token=mask_class_token, noise=noise, backend=backend)
    same(got, lightly_mask(noise, 0.6, mask_class_token))
    drawn = [
        random_token_mask(6, length, 0.6, mask_class_token=mask_class_token, backend=b, device=device,
                          generator=torch.Generator(device).manual_seed(5))
        for b in (backend, "eager")
    ]  # fmt: skip
    same(*drawn)
    assert mask_class_token or (drawn[0][0][:, 0] == 0).all()


# Uniformity, over a million rows.

ROWS, LENGTH, KEEP = 1_000_000, 12, 3


def deviations(mask: torch.Tensor) -> tuple[float, float, float]:
    """The largest deviation, in standard deviations, of how often a token is kept, of how often two of a row are, and
    of how often two of rows that follow each other are."""
    kept = 1 - mask
    one, both = KEEP / LENGTH, KEEP * (KEEP - 1) / (LENGTH * (LENGTH - 1))

    def largest(counts: torch.Tensor, p: float, n: int) -> float:
        return float((counts.double() - n * p).abs().max() / math.sqrt(n * p * (1 - p)))

    together = kept.t() @ kept
    return (
        largest(together.diagonal(), one, len(mask)),
        largest(together[~torch.eye(LENGTH, dtype=torch.bool, device=mask.device)], both, len(mask)),
        largest(kept[:-1].t() @ kept[1:], one * one, len(mask) - 1),
    )


@each_target
def test_uniform_and_independent(device, backend):
    generator = torch.Generator(device).manual_seed(0)
    _, mask, _ = sslops.random_mask(ROWS, LENGTH, 0.75, generator=generator, device=device, backend=backend)
    assert max(deviations(mask)) < 4.5


def coarse() -> torch.Tensor:
    """Noise of 6 bits: ties prefer those in front"""
    return torch.rand(ROWS, LENGTH).mul(64).floor()


def paired() -> torch.Tensor:
    """Each token is kept as often, but the first two together too often"""
    noise = torch.rand(ROWS, LENGTH)
    noise[:, 1] = torch.where(torch.rand(ROWS) < 0.02, noise[:, 0] + 1e-6, noise[:, 1])
    return noise


def overlapping() -> torch.Tensor:
    """A row's last four numbers are the next one's first"""
    return torch.rand(ROWS * (LENGTH - 4) + 4).unfold(0, LENGTH, LENGTH - 4)


@pytest.mark.parametrize(("noise", "found_by"), [(coarse, 0), (paired, 1), (overlapping, 2)])
def test_a_biased_generator_is_found(noise, found_by):
    _, mask, _ = sslops.random_mask(ROWS, LENGTH, 0.75, noise=noise())
    assert deviations(mask)[found_by] > 6


@each_target
def test_opcheck(device, backend):
    for source in (torch.rand(3, 10, device=device), torch.tensor(5, device=device)):
        torch.library.opcheck(
            torch.ops.sslops.random_mask.default, (source, 3, 10, 4, 1, None, None, 0, 1, 1, True, backend)
        )


@each_target
def test_compiles_for_every_batch(device, backend):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs)
    def drawn(x):
        return sslops.random_mask(x.shape[0], x.shape[1], 0.75, device=x.device, backend=backend)

    for batch in (4, 7, 9, 12):
        x = torch.empty(batch, 50, device=device)
        torch.manual_seed(batch)
        got = drawn(x)
        torch.manual_seed(batch)
        same(got, sslops.random_mask(batch, 50, 0.75, device=device, backend=backend))
    assert graphs.frame_count <= 2


def test_inductor_draws_masks():
    drawn = torch.compile(lambda x: sslops.random_mask(x.shape[0], 50, 0.5, device=x.device), fullgraph=True)
    _, mask, ids_restore = drawn(torch.empty(8))
    assert torch.equal(ids_restore.sort(dim=1).values, torch.arange(50).expand(8, 50))
    assert torch.equal(mask, (ids_restore >= 25).float())


def test_bad_input():
    noise = torch.rand(4, 9)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "random_mask", argument, lambda: sslops.random_mask(*args, **kwargs))

    for ratio in (-0.1, 1.0, 1.5, NAN):
        refused(ValueError, "mask_ratio", 4, 9, ratio)
    refused(TypeError, "mask_ratio", 4, 9, "most")
    refused(TypeError, "batch", 4.0, 9, 0.5)
    refused(ValueError, "length", 4, -9, 0.5)
    refused(ValueError, "noise", 4, 8, 0.5, noise=noise)
    refused(ValueError, "noise", 4, 9, 0.5, noise=noise[0])
    refused(TypeError, "noise", 4, 9, 0.5, noise=noise.int())
    refused(ValueError, "noise", 4, 9, 0.5, noise=noise, device="meta")
    refused(ValueError, "generator", 4, 9, 0.5, noise=noise, generator=torch.Generator())
    refused(TypeError, "generator", 4, 9, 0.5, generator=7)
    for device in ("nonsense", 3.5, 10**30, "cpu:x", "hip:9999"):
        refused(ValueError, "device", 4, 9, 0.5, device=device)
        refused(ValueError, "device", 4, 9, 0.5, noise=noise, device=device)
    refused(ValueError, "backend", 4, 9, 0.5, backend="tpu")

    def masking(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "random_masking", argument, lambda: sslops.random_masking(*args, **kwargs))

    tokens = torch.randn(4, 9, 3)
    masking(TypeError, "tokens", None, 0.5)
    masking(ValueError, "mask_ratio", tokens, 1.0)
    masking(TypeError, "mask_ratio", tokens, "most")
    masking(ValueError, "noise", tokens, 0.5, noise=noise[1:])
    masking(TypeError, "noise", tokens, 0.5, noise=[0.5])
    masking(TypeError, "generator", tokens, 0.5, generator=7)
    masking(ValueError, "backend", tokens, 0.5, backend="tpu")
    masking(TypeError, "backend", tokens, 0.5, backend=7)
    oracle.assert_refused(TypeError, "random_token_mask", "mask_class_token",
                          lambda: random_token_mask(4, 9, 0.5, mask_class_token=1))  # fmt: skip


def test_bad_input_to_the_registered_op():
    for noise, keep, prefix in [
        (torch.tensor(0.5), 4, 0),
        (torch.rand(4, 8), 4, 0),
        (torch.tensor(5), 10, 0),
        (torch.tensor(5), 4, 10),
        (torch.tensor(5), -1, 0),
    ]:
        with pytest.raises((ValueError, TypeError), match="random_mask: "):
            torch.ops.sslops.random_mask(noise, 4, 9, keep, prefix, None, None, 0, 1, 1, True, "cpu")


def expected_of(noise, lengths, counts, keep):
    """Row by row, in plain Python"""
    rows = []
    for values, tokens, count in zip(noise.tolist(), lengths.tolist(), counts.tolist(), strict=True):
        order = sorted(range(tokens), key=lambda j, values=values: values[j]) + list(range(tokens, len(values)))
        mask = [0.0] * len(values)
        for j in order[count:tokens]:
            mask[j] = 1.0
        restore = [order.index(j) for j in range(len(values))]
        rows.append((order[:count] + [0] * (keep - count), mask, restore))
    ids_keep, masks, restores = zip(*rows, strict=True)
    return torch.tensor(ids_keep, dtype=torch.int64), torch.tensor(masks), torch.tensor(restores)


@each_target
@pytest.mark.parametrize(("length", "options"), [(50, {}), (50, {"min_keep": 4, "max_keep": 9}), (1, {}), (300, {})])
@pytest.mark.parametrize("ratio", [0.75, 0.0, "tensor"])
def test_lengths_and_ratios(device, backend, length, options, ratio):
    """Padding is neither kept nor masked, whatever its noise; every row keeps as many as its share says"""
    lengths = torch.tensor([length, 0, length // 2, 1])
    ratios = torch.tensor([0.75, 0.5, 0.1, 0.9]) if ratio == "tensor" else torch.full((4,), ratio, dtype=torch.double)
    noise = torch.stack([torch.randperm(length) for _ in lengths]).float()
    noise[:, length // 2 :] -= 1000  # it would come first
    counts = [int(n * (1 - r)) for n, r in zip(lengths.tolist(), ratios.tolist(), strict=True)]
    most = options.get("max_keep", length if ratio == "tensor" else int(length * (1 - ratio)))
    counts = torch.tensor([min(n, max(options.get("min_keep", 0), min(most, c)))
                           for n, c in zip(lengths.tolist(), counts, strict=True)])  # fmt: skip
    with oracle.poisoned_memory():
        *got, found = sslops.random_mask(
            4, length, ratios.to(device) if ratio == "tensor" else ratio, lengths=lengths.int().to(device),
            noise=noise.to(device), backend=backend, **options,
        )  # fmt: skip
    assert torch.equal(found.cpu(), counts)
    same([each.cpu() for each in got], expected_of(noise, lengths, counts, most))
    if ratio == "tensor":
        *got, found = sslops.random_mask(4, length, ratios.to(device), noise=noise.to(device), backend=backend)
        counts = torch.tensor([int(length * (1 - r)) for r in ratios.tolist()])
        assert torch.equal(found.cpu(), counts)
        whole = torch.full((4,), length)
        same([each.cpu() for each in got], expected_of(noise, whole, counts, length))


@each_target
def test_padded_masks_are_one_key_s(device, backend):
    lengths, ratios = torch.tensor([196, 0, 1, 60, 150], device=device), torch.rand(5, device=device)
    for ratio, options in ((0.75, {"lengths": lengths}), (ratios, {"lengths": lengths}), (ratios, {})):
        drawn = [sslops.random_mask(5, 196, ratio, generator=torch.Generator(device).manual_seed(2), device=device,
                                    backend=each, **options) for each in (backend, "eager")]  # fmt: skip
        same(*drawn)
    # All tokens of all rows: what it is without lengths.
    plain, full = (sslops.random_mask(5, 196, 0.75, generator=torch.Generator(device).manual_seed(2), backend=backend,
                                      device=device, **options)
                   for options in ({}, {"lengths": torch.full_like(lengths, 196)}))  # fmt: skip
    same(plain, full[:3])


def test_ratios_out_of_range_and_limits_of_plain_masks():
    ratios = torch.tensor([NAN, -3.0, 7.0, INF, -INF, 1.0])
    *_, counts = sslops.random_mask(6, 20, ratios, min_keep=2)
    assert counts.tolist() == [2, 20, 2, 2, 20, 2]
    ids_keep, mask, _ = sslops.random_mask(3, 20, 0.5, max_keep=4)
    assert ids_keep.shape == (3, 4)
    assert mask.sum() == 3 * 16
    assert sslops.random_mask(3, 20, 0.99, min_keep=4)[0].shape == (3, 4)


@each_target
def test_an_encoder_of_padded_rows(device, backend):
    """Masked, gathered and put back: what was seen is in its place, all else is the mask token"""
    lengths = torch.tensor([40, 7, 0], device=device)
    tokens = torch.randn(3, 40, 8, device=device, requires_grad=True)
    ids, mask, ids_restore, counts = sslops.random_mask(3, 40, 0.5, lengths=lengths, backend=backend)
    seen = sslops.gather_tokens(tokens, ids, counts=counts, unique=True, backend=backend)
    restored = sslops.restore_tokens(seen, torch.zeros(8, device=device), ids_restore, counts=counts, backend=backend)
    there = torch.arange(40, device=device) < lengths[:, None]
    kept = (there & (mask == 0))[..., None]
    assert torch.equal(kept.sum((1, 2)), counts)
    assert torch.equal(restored, tokens * kept)
    (gradient,) = torch.autograd.grad(restored.sum(), tokens)
    assert torch.equal(gradient, kept.expand_as(tokens).float())


@each_target
@pytest.mark.parametrize(("grid", "ratio"), [((8, 14, 14), 0.9), ((3, 2, 5), 0.5), ((1, 3, 3), 0.0), ((0, 2, 2), 0.5)])
def test_tubes(device, backend, grid, ratio):
    """The same in every frame, as many as VideoMAE masks; put back, each token is where it was"""
    frames, height, width = grid
    size, length = height * width, frames * height * width
    ids, mask, ids_restore = sslops.tube_mask(5, grid, ratio, device=device, backend=backend)
    by_frame = mask.view(5, frames, size)
    assert torch.equal(by_frame, by_frame[:, :1].expand_as(by_frame))
    assert (by_frame.sum(2) == int(size * ratio)).all()
    assert torch.equal(ids.sort(1).values, (1 - mask).nonzero()[:, 1].view(5, -1))
    assert torch.equal(ids_restore.sort(1).values, torch.arange(length, device=device).expand(5, -1))
    tokens = torch.randn(5, length, 3, device=device)
    seen = sslops.gather_tokens(tokens, ids, unique=True)
    restored = sslops.restore_tokens(seen, torch.zeros(3, device=device), ids_restore)
    assert torch.equal(restored, tokens * (1 - mask)[..., None])
    noise = torch.rand(5, size, device=device)
    drawn = [sslops.tube_mask(5, grid, ratio, noise=noise, backend=each) for each in (backend, "eager")]
    same(*drawn)
    if frames:
        plain = sslops.random_mask(5, size, 0.0, noise=noise)[0][:, : size - int(size * ratio)]
        assert torch.equal(drawn[0][0][:, : plain.shape[1]], plain)


BLOCKS = [
    ((14, 14), 0.8, {}),
    ((14, 14), 0.6, {"inverse": False}),
    ((3, 17), 0.5, {"block_size": 4}),
    ((90,), 0.5, {"block_size": 5, "adjust": 0.05, "inverse": False}),
    ((5, 5), 0.5, {"adjust": -0.5}),
]


@each_target
@pytest.mark.parametrize(("grid", "ratio", "options"), BLOCKS)
def test_blocks(device, backend, grid, ratio, options):
    length = math.prod(grid)
    drawn = [sslops.block_mask(33, grid, ratio, generator=torch.Generator(device).manual_seed(1), device=device,
                               backend=each, **options) for each in (backend, "eager")]  # fmt: skip
    same(*drawn)
    ids, mask, ids_restore = drawn[0]
    masked = int(length * ratio) if options.get("inverse") is False else length - int(length * (1 - ratio))
    assert (mask.sum(1) == masked).all()
    assert torch.equal(ids.sort(1).values, (1 - mask).nonzero()[:, 1].view(33, -1))
    assert torch.equal(ids_restore.gather(1, ids), torch.arange(length - masked, device=device).expand(33, -1))


def data2vec(height: int, width: int, share: float, size: int, adjust: float) -> torch.Tensor:
    """[H, W] bool: one mask as the paper has it, square by square"""
    mask, length = torch.zeros(height, width, dtype=torch.bool), height * width
    for _ in range(int(length * (share + adjust) / size**2)):
        row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
        top, left = row - size // 2, column - size // 2
        mask[max(top, 0) : top + size, max(left, 0) : left + size] = True
    flat, wanted = mask.flatten(), int(length * share)
    for value, surplus in ((True, int(flat.sum()) - wanted), (False, wanted - int(flat.sum()))):
        if surplus > 0:
            of = (flat == value).nonzero().flatten()
            flat[of[torch.randperm(len(of))[:surplus]]] = not value
    return mask


def neighbours(kept: torch.Tensor) -> torch.Tensor:
    """[B, 4]: pairs kept side by side, pairs above one another, pairs three apart, and tokens kept at the edges"""
    kept = kept.double()
    edge = kept.clone()
    edge[:, 1:-1, 1:-1] = 0
    pairs = kept[:, :, 1:] * kept[:, :, :-1], kept[:, 1:] * kept[:, :-1], kept[:, :, 3:] * kept[:, :, :-3], edge
    return torch.stack([each.sum((1, 2)) for each in pairs], 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the means, in standard deviations"""
    return float(((a.mean(0) - b.mean(0)).abs() / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()).max())


@each_target
def test_blocks_are_data2vec_s(device, backend):
    torch.manual_seed(0)
    theirs = neighbours(torch.stack([data2vec(14, 14, 0.2, 3, 0.07) for _ in range(2000)]))

    def ours(**options):
        return neighbours(sslops.block_mask(20_000, (14, 14), 0.8, device=device, backend=backend, **options)[1].view(
            -1, 14, 14).cpu() == 0)  # fmt: skip

    assert difference(ours(), theirs) < 4.5
    for options in ({"block_size": 2}, {"adjust": 0.0}, {"inverse": False}):
        assert difference(ours(**options), theirs) > 9


def test_bad_masks():
    def refused(op, error, argument, *args, **kwargs):
        oracle.assert_refused(error, op.__name__, argument, lambda: op(*args, **kwargs))

    lengths, ratios = torch.tensor([3, 9, 0, 1]), torch.rand(4)
    random, tube, block = sslops.random_mask, sslops.tube_mask, sslops.block_mask
    refused(random, TypeError, "lengths", 4, 9, 0.5, lengths=[3, 9, 0, 1])
    refused(random, TypeError, "lengths", 4, 9, 0.5, lengths=lengths.float())
    refused(random, ValueError, "lengths", 4, 9, 0.5, lengths=lengths[1:])
    refused(random, ValueError, "lengths[1]", 4, 8, 0.5, lengths=lengths)
    refused(random, ValueError, "lengths[2]", 4, 9, 0.5, lengths=lengths - 1)
    refused(random, ValueError, "lengths", 4, 9, ratios, lengths=lengths.to("meta"))
    refused(random, TypeError, "mask_ratio", 4, 9, ratios.long())
    refused(random, ValueError, "mask_ratio", 4, 9, ratios[:3])
    refused(random, TypeError, "min_keep", 4, 9, 0.5, min_keep=1.0)
    refused(random, ValueError, "min_keep", 4, 9, 0.5, min_keep=10)
    refused(random, ValueError, "max_keep", 4, 9, 0.5, min_keep=3, max_keep=2)
    refused(random, ValueError, "max_keep", 4, 9, 0.5, max_keep=10)
    refused(tube, ValueError, "grid", 4, (3, 3), 0.5)
    refused(tube, TypeError, "grid", 4, 9, 0.5)
    refused(tube, ValueError, "grid[0]", 4, (-1, 3, 3), 0.5)
    refused(tube, ValueError, "mask_ratio", 4, (2, 3, 3), 1.0)
    refused(tube, ValueError, "noise", 4, (2, 3, 3), 0.5, noise=torch.rand(4, 18))
    refused(tube, ValueError, "backend", 4, (2, 3, 3), 0.5, backend="tpu")
    refused(block, ValueError, "grid", 4, (3, 3, 3), 0.5)
    refused(block, ValueError, "mask_ratio", 4, (3, 3), -0.5)
    refused(block, ValueError, "block_size", 4, (3, 3), 0.5, block_size=0)
    refused(block, ValueError, "adjust", 4, (3, 3), 0.5, adjust=NAN)
    refused(block, TypeError, "inverse", 4, (3, 3), 0.5, inverse=1)
    refused(block, TypeError, "generator", 4, (3, 3), 0.5, generator=7)
    for blocks, size, width in ((-1, 1, 1), (2, 0, 1), (2, 1, 2), (2, 1, 0)):
        with pytest.raises(ValueError, match="random_mask: "):
            torch.ops.sslops.random_mask(torch.tensor(5), 4, 9, 3, 0, None, None, blocks, size, width, True, "cpu")
    with pytest.raises(ValueError, match="random_mask: blocks"):
        torch.ops.sslops.random_mask(torch.rand(4, 9), 4, 9, 3, 0, None, None, 2, 3, 3, True, "cpu")
    with pytest.raises(ValueError, match=r"random_mask: counts\[1\]"):
        torch.ops.sslops.random_mask(torch.rand(4, 9), 4, 9, 3, 0, None, lengths, 0, 1, 1, True, "cpu")
