import math

import pytest
import torch
import torch.nn.functional as F

import sslops

from . import oracle

VOCABULARY, MASK = 30522, 103
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("random_token_corruption"))


def corrupt(ids, seed=0, **kwargs):
    generator = torch.Generator(ids.device).manual_seed(seed)
    return sslops.random_token_corruption(ids, MASK, VOCABULARY, generator=generator, **kwargs)


@each_target
@pytest.mark.parametrize("shape", [(), (0, 5), (1,), (3, 700), (2, 3, 5000)])
@pytest.mark.parametrize("special", [True, False])
def test_one_key_one_result(device, backend, shape, special):
    ids = torch.randint(VOCABULARY, shape, device=device)
    mask = ids % 3 == 0 if special else None
    with oracle.poisoned_memory():
        got = corrupt(ids, special_tokens_mask=mask, probability=0.4, backend=backend)
    expected = corrupt(ids, special_tokens_mask=mask, probability=0.4, backend="eager")
    assert all(map(torch.equal, got, expected))
    if ids.numel() > 1000:
        assert not torch.equal(got[0], corrupt(ids, 1, probability=0.4, backend=backend)[0])


def test_every_instruction_set_and_number_of_threads(isa):
    ids = torch.randint(VOCABULARY, (5, 10_001))
    before, expected = torch.get_num_threads(), corrupt(ids, backend="eager")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, corrupt(ids, backend="cpu"), expected))
    torch.set_num_threads(before)


@each_target
def test_labels_tell_what_was_there(device, backend):
    ids = torch.randint(VOCABULARY, (8, 100), device=device)
    special = torch.rand(8, 100, device=device) < 0.1
    corrupted, labels = corrupt(ids, special_tokens_mask=special, backend=backend)
    chosen = labels != -100
    assert torch.equal(torch.where(chosen, labels, corrupted), ids)
    assert not (chosen & special).any()
    logits = torch.zeros(ids.numel(), VOCABULARY, device=device)
    assert F.cross_entropy(logits, labels.flatten()).isclose(torch.tensor(float(VOCABULARY)).log())


def close(count, share, total):
    return abs(count - share * total) <= 4.5 * math.sqrt(share * (1 - share) * total)


def test_a_wrong_probability_is_not_close():
    _, labels = corrupt(torch.full((2_000_000,), -1), probability=0.152)
    assert not close((labels == -1).sum(), 0.15, 2_000_000)


@each_target
@pytest.mark.parametrize(("masked", "random"), [(0.8, 0.1), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.3, 0.7)])
def test_shares(device, backend, masked, random):
    """Over two million tokens, within 4.5 standard deviations; an id out of the vocabulary shows what was replaced."""
    n, p = 2_000_000, 0.15
    ids = torch.full((n,), -1, device=device)
    corrupted, labels = corrupt(ids, masked=masked, random=random, backend=backend, probability=p)
    chosen = (labels == -1).double()

    assert close(chosen.sum(), p, n)
    assert close(chosen[: n // 2].sum(), p, n // 2)
    assert close((chosen[1:] * chosen[:-1]).sum(), p * p, n - 1)
    taken = corrupted[labels == -1]
    by_chance = masked + random / VOCABULARY
    assert close((taken == MASK).sum(), by_chance, len(taken))
    assert close((taken == -1).sum(), max(0.0, 1 - masked - random), len(taken))
    replaced = taken[(taken >= 0) & (taken != MASK)]
    if random:
        assert replaced.max() < VOCABULARY
        counts = torch.bincount(replaced * 16 // VOCABULARY, minlength=16)
        assert all(close(count, 1 / 16, len(replaced)) for count in counts[1:])  # the mask token is in the first


@each_target
def test_extremes(device, backend):
    ids = torch.arange(1000, device=device)
    same, labels = corrupt(ids, probability=0.0, backend=backend)
    assert torch.equal(same, ids)
    assert (labels == -100).all()
    hidden, labels = corrupt(ids, probability=1.0, masked=1.0, random=0.0, backend=backend)
    assert (hidden == MASK).all()
    assert torch.equal(labels, ids)
    only, _ = sslops.random_token_corruption(ids + 5, 0, 1, probability=1.0, masked=0.0, random=1.0, backend=backend)
    assert (only == 0).all()


@each_target
def test_strided(device, backend):
    ids = torch.randint(VOCABULARY, (40, 30), device=device)
    for x in (ids.t(), ids[:, ::2]):
        results = corrupt(x, special_tokens_mask=x > 9, backend=backend)
        expected = corrupt(x.contiguous(), special_tokens_mask=(x > 9).contiguous(), backend="eager")
        assert all(map(torch.equal, results, expected))


@each_target
def test_opcheck_and_compile(device, backend):
    ids = torch.randint(VOCABULARY, (3, 7), device=device)
    for special in (None, ids > 100):
        arguments = (ids, torch.tensor(5, device=device), special, MASK, VOCABULARY, 0.15, 0.8, 0.1, backend)
        torch.library.opcheck(torch.ops.sslops.random_token_corruption.default, arguments)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def op(x):
        return sslops.random_token_corruption(x, MASK, VOCABULARY, backend=backend)

    compiled = torch.compile(op, fullgraph=True, backend=graphs)
    for batch in (4, 7, 9, 12):
        ids = torch.randint(VOCABULARY, (batch, 50), device=device)
        results = []
        for call in (compiled, op):
            torch.manual_seed(batch)
            results.append(call(ids))
        assert all(map(torch.equal, *results))
    assert graphs.frame_count <= 2


def test_bad_input():
    ids = torch.randint(VOCABULARY, (3, 7))

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(
            error, "random_token_corruption", argument, lambda: sslops.random_token_corruption(*args, **kwargs)
        )

    refused(TypeError, "ids", [1, 2], MASK, VOCABULARY)
    refused(TypeError, "ids", ids.int(), MASK, VOCABULARY)
    refused(TypeError, "mask_token_id", ids, 1.5, VOCABULARY)
    refused(ValueError, "vocab_size", ids, MASK, 0)
    refused(ValueError, "vocab_size", ids, MASK, 2**31 + 1)
    for name in ("probability", "masked", "random"):
        refused(ValueError, name, ids, MASK, VOCABULARY, **{name: 1.1})
        refused(ValueError, name, ids, MASK, VOCABULARY, **{name: float("nan")})
        refused(TypeError, name, ids, MASK, VOCABULARY, **{name: "few"})
    refused(ValueError, "random", ids, MASK, VOCABULARY, masked=0.9, random=0.2)
    refused(TypeError, "special_tokens_mask", ids, MASK, VOCABULARY, special_tokens_mask=ids)
    refused(ValueError, "special_tokens_mask", ids, MASK, VOCABULARY, special_tokens_mask=ids[0] > 1)
    refused(TypeError, "generator", ids, MASK, VOCABULARY, generator=0)
    refused(ValueError, "backend", ids, MASK, VOCABULARY, backend="tpu")
    with pytest.raises(TypeError, match="random_token_corruption: key"):
        torch.ops.sslops.random_token_corruption(ids, torch.tensor(0.5), None, 1, 9, 0.1, 0.8, 0.1, "cpu")
