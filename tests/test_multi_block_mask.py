import math
import random
from collections import Counter

import pytest
import torch

import sslops
from sslops.ops import multi_block_mask as home

from . import oracle

each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("multi_block_mask"))
NAN = float("nan")
HARD = {"target_scale": (0.6, 0.9), "context_scale": (0.3, 0.5)}  # contexts are drawn again, and overlap in the end
WIDE = {"target_scale": (0.0, 1.0), "aspect_ratio": (1 / 64, 64.0), "context_scale": (0.0, 1.0), "min_keep": 1}


def draw(*args, seed=3, device="cpu", **options):
    return sslops.multi_block_mask(*args, generator=torch.Generator(device).manual_seed(seed), device=device, **options)


@each_target
@pytest.mark.parametrize("options", [{}, {"targets": 0}, {"targets": 32}, HARD, WIDE])
@pytest.mark.parametrize("grid", [(14, 14), (4, 19), (7, 2)])
def test_one_key_one_mask(device, backend, grid, options):
    for batch in (0, 1, 33):
        with oracle.poisoned_memory():
            found = draw(batch, grid, device=device, backend=backend, **options)
        for ours, theirs in zip(found, draw(batch, grid, device=device, backend="eager", **options), strict=True):
            assert torch.equal(ours, theirs)
    assert batch * math.prod(grid) < 100 or not torch.equal(found[0], draw(batch, grid, seed=4, **options)[0])


