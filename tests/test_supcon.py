import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import sslops
from sslops import _C
from sslops._contrastive import classes
from sslops.kernels.cpu import supcon as kernel

from . import oracle

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
TARGETS = oracle.targets("supcon")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)
each_where = pytest.mark.parametrize("where", ["out", "in"])


def rows(*shape: int, dtype=torch.float32, device="cpu", noise: float = 1.0) -> dict[str, torch.Tensor]:
    """Around a centre for each of 10 classes"""
    g = torch.Generator().manual_seed(sum(shape))
    centres = torch.randn(10, shape[-1], generator=g)
    z = centres[torch.arange(shape[-2]) % 10] + noise * torch.randn(shape, generator=g)
    return {"z": z.to(device, dtype)}


def losses(z, classes=10, reduction="none", **kwargs):
    """Labels in the order of the rows' centres, some rows without one, and some alone with theirs"""
    label = torch.arange(z.shape[-2], device=z.device)
    label = torch.where(label % 23 == 7, -1, torch.where(label % 19 == 5, label + 100, label % classes))
    return sslops.supcon(z, label, reduction=reduction, **kwargs)


def among(z, count=300, ids=False, weights=False, **kwargs):
    """The same with keys around the same centres, whose labels begin with another one; ids leave out a tenth"""
    keys = rows(count, z.shape[-1])["z"].to(z.device, z.dtype if z.dtype == torch.float64 else torch.float32)
    n, place = z.shape[-2], torch.arange(count, device=z.device)
    options = {"keys": keys, "key_labels": torch.where(place % 17 == 3, -1, place % 10)}
    if ids:
        options |= {"query_ids": torch.arange(n, device=z.device) % 10, "key_ids": place % 11 - 1}
    if weights:
        options["weights"] = torch.arange(n, device=z.device) % 3 / 2
    return losses(z, **options, **kwargs)


def with_ids(z, **kwargs):
    """Of each class some are left out"""
    place = torch.arange(len(z), device=z.device)
    return losses(z, query_ids=place // 10 % 7 - 1, **kwargs)


def expected(z, labels, temperature, where, keys=None, key_labels=(), query_ids=None, key_ids=(), weights=None):
    """Eq. 2 and 3 of the paper as loops"""
    example = torch.arange(z.shape[-2]).repeat(z.shape[:-2].numel()).tolist()
    unit, found = F.normalize(z.flatten(0, -2)), []
    keys, among_keys = (unit, False) if keys is None else (F.normalize(keys), True)

    def left_out(i, j):
        if not among_keys and j == i:
            return True
        return query_ids is not None and query_ids[example[i]] == (key_ids if among_keys else query_ids)[j] >= 0

    def equal(i, j):
        if among_keys:
            return key_labels[j] == labels[example[i]] >= 0
        return labels[example[j]] == labels[example[i]] >= 0 or example[j] == example[i]

    for i in range(len(unit)):
        others = [j for j in range(len(keys)) if not left_out(i, j)]
        of_label = [j for j in others if equal(i, j)]
        p = torch.stack([unit[i] @ keys[j] for j in others]).div(temperature).softmax(0)
        p = p[[others.index(j) for j in of_label]]
        if not of_label:
            found.append(p.new_zeros(()))
        else:
            found.append(-p.log().mean() if where == "out" else -p.mean().log())
        if weights is not None:
            found[-1] = found[-1] * weights[example[i]]
    return torch.stack(found).view(z.shape[:-1])


@each_where
@pytest.mark.parametrize("shape", [(9, 4), (3, 5, 4)])
def test_against_the_formula(where, shape):
    (z,) = rows(*shape, dtype=torch.float64).values()
    labels = torch.tensor([1, 2, 1, -1, -1, 2, 1, 7, 2])[: shape[-2]]
    found = sslops.supcon(z, labels, temperature=0.3, where=where, reduction="none")
    torch.testing.assert_close(found, expected(z, labels, 0.3, where))

    def op(z, temperature):
        return sslops.supcon(z, labels, temperature=temperature, where=where, reduction="none")

    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(op, (z.requires_grad_(), temperature))


@each_where
@pytest.mark.parametrize("among_keys", [True, False])
def test_ids_and_weights_against_the_formula(where, among_keys):
    """On every backend, as the eager one is what the kernels are held to"""
    z, keys = rows(9, 4, dtype=torch.float64)["z"], rows(7, 4, dtype=torch.float64)["z"]
    options = {
        "labels": torch.tensor([1, 2, 1, -1, -1, 2, 1, 7, 2]), "query_ids": torch.tensor([0, 1, 2, 0, -1, -1, 0, 4, 1]),
        "weights": torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 3.0, 1.0, 1.0, 0.25]), "temperature": 0.3, "where": where,
    }  # fmt: skip
    if among_keys:
        options |= {"keys": keys, "key_labels": torch.tensor([1, -1, 2, 7, 1, 2, 1])}
        options |= {"key_ids": torch.tensor([0, 1, 1, -1, 5, -1, 2])}
    wanted = expected(z, **options)
    torch.testing.assert_close(sslops.supcon(z, reduction="none", **options), wanted)
    torch.testing.assert_close(sslops.supcon(z, **options), wanted.mean())
    if among_keys:
        options["keys"] = keys.float()
    for device, backend in TARGETS:
        there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        found = sslops.supcon(z.to(device).float(), reduction="none", backend=backend, **there)
        torch.testing.assert_close(found.cpu(), wanted.float())

    def op(z, temperature):
        return sslops.supcon(z, reduction="none", **(options | {"temperature": temperature, "keys": of_keys}))

    of_keys = keys if among_keys else None
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(op, (z.requires_grad_(), temperature))


