import importlib.util

import pytest
import torch
import torch.nn.functional as F

import sslops
from benchmarks import peers
from sslops.kernels.native import masked_token_cross_entropy as kernel
from sslops.ops.masked_token_cross_entropy import Arguments

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("masked_token_cross_entropy"))


def problem(n=40, v=70, d=24, *, share=0.3, dtype=torch.float32, device="cpu", scale=1.0):
    """hidden, weight, bias, and labels of a share of the tokens"""
    g = torch.Generator().manual_seed(n * 1000 + v)
    hidden, weight, bias = (torch.randn(shape, generator=g) for shape in ((n, d), (v, d), (v,)))
    labels = torch.randint(v, (n,), generator=g).masked_fill(torch.rand(n, generator=g) > share, -100)
    return [(scale * x).to(device, dtype) for x in (hidden, weight / d**0.5, bias)], labels.to(device)


def check(tensors, labels, backend, **options):
    def op(hidden, weight, bias, **kwargs):
        return sslops.masked_token_cross_entropy(hidden, weight, labels, bias=bias, **kwargs)

    oracle.check(op, dict(zip(("hidden", "weight", "bias"), tensors, strict=True)), backend, **options)


def graded(op, tensors, *rest, **options):
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = op(*leaves, *rest, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def ours(hidden, weight, bias, labels, **options):
    return sslops.masked_token_cross_entropy(hidden, weight, labels, bias=bias, **options)


def all_positions(hidden, weight, bias, labels, **options):
    """As Hugging Face has it"""
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, **options)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 70, 24), (800, 130, 33)])  # the last has two chunks
def test_accuracy(device, backend, dtype, reduction, shape):
    tensors, labels = problem(*shape, share=0.8, dtype=dtype, device=device)
    labels[0] = 0
    with oracle.poisoned_memory():
        check(tensors, labels, backend, reduction=reduction)
        check(tensors, labels, backend, reduction=reduction, label_smoothing=0.1)


@each_target
def test_large_logits(device, backend):
    tensors, labels = problem(50, 90, scale=30, device=device)
    check(tensors, labels, backend)


@each_target
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 1.0])
def test_one_word(device, backend, smoothing):
    """Is certain: no loss, and no gradient"""
    tensors, labels = problem(63, 1, device=device)
    found = graded(ours, tensors, labels, backend=backend, reduction="none", label_smoothing=smoothing)
    assert not any(x.any() for x in found)


@each_target
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_is_the_usual_form(device, backend, smoothing):
    tensors, labels = problem(700, 70, share=0.9, device=device)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        found = graded(ours, tensors, labels, backend=backend, **options)
        expected = graded(all_positions, [x.double() for x in tensors], labels, **options)
        for x, y in zip(found, expected, strict=True):
            assert max(oracle.errors(x, y)) < 2e-6