def boxes(ids: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """[.., 4]: the first and the last row, the first and the last column"""
    there = torch.arange(ids.shape[-1]) < counts[..., None]
    row, column = ids // width, ids % width
    ends = [f(each.where(there, far), -1) for each in (row, column) for f, far in (
        (torch.amin, 2**40), (torch.amax, -1)
    )]  # fmt: skip
    return torch.stack(ends, -1)


@pytest.mark.parametrize("options", [{}, HARD, WIDE])
def test_what_each_mask_is(options):
    """Targets are blocks of the grid; a context is the rest of one, ascending; zeros behind both"""
    height, width, batch = 9, 12, 200
    context, counts, targets, target_counts = draw(batch, (height, width), **options)
    for ids, count in ((context, counts), (targets, target_counts)):
        slot = torch.arange(ids.shape[-1])
        there = slot < count[..., None]
        assert not ids[~there].any()
        assert (ids.diff(dim=-1) > 0)[there[..., 1:]].all()
        assert ids.max() < height * width
        assert count.max() <= ids.shape[-1]
    first, last, left, right = boxes(targets, target_counts, width).unbind(-1)
    assert torch.equal((last - first + 1) * (right - left + 1), target_counts)
    least = options.get("min_keep", 10)
    assert (counts >= least).all()
    overlaps = 0
    for b in range(batch):
        hidden = {i for t in range(4) for i in targets[t, b, : target_counts[t, b]].tolist()}
        overlaps += bool(hidden & set(context[b, : counts[b]].tolist()))
    assert (overlaps > 0) == (options is HARD)


def paper(height: int, width: int, rng: random.Random) -> tuple[list[tuple[int, ...]], set[int]]:
    """Section 3's masks of one image: four targets as (top, left, height, width), and the context"""

    def block(low: float, high: float, least: float, most: float) -> tuple[int, ...]:
        area, aspect = int(height * width * rng.uniform(low, high)), rng.uniform(least, most)
        h = min(height, math.floor(math.sqrt(area * aspect) + 0.5))
        w = min(width, math.floor(math.sqrt(area / aspect) + 0.5))
        return rng.randint(0, height - h), rng.randint(0, width - w), h, w

    def tokens(top: int, left: int, h: int, w: int) -> set[int]:
        return {r * width + c for r in range(top, top + h) for c in range(left, left + w)}

    targets = [block(0.15, 0.2, 0.75, 1.5) for _ in range(4)]
    hidden = set().union(*(tokens(*target) for target in targets))
    while len(context := tokens(*block(0.85, 1.0, 1.0, 1.0)) - hidden) < 40:  # so many that some are drawn again
        pass
    return targets, context


def chi(ours: Counter, theirs: Counter) -> tuple[float, int]:
    """Of two samples of equal size: the statistic, and how many kinds there are beyond one"""
    kinds = [k for k in ours | theirs if ours[k] + theirs[k] >= 20]
    return sum((ours[k] - theirs[k]) ** 2 / (ours[k] + theirs[k]) for k in kinds), len(kinds) - 1


def statistics(count: int, backend: str, device: str, **options) -> list[Counter]:
    """Of targets the shapes and the places in each direction; of contexts the numbers and who is in them"""
    ids, counts, targets, target_counts = (
        each.cpu() for each in draw(count, (14, 14), min_keep=40, device=device, backend=backend, **options)
    )
    first, last, left, right = boxes(targets[0], target_counts[0], 14).unbind(-1)
    there = torch.arange(ids.shape[1]) < counts[:, None]
    return [
        Counter(zip((last - first + 1).tolist(), (right - left + 1).tolist(), strict=True)),
        Counter(zip((last - first).tolist(), first.tolist(), strict=True)),
        Counter(zip((right - left).tolist(), left.tolist(), strict=True)),
        Counter((counts // 4).tolist()),
        Counter(ids.gather(1, (torch.rand(count, 1) * counts[:, None]).long()).flatten().tolist())
        if there.any() else Counter(),
    ]  # fmt: skip


def theirs(count: int) -> list[Counter]:
    rng, found = random.Random(0), [Counter() for _ in range(5)]
    for _ in range(count):
        targets, context = paper(14, 14, rng)
        top, left, h, w = targets[0]
        drawn = (h, w), (h - 1, top), (w - 1, left), len(context) // 4, rng.choice(sorted(context))
        for counter, value in zip(found, drawn, strict=True):
            counter[value] += 1
    return found


def excess(ours: list[Counter], expected: list[Counter]) -> float:
    """The largest of the statistics, in deviations of a chi-square with as many degrees of freedom above its mean"""
    return max((value - n) / math.sqrt(2 * n) for value, n in map(chi, ours, expected))


@each_target
def test_the_paper_s_distribution(device, backend):
    """Five statistics within six deviations: a chi-square of 10 degrees is above them in one of 6,000 draws"""
    expected = theirs(5000)
    torch.manual_seed(0)
    assert excess(statistics(5000, backend, device), expected) < 6
    # Other scales and ratios are found.
    for options in ({"target_scale": (0.15, 0.22)}, {"aspect_ratio": (0.75, 1.4)}, {"context_scale": (0.7, 1.0)}):
        assert excess(statistics(5000, backend, device, **options), expected) > 12


def test_sizes_are_the_most_that_the_scales_allow():
    """Over all areas and many aspects: no block is larger, and one is as large"""
    for height, width, scale, aspect in [(14, 14, (0.15, 0.2), (0.75, 1.5)), (5, 40, (0.1, 0.9), (0.2, 3.0))]:
        x = home.Arguments(torch.tensor(0), 1, height, width, 1, list(scale), list(aspect), [1.0, 1.0], 0)
        words = torch.randint(2**32, (200_000, 4), generator=torch.Generator().manual_seed(0))
        words[::2, 0] = 2**32 - 1
        blocks = home.blocks_of(x, *x.ranges[:2], words)
        assert int((blocks.height * blocks.width).max()) == x.most


def test_every_instruction_set(isa):
    for ours, theirs in zip(draw(20, (9, 12), backend="cpu"), draw(20, (9, 12), backend="eager"), strict=True):
        assert torch.equal(ours, theirs)


@each_target
def test_trains_on_them(device, backend):
    """What the docstring says: tokens of the context and of each target, and the loss of those that are there"""
    tokens = torch.arange(196.0, device=device).repeat(3, 1)[..., None].requires_grad_()
    ids, counts, targets, target_counts = draw(3, (14, 14), device=device, backend=backend)
    seen = sslops.gather_tokens(tokens, ids, counts=counts, unique=True, backend=backend)
    assert torch.equal(seen[..., 0].long(), ids)
    seen.sum().backward()
    assert torch.equal(tokens.grad.sum((1, 2)).long(), counts)
    for each, count in zip(targets, target_counts, strict=True):
        wanted = sslops.gather_tokens(tokens.detach(), each, counts=count, backend=backend)
        mask = torch.arange(each.shape[1], device=device) < count[:, None]
        loss = sslops.masked_prediction(wanted + 1, wanted, mask, loss="l1", backend=backend)
        torch.testing.assert_close(loss, torch.ones_like(loss))


def test_bad_input():
    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "multi_block_mask", argument, lambda: sslops.multi_block_mask(*args, **kwargs))

    refused(TypeError, "batch", 4.0, (3, 3), min_keep=1)
    refused(ValueError, "batch", -1, (3, 3), min_keep=1)
    refused(TypeError, "grid", 4, 9)
    refused(ValueError, "grid", 4, (9,))
    refused(TypeError, "grid[1]", 4, (9, 1.0))
    refused(ValueError, "width", 4, (9, 0))
    refused(ValueError, "targets", 4, (9, 9), targets=33)
    refused(TypeError, "target_scale", 4, (9, 9), target_scale=0.2)
    refused(TypeError, "target_scale[0]", 4, (9, 9), target_scale=("a", 0.2))
    refused(ValueError, "target_scale", 4, (9, 9), target_scale=(0.2, 0.1))
    refused(ValueError, "target_scale", 4, (9, 9), target_scale=(0.2,))
    refused(ValueError, "context_scale", 4, (9, 9), context_scale=(0.8, 1.1))
    refused(ValueError, "aspect_ratio", 4, (9, 9), aspect_ratio=(0.0, 1.0))
    refused(ValueError, "aspect_ratio[1]", 4, (9, 9), aspect_ratio=(0.5, NAN))
    refused(ValueError, "min_keep", 4, (3, 3))
    refused(TypeError, "generator", 4, (9, 9), generator=7)
    refused(ValueError, "device", 4, (9, 9), device="nonsense")
    refused(ValueError, "backend", 4, (9, 9), backend="tpu")
    for scale in ([0.1], [0.1, 2.0]):
        with pytest.raises(ValueError, match="multi_block_mask: target_scale"):
            torch.ops.sslops.multi_block_mask(torch.tensor(3), 2, 9, 9, 4, scale, [1.0, 1.0], [0.9, 1.0], 1, "cpu")