@each_target
@each_where
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_among_keys(device, backend, where, dtype):
    """One block of rows and two, parts of one chunk and of several"""
    for shape, options in (
        ((3, 67, 33), {"temperature": 0.1, "ids": True}),
        ((50, 16), {"temperature": 0.02, "weights": True}),
        ((300, 24), {"temperature": 0.2, "count": 4200}),
        ((70, 24), {"temperature": 2.0, "normalize": False, "ids": True}),
    ):
        with oracle.poisoned_memory():
            oracle.check(among, rows(*shape, dtype=dtype, device=device), backend, where=where, **options)


@each_target
@each_where
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_ids(device, backend, where, dtype):
    for temperature in (0.1, 0.02):
        with oracle.poisoned_memory():
            inputs = rows(200, 33, dtype=dtype, device=device)
            oracle.check(with_ids, inputs, backend, where=where, temperature=temperature)


@each_target
@each_where
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(200, 33), (3, 67, 16), (2, 301, 24)])
def test_accuracy(device, backend, where, dtype, shape):
    for temperature in (1.0, 0.1, 0.02, 0.005):
        with oracle.poisoned_memory():
            inputs = rows(*shape, dtype=dtype, device=device)
            oracle.check(losses, inputs, backend, where=where, temperature=temperature)


@each_target
@each_where
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 33), (3, 301, 24), (2600, 16)])
def test_accuracy_of_the_mean(device, backend, where, dtype, shape):
    """On a CPU forward makes its gradients, from tiles that it holds or finds again"""
    for temperature in (1.0, 0.02):
        with oracle.poisoned_memory():
            inputs = rows(*shape, dtype=dtype, device=device)
            oracle.check(losses, inputs, backend, where=where, temperature=temperature, reduction="mean")


@each_target
@each_where
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [0.1, 1e-3])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_easy_positives(device, backend, where, dtype, noise, temperature):
    """p is what it should be nearly everywhere: the gradient is a small difference."""
    inputs = rows(2, 130, 24, dtype=dtype, device=device, noise=noise)
    oracle.check(losses, inputs, backend, where=where, temperature=temperature)


@each_target
@each_where
@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize("normalize", [True, False])
def test_collapsed(device, backend, where, temperature, normalize):
    """All embeddings equal: the loss is log(M - 1), whatever the temperature; terms of size 2 / tau cancel in z's."""
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(device) / 8
    size = 2 / temperature / float(row.norm()) / 64**0.5
    oracle.check(
        losses, {"z": row.repeat(300, 1)}, backend, where=where, temperature=temperature, scale={"z": size},
        normalize=normalize,
    )  # fmt: skip


@each_target
@each_where
def test_one_class_and_only_distinct_ones(device, backend, where):
    inputs = rows(150, 16, device=device)
    oracle.check(losses, inputs, backend, classes=1, where=where)
    (z,) = inputs.values()
    alone = torch.arange(150, device=device)
    for labels in (alone, torch.full_like(alone, -1)):
        z.requires_grad_()
        loss, metrics = sslops.supcon(z, labels, where=where, return_metrics=True, backend=backend)
        assert loss == 0
        assert metrics == (1, 0)
        assert not torch.autograd.grad(loss, z)[0].any()


@each_target
@each_where
@pytest.mark.parametrize("temperature", [0.05, 0.005])
def test_positives_far_below_the_negatives(device, backend, where, temperature):
    """Their exponentials are 0 beside those of the negatives."""
    (z,) = rows(120, 16, device=device, noise=1e-2).values()
    z[:10] *= -1  # one of each class, and far from its others
    oracle.check(losses, {"z": z}, backend, where=where, temperature=temperature)


