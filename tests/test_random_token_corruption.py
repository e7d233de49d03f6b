import math

import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops.ops.random_token_corruption import Arguments

from . import oracle

VOCABULARY, MASK = 30522, 103
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("random_token_corruption"))


def corrupt(ids, seed=0, **kwargs):
    generator = torch.Generator(ids.device).manual_seed(seed)
    return sslops.random_token_corruption(ids, MASK, VOCABULARY, generator=generator, **kwargs)


SPECIAL_IDS = [0, *range(100, 104), 20000, VOCABULARY - 1, VOCABULARY + 3]
SPANS = [0.8**k for k in range(10)]  # SpanBERT's
WAYS = ("plain", "special", "words", "spans", "all")


def options(way, ids):
    """Words of one to many tokens, some of none; some of the tokens are special"""
    words = (torch.rand(ids.shape, device=ids.device) < 0.6).long().cumsum(-1) if ids.dim() else torch.zeros_like(ids)
    words = words.masked_fill(ids % 11 == 0, -1)
    special = {"special_tokens_mask": ids % 3 == 0, "special_ids": SPECIAL_IDS}
    found = {"plain": {}, "special": special, "words": {"words": words.int()}, "spans": {"span_lengths": SPANS}}
    found["all"] = special | found["words"] | {"span_lengths": [0, 1.5, 1]}
    return found[way]


@each_target
@pytest.mark.parametrize("shape", [(), (0, 5), (5, 0), (1,), (3, 700), (2, 3, 5000)])
@pytest.mark.parametrize("way", WAYS)
def test_one_key_one_result(device, backend, shape, way):
    ids = torch.randint(VOCABULARY, shape, device=device)
    given = options(way, ids)
    with oracle.poisoned_memory():
        got = corrupt(ids, probability=0.4, backend=backend, **given)
    expected = corrupt(ids, probability=0.4, backend="eager", **given)
    assert all(map(torch.equal, got, expected))
    if ids.numel() > 1000:
        assert not torch.equal(got[0], corrupt(ids, 1, probability=0.4, backend=backend, **given)[0])


@pytest.mark.parametrize("way", WAYS)
def test_every_instruction_set_and_number_of_threads(isa, way):
    ids = torch.randint(VOCABULARY, (5, 10_001))
    given = options(way, ids)
    before, expected = torch.get_num_threads(), corrupt(ids, backend="eager", **given)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, corrupt(ids, backend="cpu", **given), expected))
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
def test_special_ids_are_neither_chosen_nor_drawn(device, backend):
    """The others are drawn alike."""
    ids = torch.randint(20, (1000, 1000), device=device)
    special = [0, 5, 6, 7, 19, 25]
    corrupted, labels = sslops.random_token_corruption(
        ids, 25, 20, probability=0.5, masked=0.0, random=1.0, special_ids=special, backend=backend
    )
    chosen = labels >= 0
    share = torch.bincount(labels[chosen], minlength=26) / torch.bincount(ids.flatten(), minlength=26).clamp(min=1)
    drawn = torch.bincount(corrupted[chosen], minlength=26)
    left = [k for k in range(20) if k not in special]
    assert not drawn[special].any()
    assert not share[special].any()
    assert all(close(drawn[k], 1 / len(left), chosen.sum()) for k in left)
    assert (share[left] - 0.5).abs().max() < 4.5 * (0.25 / 48_000) ** 0.5
    assert torch.equal(corrupted[~chosen], ids[~chosen])


@each_target
def test_whole_words(device, backend):
    ids = torch.full((1000, 600), -1, device=device)
    lengths = torch.tensor([1, 3, 2, 5, 1], device=device).repeat(50)
    words = torch.arange(250, device=device).repeat_interleave(lengths).expand(1000, -1) % 7  # again and again, apart
    words = words.masked_fill(torch.arange(600, device=device) % 12 == 4, -1)  # the end of the second word, alone there
    corrupted, labels = corrupt(ids, words=words, backend=backend)
    chosen = (labels == -1).view(1000, 50, 12)
    assert not chosen[..., 4].any()
    for first, end in ((0, 1), (1, 4), (5, 6), (6, 11), (11, 12)):
        word = chosen[..., first:end]
        assert torch.equal(word.any(-1), word.all(-1))
        assert close(word[..., 0].sum(), 0.15, word[..., 0].numel())
    both = (chosen[..., 3] & chosen[..., 5]).sum()  # of other words
    assert close(both, 0.15**2, 50_000)
    masked = (corrupted == MASK).view(1000, 50, 12) & chosen
    assert close((masked[..., 6] & masked[..., 7]).sum(), 0.15 * 0.8**2, 50_000)  # token by token