def test_is_berts():
    """transformers' BertForMaskedLM, its loss, and the gradients of all its parameters, the tied embedding's too"""
    if importlib.util.find_spec("torchvision"):  # which transformers imports
        peers._let_torchvision_load()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    ids = torch.randint(5, 90, (3, 20))
    corrupted, labels = sslops.random_token_corruption(ids, 4, 90, probability=0.4)
    model(input_ids=corrupted, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    decoder = model.cls.predictions.decoder
    hidden = model.cls.predictions.transform(model.bert(corrupted).last_hidden_state)
    loss = sslops.masked_token_cross_entropy(hidden, decoder.weight, labels, bias=decoder.bias)
    torch.testing.assert_close(loss, model(input_ids=corrupted, labels=labels).loss)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@each_target
def test_shapes_dtypes_and_a_missing_bias(device, backend):
    (hidden, weight, bias), labels = problem(60, device=device)
    expected = graded(ours, (hidden, weight, bias), labels, backend=backend, reduction="none")
    batch = [hidden.view(4, 15, -1), weight, bias]
    found = graded(ours, batch, labels.view(4, 15).int(), backend=backend, reduction="none")
    assert found[0].shape == (4, 15)
    assert all(torch.equal(x.view(y.shape), y) for x, y in zip(found, expected, strict=True))
    module = sslops.nn.MaskedTokenCrossEntropy(label_smoothing=0.2, backend=backend)
    assert torch.equal(module(hidden, weight, labels), ours(hidden, weight, torch.zeros_like(bias), labels,
                                                           label_smoothing=0.2, backend=backend))  # fmt: skip
    other = labels.masked_fill(labels == -100, 7)
    assert torch.equal(ours(hidden, weight, bias, other, ignore_index=7, backend=backend),
                       ours(hidden, weight, bias, other.masked_fill(other == 7, -100), backend=backend))  # fmt: skip
    mixed = graded(ours, (hidden.bfloat16(), weight, bias), labels, backend=backend)
    assert [x.dtype for x in mixed] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    for x, y in zip(mixed, graded(ours, (hidden.bfloat16(), weight, bias), labels, backend="eager"), strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("n", [0, 5])
def test_no_labels(backend, n):
    """As F.cross_entropy: NaN, and gradients of 0"""
    tensors, labels = problem(n, share=-1.0)
    for reduction, empty in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
        loss, *gradients = graded(ours, tensors, labels, reduction=reduction, backend=backend)
        torch.testing.assert_close(loss, torch.full_like(loss, empty), equal_nan=True)
        assert not any(g.any() for g in gradients)


@each_target
def test_rows_without_a_label_take_no_part(device, backend):
    tensors, labels = problem(device=device)
    labelled = labels != -100
    expected = graded(ours, tensors, labels, backend=backend)
    tensors[0][~labelled] = torch.nan
    found = graded(ours, tensors, labels, backend=backend)
    assert all(map(torch.equal, found, expected))
    assert found[1][labelled].all()
    assert not found[1][~labelled].any()


@each_target
def test_gradients_are_handed_out_and_found_again(device, backend):
    """Under any gradient of the loss, and once more from the same graph: the same bits"""
    tensors, labels = problem(1200, share=0.6, device=device)
    leaves = [x.requires_grad_() for x in tensors]
    once = [g.clone() for g in torch.autograd.grad(ours(*leaves, labels, backend=backend), leaves)]
    loss = ours(*leaves, labels, backend=backend)
    for factor in (0.37, 0.37, 1.0):
        found = torch.autograd.grad(loss, leaves, torch.full_like(loss, factor), retain_graph=True)
        assert all(torch.equal(x, factor * y) for x, y in zip(found, once, strict=True))
    infinite = torch.autograd.grad(loss, leaves, torch.full_like(loss, torch.inf))
    assert not infinite[0][labels == -100].any()
    assert infinite[0].isinf().any()


@each_target
def test_only_what_is_wanted(device, backend):
    (hidden, weight, bias), labels = problem(device=device)
    everything = graded(ours, (hidden, weight, bias), labels, backend=backend)
    for k, name in enumerate(("hidden", "weight", "bias")):
        tensors = {"hidden": hidden, "weight": weight, "bias": bias}
        leaf = tensors[name] = tensors[name].clone().requires_grad_()
        loss = sslops.masked_token_cross_entropy(**tensors, labels=labels, backend=backend)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], everything[1 + k])


@each_target
def test_half_precision_under_a_scaled_loss(device, backend):
    """Gradients wait in float32: what GradScaler's factor saves is not lost before it is there"""
    tensors, labels = problem(400, 50, share=0.9, dtype=torch.float16, device=device, scale=0.05)
    truth = graded(ours, [x.double() for x in tensors], labels)
    leaves = [x.requires_grad_() for x in tensors]
    (2.0**14 * ours(*leaves, labels, backend=backend)).backward()
    for leaf, exact in zip(leaves, truth[1:], strict=True):
        assert oracle.errors(leaf.grad / 2.0**14, exact)[0] < 1e-3


@each_target
def test_opcheck(device, backend):
    (hidden, weight, bias), labels = problem(5, 9, 4, share=0.7, device=device)
    for reduction, needs_grad in (("mean", [True] * 3), ("none", [True] * 3), ("sum", [True, False, False])):
        leaves = [x.clone().requires_grad_(need) for x, need in zip((hidden, weight, bias), needs_grad, strict=True)]
        x = Arguments(leaves[0], leaves[1], labels, leaves[2], -100, 0.1, reduction, torch.float32, backend, needs_grad)
        torch.library.opcheck(torch.ops.sslops.masked_token_cross_entropy.default, oracle.lowered(x))
        with torch.no_grad():
            loss, *_ = torch.ops.sslops.masked_token_cross_entropy(*oracle.lowered(x))
            torch.library.opcheck(
                torch.ops.sslops.masked_token_cross_entropy_backward.default, (loss, *oracle.lowered(x))
            )


@each_target
def test_compiles_for_any_number_of_labels(device, backend):
    (hidden, weight, bias), labels = problem(24, share=0.5, device=device)
    rows = torch.cat([hidden, labels[:, None].to(hidden)], 1)  # so that both have the batch's size

    def step(rows, weight, bias):
        labels = rows.detach()[:, -1].long()
        return ours(rows[:, :-1] * 2, weight[:70], bias[:70], labels, backend=backend)

    more = (torch.cat([x, x[:1]]) for x in (weight, bias))
    oracle.assert_compiles(lambda rows: step(rows, weight, bias), rows)
    torch._dynamo.reset()
    leaves = [rows, *more]
    for x, y in zip(graded(torch.compile(step, fullgraph=True, backend="aot_eager"), leaves), graded(step, leaves),
                    strict=True):  # fmt: skip
        assert torch.equal(x, y)


