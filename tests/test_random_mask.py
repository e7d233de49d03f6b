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
        torch.library.opcheck(torch.ops.sslops.random_mask.default, (source, 3, 10, 4, 1, backend))


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
            torch.ops.sslops.random_mask(noise, 4, 9, keep, prefix, "cpu")