@each_target
@each_where
@pytest.mark.parametrize("size", [1e3, 1e20])
def test_a_row_far_longer_than_its_positives(device, backend, where, size):
    (z,) = rows(40, 9, device=device).values()
    z[3] *= size
    oracle.check(losses, {"z": z}, backend, where=where, temperature=0.5, normalize=False)


@each_target
@each_where
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_non_finite_rows_as_eager(device, backend, where, bad, normalize):
    """A positive at -inf is one: the loss is inf, and NaN where all pairs are there"""
    for place in range(9):
        z = torch.tensor([[1.5, -0.3, -2.2], [1.5, -0.2, 2.1], [1.4, 0.3, -2.2]], device=device)
        z.view(-1)[place] = bad
        for labels in ([3, 3, 2], [3, 3, 3]):
            options = {"where": where, "normalize": normalize, "reduction": "none"}
            labels = torch.tensor(labels, device=device)
            ours, eager = (sslops.supcon(z, labels, **options, backend=b) for b in (backend, "eager"))
            assert torch.equal(ours.isfinite(), eager.isfinite())
            if where == "out":  # a logit of inf in its row: NaN here, inf in the reference's "in"
                assert torch.equal(ours.isnan(), eager.isnan())


@each_target
@each_where
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_temperature_gradient(device, backend, where, dtype, normalize):
    inputs = {name: x * 0.3 for name, x in rows(2, 90, 24, dtype=dtype, device=device).items()}
    inputs["temperature"] = torch.tensor(0.2, device=device)

    def op(z, temperature, **kwargs):
        return losses(z, temperature=temperature, **kwargs)

    oracle.check(op, inputs, backend, dtype=dtype, where=where, normalize=normalize)


@each_where
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_every_instruction_set(isa, where, temperature):
    with oracle.poisoned_memory():
        oracle.check(losses, rows(600, 40), "cpu", where=where, temperature=temperature)
        oracle.check(with_ids, rows(150, 20), "cpu", where=where, temperature=temperature)
        oracle.check(among, rows(90, 20), "cpu", where=where, temperature=temperature, ids=True)


@each_target
def test_a_view_for_each_positive_is_nt_xent(device, backend):
    """Of two views without labels each row has one positive: SimCLR's loss, of either form."""
    (z,) = rows(2, 70, 16, device=device).values()
    none = torch.full((70,), -1, device=device)
    for where in ("out", "in"):
        found = sslops.supcon(z, none, temperature=0.2, where=where, backend=backend)
        torch.testing.assert_close(found, sslops.nt_xent(z, temperature=0.2))


@each_target
def test_a_row_without_weight_counts_nothing(device, backend):
    """Whatever its logits are: those of rows without a positive, or of weight 0, may overflow."""
    z = torch.zeros(6, 3, device=device)
    z[:, 0], z[2:4] = torch.arange(6.0), 1e30
    labels = torch.tensor([0, 0, 1, 2, 0, 0], device=device)
    options = {"temperature": 1.0, "normalize": False, "backend": backend}
    for where in ("out", "in"):
        alone = torch.arange(6, device=device)  # nobody has a positive
        zeros = torch.autograd.grad(sslops.supcon(z.requires_grad_(), alone, where=where, **options), z)[0]
        assert not zeros.any()
        zeros = sslops.supcon(z, alone // 6, weights=torch.zeros(6, device=device), where=where, **options)
        assert zeros == 0
        assert not torch.autograd.grad(zeros, z)[0].any()
        # Rows 2 and 3 are nobody's candidates, and have each other's infinite logit.
        left_out = torch.tensor([0, 0, 1, 1, 0, 0], device=device)
        far = {"keys": z.detach(), "key_labels": labels, "query_ids": 1 - left_out, "key_ids": left_out}
        for weights in (None, 1.0 - left_out):
            loss = sslops.supcon(z, torch.where(left_out == 1, 3, labels) if weights is None else labels,
                                 weights=weights, where=where, **options, **far)  # fmt: skip
            assert loss.isfinite()
            assert torch.autograd.grad(loss, z)[0].isfinite().all()


@each_target
@pytest.mark.parametrize("where", ["out", "in"])
def test_a_row_without_weight_beside_one_with(device, backend, where):
    """The positives of one are the other's: logits of a thousand"""
    z = 1 + 0.01 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(device)
    weights = (torch.arange(9, device=device) % 2).float()
    options = {"labels": torch.arange(9, device=device) % 3, "temperature": 3e-3, "normalize": False, "where": where}
    oracle.check(sslops.supcon, {"z": z}, backend, weights=weights, **options)


@each_target
def test_keys_may_change_before_backward(device, backend):
    """A queue that is updated at once; and under checkpointing, which looks at it again, that is an error"""
    (z,) = rows(40, 16, device=device).values()
    labels = torch.arange(40, device=device) % 7
    queue = sslops.NegativeQueue(100, 16).to(device)
    queue.enqueue(z.flip(0), labels=labels.flip(0))

    def loss(z):
        return sslops.supcon(z, labels, keys=queue.negatives, key_labels=queue.labels, backend=backend)

    wanted = torch.autograd.grad(loss(z.requires_grad_()), z)[0]
    value = loss(z)
    again = torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=False, determinism_check="none")
    queue.enqueue(z, labels=labels)
    assert torch.equal(torch.autograd.grad(value, z)[0], wanted)
    with pytest.raises(RuntimeError, match="supcon: keys: wanted those of the forward pass, got changed ones"):
        again.backward()