@each_target
@pytest.mark.parametrize("lengths", [SPANS, [0, 0, 1], [1, 1]])
def test_spans(device, backend, lengths):
    """Every place is as likely, the first of a row too; what becomes of a span is one"""
    n, p = 200_000, 0.15
    corrupted, labels = corrupt(torch.full((n, 24), -1, device=device), span_lengths=lengths, backend=backend)
    chosen = labels == -1
    assert all(close(column.sum(), p, n) for column in chosen.t())
    begins = chosen[:, 10] & ~chosen[:, 9]
    shortest = next(k for k, each in enumerate(lengths) if each) + 1
    assert chosen[begins][:, 10 : 10 + shortest].all()
    # As the formula has it: without spans of more than k units that begin k before, for all k
    begun = Arguments(labels, None, None, None, 0, 1, p, 0.8, 0.1, [], lengths).begun
    begun = [each / 2**32 for each in begun]
    assert math.isclose(math.prod(1 - each for each in begun), 1 - p, rel_tol=1e-8)
    assert all(math.isclose(a / begun[0], sum(lengths[k:]) / sum(lengths), abs_tol=1e-6) for k, a in enumerate(begun))
    assert close(begins.sum(), (1 - p) * begun[0], n)  # nothing reaches over from the left
    neither = math.prod(1 - each for each in begun) * (1 - begun[0])
    assert close((~chosen[:, 9] & ~chosen[:, 10]).sum(), neither, n)
    masked = corrupted == MASK
    assert close((masked & chosen)[:, 10].sum(), p * 0.8, n)
    if shortest > 1:  # the next token is of the same span, but where another begins there
        alike = (masked[:, 10] == masked[:, 11])[begins]
        assert close(alike.sum(), 1 - begun[0] * 2 * 0.8 * 0.2, len(alike))


def test_a_span_reaches_as_far_as_it_is_long():
    """In words too, of which one is of one token and one of three"""
    ids = torch.full((20_000, 40), -1)
    words = torch.arange(20).repeat_interleave(torch.tensor([1, 3]).repeat(10)).expand(len(ids), -1)
    _, labels = corrupt(ids, words=words, span_lengths=[0, 0, 1], probability=0.02)
    chosen = (labels == -1)[:, [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21]]  # the words' first tokens
    assert torch.equal((labels == -1)[:, 1], (labels == -1)[:, 3])
    begins = chosen[:, 5] & ~chosen[:, 4]
    assert begins.sum() > 50
    assert chosen[begins, 5:8].all()
    assert not chosen[begins, 8].all()


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
        key = torch.tensor(5, device=device)
        arguments = (
            ids,
            key,
            special,
            None if special is None else ids % 5,
            MASK,
            VOCABULARY,
            0.15,
            0.8,
            0.1,
            [1, 2],
            [0.5, 1.0],
            backend,
        )
        torch.library.opcheck(torch.ops.sslops.random_token_corruption.default, arguments)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def op(x):
        return sslops.random_token_corruption(x, MASK, VOCABULARY, special_ids=SPECIAL_IDS, span_lengths=SPANS,
                                              words=x % 3, backend=backend)  # fmt: skip

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
    refused(TypeError, "words", ids, MASK, VOCABULARY, words=ids.bool())
    refused(ValueError, "words", ids, MASK, VOCABULARY, words=ids[0])
    refused(TypeError, "special_ids", ids, MASK, VOCABULARY, special_ids=5)
    refused(TypeError, "special_ids", ids, MASK, VOCABULARY, special_ids=ids)
    refused(TypeError, "special_ids[1]", ids, MASK, VOCABULARY, special_ids=[3, 0.5])
    refused(ValueError, "special_ids[0]", ids, MASK, VOCABULARY, special_ids=[-1, 3])
    refused(ValueError, "special_ids", ids, MASK, VOCABULARY, special_ids=range(0, 66, 2))
    refused(ValueError, "special_ids", ids, MASK, 5, special_ids=range(5))
    refused(TypeError, "span_lengths", ids, MASK, VOCABULARY, span_lengths=0.2)
    refused(ValueError, "span_lengths", ids, MASK, VOCABULARY, span_lengths=[])
    refused(ValueError, "span_lengths", ids, MASK, VOCABULARY, span_lengths=[0.0])
    refused(ValueError, "span_lengths", ids, MASK, VOCABULARY, span_lengths=[1] * 33)
    refused(ValueError, "span_lengths[1]", ids, MASK, VOCABULARY, span_lengths=[1, -1])
    refused(TypeError, "generator", ids, MASK, VOCABULARY, generator=0)
    refused(ValueError, "backend", ids, MASK, VOCABULARY, backend="tpu")
    with pytest.raises(TypeError, match="random_token_corruption: key"):
        torch.ops.sslops.random_token_corruption(
            ids, torch.tensor(0.5), None, None, 1, 9, 0.1, 0.8, 0.1, [], [1.0], "cpu"
        )