def test_memory_is_a_chunk_of_logits():
    """A chunk of 30 MB, and blocks of it; all logits would be 240"""
    setup = """
torch.manual_seed(0)
hidden, weight = (torch.randn(n, 16).requires_grad_() for n in (3000, 20000))
labels = torch.randint(20000, (3000,))
def step(rows):
    sslops.masked_token_cross_entropy(hidden[:rows], weight, labels[:rows]).backward()
step(1)
"""
    assert oracle.grown_memory(setup, "step(3000)") < 60


def test_bad_input():
    (hidden, weight, bias), labels = problem(6, 9)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "masked_token_cross_entropy", argument,
                              lambda: sslops.masked_token_cross_entropy(*args, **kwargs))  # fmt: skip

    refused(ValueError, "weight", hidden, weight[:, :3], labels)
    refused(ValueError, "weight", hidden, weight[:0], labels)
    refused(ValueError, "labels", hidden, weight, labels[:3])
    refused(ValueError, "hidden", hidden[None], weight, labels)
    refused(ValueError, "hidden", hidden.view(2, 3, -1), weight, labels)
    refused(ValueError, "hidden", hidden.view(2, 3, -1), weight, labels.view(3, 2))
    refused(TypeError, "labels", hidden, weight, labels.float())
    refused(TypeError, "labels", hidden, weight, labels.tolist())
    refused(ValueError, "bias", hidden, weight, labels, bias=bias[:3])
    refused(TypeError, "bias", hidden, weight, labels, bias=1.0)
    refused(TypeError, "ignore_index", hidden, weight, labels, ignore_index=0.5)
    refused(ValueError, "label_smoothing", hidden, weight, labels, label_smoothing=1.5)
    refused(ValueError, "reduction", hidden, weight, labels, reduction="median")
    refused(ValueError, "backend", hidden, weight, labels, backend="tpu")
    for bad in (-1, 9):
        refused(ValueError, "labels[2]", hidden, weight, torch.tensor([0, -100, bad, 1, 1, 1]))
    x = Arguments(hidden, weight, labels.fill_(9), None, -100, 0.0, "mean", torch.float32, "cpu", [True] * 3)
    with pytest.raises(ValueError, match=r"masked_token_cross_entropy: labels\[0\]"):
        torch.ops.sslops.masked_token_cross_entropy(*oracle.lowered(x))


@pytest.mark.parametrize("fault", ["a lost chunk", "the last chunk's share", "a forgotten target"])
def test_a_fault_is_found(monkeypatch, fault):
    tensors, labels = problem(1200, 60, share=0.9)
    sweep = kernel._sweep

    def faulty(x, ready, grad=None):
        loss, d_hidden, d_weight, d_bias = sweep(x, ready, grad)
        rows = (x.labels != -100).nonzero().flatten()
        if fault == "a lost chunk":
            d_hidden[rows[100:300]] = 0
        elif fault == "the last chunk's share":
            d_hidden[rows[1000:]] *= len(rows) / (len(rows) - 1000)
        else:
            d_bias[x.labels[rows[0]]] += 1 / len(rows)
        return loss, d_hidden, d_weight, d_bias

    monkeypatch.setattr(kernel, "_sweep", faulty)
    with pytest.raises(AssertionError, match="above"):
        check(tensors, labels, "cpu")


def test_transformers_bert():
    """BertForMaskedLM's loss, and the gradients of all its parameters, tied and untied"""
    transformers = pytest.importorskip("transformers")
    peers._let_torchvision_load()
    for tied in (True, False):
        config = transformers.BertConfig(
            vocab_size=97, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            tie_word_embeddings=tied,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config).eval()
        ids = torch.randint(97, (3, 11))
        labels = torch.where(torch.rand(3, 11) < 0.3, ids, -100)
        theirs = model(input_ids=ids, labels=labels).loss
        head = model.cls.predictions
        hidden = head.transform(model.bert(input_ids=ids).last_hidden_state)
        ours = sslops.masked_token_cross_entropy(hidden, head.decoder.weight, labels, bias=head.decoder.bias)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        parameters = list(model.parameters())
        expected = torch.autograd.grad(theirs, parameters, allow_unused=True)  # not the pooler's
        found = torch.autograd.grad(ours, parameters, allow_unused=True)
        used = [k for k, x in enumerate(expected) if x is not None]
        assert len(used) > 20
        assert used == [k for k, x in enumerate(found) if x is not None]
        for k in used:
            torch.testing.assert_close(found[k], expected[k], rtol=1e-4, atol=1e-7)