@each_target
@each_where
def test_no_keys_and_none_that_is_a_candidate(device, backend, where):
    (z,) = rows(5, 8, device=device).values()
    labels, ids = torch.zeros(5, dtype=torch.int64, device=device), torch.ones(5, dtype=torch.int64, device=device)
    for keys, beside in (
        (z[:0], {"key_labels": labels[:0]}),
        (z.clone(), {"key_labels": labels, "query_ids": ids, "key_ids": ids}),
    ):
        z.requires_grad_()
        loss, metrics = sslops.supcon(
            z, labels, keys=keys.detach(), where=where, return_metrics=True, backend=backend, **beside
        )
        assert loss == 0
        assert metrics == (1, 0)
        assert not torch.autograd.grad(loss, z)[0].any()


@each_target
def test_keys_are_rows_where_ids_leave_out_the_own(device, backend):
    """The loss of the batch, and without their part as candidates its rows' gradients"""
    (z,) = rows(90, 16, device=device).values()
    labels, own = torch.arange(90, device=device) % 7, torch.arange(90, device=device)
    keys = {"keys": z, "key_labels": labels, "query_ids": own, "key_ids": own}
    for where in ("out", "in"):
        found, wanted = (
            sslops.supcon(z, labels, where=where, backend=backend, return_metrics=True, **options)
            for options in (keys, {})
        )
        torch.testing.assert_close(found[0], wanted[0])
        assert found[1] == wanted[1]


@each_target
def test_labels(device, backend):
    """int32 and int64, also where they differ in their high bits only"""
    (z,) = rows(2, 40, 16, device=device).values()
    labels = torch.arange(40, device=device) % 7
    found = sslops.supcon(z, labels, backend=backend)
    assert torch.equal(sslops.supcon(z, labels.int(), backend=backend), found)
    for more in (33, 34, 1 << 40):  # the first are up to 39: classes of the 40 rows as they are
        assert torch.equal(sslops.supcon(z, labels + more, backend=backend), found)
    high = labels.where(labels > 0, 1 << 32)
    assert torch.equal(sslops.supcon(z, high, backend=backend), found)


@each_target
def test_metrics(device, backend):
    (z,) = rows(2, 6, 16, device=device).values()
    labels = torch.tensor([3, 3, 3, 1, -1, -1], device=device)
    assert sslops.supcon(z, labels, return_metrics=True, backend=backend)[1] == (0, (3 * 5 + 3 * 1) / 6)
    found = sslops.supcon(z[0], labels, return_metrics=True, backend=backend)[1]
    assert found == (0.5, 1)


def test_memory_is_linear():
    """M = 16384, D = 64: forward and backward in a process of their own grow by a few M x D, where M x M takes 1 GB;
    so of 2048 rows and 65536 keys M x K takes half of one.
    """
    grown = oracle.grown_memory(
        "z, labels = torch.randn(16384, 64, requires_grad=True), torch.arange(16384) % 100; "
        "keys, key_labels = torch.randn(65536, 64), torch.arange(65536) % 100; "
        "sslops.supcon(z[:1200], labels[:1200]).backward()",
        "sslops.supcon(z, labels).backward(); "
        "sslops.supcon(z[:2048], labels[:2048], keys=keys, key_labels=key_labels).backward()",
    )
    assert grown < 64, f"{grown:.0f} MB"


def test_bad_input():
    z, labels = torch.randn(4, 8), torch.arange(4)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "supcon", argument, lambda: sslops.supcon(*args, **kwargs))

    refused(ValueError, "z", z[0], labels)
    refused(ValueError, "z", z[None, None], labels)
    refused(ValueError, "z", z[None][:0], labels)
    refused(ValueError, "labels", z, labels[:3])
    refused(ValueError, "labels", z[None], labels[None])
    refused(TypeError, "labels", z, labels.float())
    refused(ValueError, "where", z, labels, where="both")
    refused(ValueError, "reduction", z, labels, reduction="median")
    refused(ValueError, "temperature", z, labels, temperature=0.0)
    refused(TypeError, "normalize", z, labels, normalize=1)
    refused(TypeError, "return_metrics", z, labels, return_metrics=1)
    refused(ValueError, "weights", z, labels, weights=torch.ones(3))
    refused(TypeError, "weights", z, labels, weights=labels)
    refused(ValueError, "query_ids", z, labels, query_ids=labels[:3])
    refused(ValueError, "query_ids", z[None], labels, query_ids=labels)
    refused(ValueError, "key_labels", z, labels, key_labels=labels)
    refused(ValueError, "key_ids", z, labels, query_ids=labels, key_ids=labels)
    keys = {"keys": z, "key_labels": labels}
    refused(TypeError, "key_labels", z, labels, keys=z)
    refused(ValueError, "key_labels", z, labels, keys=z, key_labels=labels[:3])
    refused(ValueError, "keys", z, labels, keys=z[:, :3], key_labels=labels)
    refused(ValueError, "keys", z, labels, keys=z.double(), key_labels=labels)
    refused(TypeError, "key_ids", z, labels, query_ids=labels, **keys)
    refused(TypeError, "query_ids", z, labels, key_ids=labels, **keys)


def test_labels_are_sorted_once_a_step(monkeypatch):
    from sslops.ops import supcon as module

    sorted_ids = []
    monkeypatch.setattr(module, "classes", lambda ids: sorted_ids.append(ids) or classes(ids))
    with_ids(rows(40, 8)["z"].requires_grad_()).sum().backward()
    assert len(sorted_ids) == 2  # the labels and the ids


class TestPlantedFaults:
    """Broken kernels must not pass."""

    def refuse(self, inputs, **kwargs):
        with pytest.raises(AssertionError, match="above"):
            oracle.check(losses, inputs, "cpu", **kwargs)

    def test_a_positive_too_many(self, monkeypatch):
        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x: run(x._replace(labels=x.labels.clamp(max=18))))
        self.refuse(rows(300, 32))

    def test_a_softmax_in_bf16(self, monkeypatch):
        """As W would be, if the positives were subtracted after it was rounded"""
        run = kernel.backward

        def fault(grad, x, inv_norm, stats):
            return run(grad, x, inv_norm, torch.cat([stats[:1], stats[1:2].bfloat16().float(), stats[2:]]))

        monkeypatch.setattr(kernel, "backward", fault)
        self.refuse(rows(2, 130, 24, noise=0.1), temperature=0.1)

    def test_a_key_that_is_left_out_and_counts(self, monkeypatch):
        run = kernel.among_keys
        monkeypatch.setattr(kernel, "among_keys", lambda x: run(x._replace(key_ids=x.key_ids.roll(1))))
        with pytest.raises(AssertionError, match="above"):
            oracle.check(among, rows(60, 16), "cpu", ids=True)

    def test_the_gradients_of_a_sum_for_a_mean(self, monkeypatch):
        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x, factor=0.0: run(x, factor=factor and 1.0))
        with pytest.raises(AssertionError, match="above"):
            oracle.check(losses, rows(90, 16), "cpu", reduction="mean")

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "supcon_backward", lambda *args: None)
        with oracle.poisoned_memory():
            self.refuse(rows(40, 8))


def test_classes_of_ids():
    """What is equal, but for ids below 0; their number is not asked of the device, as FakeTensorMode would refuse"""
    for ids in ([], [7], [-1], [5, 5], [3, -1, 3, 2**40, -1, 0, -7, 0], [*range(9), -2], [-3, -3]):
        x = torch.tensor(ids, dtype=torch.int64)
        found, equal = classes(x), (x[:, None] == x) & (x[:, None] >= 0)
        assert found.dtype == torch.int32
        assert not found.numel() or 0 <= found.min() <= found.max() <= len(ids)
        assert torch.equal(found[:, None] == found, equal | torch.eye(len(ids), dtype=torch.bool))
    with FakeTensorMode():
        assert classes(torch.zeros(5, dtype=torch.int32)).shape == (5,)
