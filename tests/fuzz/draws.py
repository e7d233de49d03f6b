"""Random calls of every op, as Cases: shapes at the edges of tiles, values and strides that no training run has."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import sslops

from ..cases import Case, nearest_values

SIZES = st.sampled_from([1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 63, 64, 65, 97, 128, 129])
SEEDS = st.integers(0, 2**31 - 1)
TEMPERATURES = st.sampled_from([1e-3, 0.01, 0.046, 0.07, 0.1, 0.5, 1.0, 10.0, 100.0])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- values ----


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=_generator(seed))


def _collapsed(shape: tuple[int, ...], seed: int) -> Tensor:
    return _noise(shape[-1:], seed) + 1e-2 * _noise(shape, seed + 1)


def _doubled(shape: tuple[int, ...], seed: int) -> Tensor:
    x = _noise(shape, seed)
    return x[torch.randint(len(x), (len(x),), generator=_generator(seed))] if len(x) else x


def _zero_rows(shape: tuple[int, ...], seed: int) -> Tensor:
    return _noise(shape, seed) * (torch.arange(shape[0]) % 3 > 0).view(-1, *[1] * (len(shape) - 1))


MILD: dict[str, Callable[[tuple[int, ...], int], Tensor]] = {
    "noise": _noise,
    "small": lambda shape, seed: 1e-3 * _noise(shape, seed),
    "large": lambda shape, seed: 30 * _noise(shape, seed),
    "collapsed": _collapsed,
    "doubled": _doubled,
    "zero rows": _zero_rows,
}
WILD = {
    "nan": (float("nan"), 1.0),
    "inf": (float("inf"), 1.0),
    "minus inf": (-float("inf"), 1.0),
    "huge": (1e30, 1e10),
    "tiny": (1e-40, 1e-40),
}


def planted(x: Tensor, kind: str, seed: int) -> Tensor:
    """x with one number of that kind, and the others scaled as it says"""
    value, scale = WILD[kind]
    x = (x * scale).clone()
    if x.numel():
        x.view(-1)[seed % x.numel()] = value
    return x


# ---- memory ----


def _sliced(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _shifted(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": _sliced,
    "flipped": lambda x: x.flip(0).contiguous().flip(0),
    "shifted": _shifted,
    "expanded": lambda x: x[:1].expand(x.shape) if len(x) else x,  # other values, in memory for one row
}


# ---- calls ----


def _pair(draw: Any, names: tuple[str, str], rows: int = 1) -> tuple[dict[str, Tensor], int, int]:
    """Of at least 3 columns: a unit row of one is a sign, whose derivative is 0, and all that is there is rounding."""
    n, d, seed = max(draw(SIZES), rows), max(draw(SIZES), 3), draw(SEEDS)
    make = MILD[draw(st.sampled_from(sorted(MILD)))]
    first = make((n, d), seed)
    second = (
        make((n, d), seed + 2)
        if draw(st.booleans())
        else first + 0.3 * first.std(correction=0) * _noise((n, d), seed + 3)
    )
    return dict(zip(names, (first, second), strict=True)), n, seed


def _options(draw: Any, **choices: Any) -> dict[str, Any]:
    return {name: draw(choice if isinstance(choice, st.SearchStrategy) else st.sampled_from(choice))
            for name, choice in choices.items()}  # fmt: skip


def _ids(rows: int, count: int, of: int, seed: int) -> Tensor:
    return torch.stack([torch.randperm(of, generator=_generator(seed + k))[:count] for k in range(rows)])


def _perhaps_decoupled(draw: Any, case: Case, *shape: int) -> Case:
    """Perhaps with weights of its positives [shape]; not where a row without a negative would have -inf"""
    weights = torch.rand(shape, generator=_generator(draw(SEEDS))) * 2 if draw(st.booleans()) else None
    found = case._replace(options=case.options | {"decoupled": True, "positive_weights": weights})
    return found if draw(st.booleans()) and found.run("eager").isfinite().all() else case


@st.composite
def nt_xent(draw: Any) -> Case:
    inputs, n, seed = _pair(draw, ("z0", "z1"))
    options = _options(draw, temperature=TEMPERATURES, normalize=[True, False], reduction=["mean", "none"])
    if many := draw(st.booleans()):
        inputs = {"z0": torch.stack([inputs["z0"], inputs["z1"], inputs["z0"].flip(0)])}
    if draw(st.booleans()):
        options["query_ids"] = torch.randint(-1, 5, (n,), generator=_generator(seed))
    return _perhaps_decoupled(draw, Case("nt_xent", "", sslops.nt_xent, inputs, options, tuple(inputs)), 2 + many, n)


@st.composite
def supcon(draw: Any) -> Case:
    inputs, n, seed = _pair(draw, ("z", "_"))
    options = _options(draw, temperature=TEMPERATURES, normalize=[True, False], reduction=["mean", "none"],
                       where=["in", "out"])  # fmt: skip
    options["labels"] = torch.randint(-1, 4, (n,), generator=_generator(seed))
    del inputs["_"]
    ids = draw(st.booleans())
    if draw(st.booleans()):
        k = draw(SIZES)
        inputs["keys"] = _noise((k, inputs["z"].shape[1]), seed + 4)
        options["key_labels"] = torch.randint(-1, 4, (k,), generator=_generator(seed + 5))
        if ids:
            options["key_ids"] = torch.randint(-1, 5, (k,), generator=_generator(seed + 6))
    if ids:
        options["query_ids"] = torch.randint(-1, 5, (n,), generator=_generator(seed + 7))
    if draw(st.booleans()):
        options["weights"] = torch.randint(3, (n,), generator=_generator(seed + 8)).float()
    return Case("supcon", "", sslops.supcon, inputs, options, ("z",))


@st.composite
def clip(draw: Any) -> Case:
    inputs, *_ = _pair(draw, ("image", "text"))
    options = _options(draw, logit_scale=TEMPERATURES.map(lambda t: 1 / t), normalize=[True, False],
                       reduction=["mean", "none"])  # fmt: skip
    return Case("clip", "", sslops.clip, inputs, options, ("image", "text"))


@st.composite
def siglip(draw: Any) -> Case:
    inputs, *_ = _pair(draw, ("image", "text"))
    options = _options(draw, logit_scale=TEMPERATURES.map(lambda t: 1 / t), normalize=[True, False],
                       bias=st.sampled_from([-100.0, -10.0, 0.0, 3.0]))  # fmt: skip
    return Case("siglip", "", sslops.siglip, inputs, options, ("image", "text"))


@st.composite
def info_nce(draw: Any) -> Case:
    inputs, n, seed = _pair(draw, ("query", "key"))
    options = _options(draw, temperature=TEMPERATURES, normalize=[True, False], reduction=["mean", "none"])
    graded: tuple[str, ...] = ("query", "key")
    if draw(st.booleans()):
        k = draw(SIZES)
        inputs["negatives"] = _noise((k, inputs["query"].shape[1]), seed + 4)
        graded += ("negatives",) * draw(st.booleans())
        if draw(st.booleans()):
            for name, rows in (("query_ids", n), ("negative_ids", k)):
                options[name] = torch.randint(5, (rows,), generator=_generator(seed))
    if draw(st.booleans()):
        options["negative_mask"] = _noise((n, len(inputs.get("negatives", inputs["key"]))), seed + 5) > -0.5
    if draw(st.booleans()):
        m = draw(SIZES) // 4
        inputs["paired_negatives"] = _noise((n, m, inputs["query"].shape[1]), seed + 6)
        graded += ("paired_negatives",) * draw(st.booleans())
        if draw(st.booleans()):
            options["paired_mask"] = _noise((n, m), seed + 7) > -0.5
    return _perhaps_decoupled(draw, Case("info_nce", "", sslops.info_nce, inputs, options, graded), n)


@st.composite
def nearest(draw: Any) -> Case:
    inputs, n, _ = _pair(draw, ("query", "support"), rows=2)
    options = _options(draw, normalize=[True, False], exclude_self=[True, False], k=[1, 2, 5])
    options["k"] = min(options["k"], n - options["exclude_self"])
    return Case("nearest", "", nearest_values, inputs, options)


@st.composite
def relic(draw: Any) -> Case:
    inputs, _, seed = _pair(draw, ("online", "target"))
    options = _options(draw, temperature=TEMPERATURES, normalize=[True, False], reduction=["mean", "none"],
                       num_negatives=[None, 1, 3])  # fmt: skip
    if not options["normalize"]:  # test_a_small_divergence_of_large_logits
        options["temperature"] = max(options["temperature"], 0.5)
    options["alpha"], options["beta"] = draw(st.sampled_from([(1.0, 0.0), (0.0, 0.5), (1.0, 0.5)]))

    def call(online: Tensor, target: Tensor, **options: Any) -> Any:
        return sslops.relic(online, target, generator=_generator(seed), **options)

    return Case("relic", "", call, inputs, options, ("online", "target"))


@st.composite
def columns(draw: Any, op: str) -> Case:
    inputs, *_ = _pair(draw, ("z_a", "z_b"), rows=2)
    options = {} if op == "cross_correlation" else _options(draw, route=["gram", "panels"])
    return Case(op, "", getattr(sslops, op), inputs, options, ("z_a", "z_b"))


@st.composite
def sinkhorn(draw: Any) -> Case:
    scores = MILD[draw(st.sampled_from(sorted(MILD)))]((draw(SIZES), draw(SIZES)), draw(SEEDS))
    options = _options(draw, temperature=[0.05, 0.5], iterations=[1, 3], start=["scores", "probabilities"])
    if options["start"] == "probabilities":  # test_columns_that_no_row_wants
        options["temperature"], scores = 1.0, scores.clamp(-20, 20)
    elif draw(st.booleans()):
        width, seed = scores.shape[1], draw(SEEDS)
        features = {"scores": _noise((len(scores), width), seed), "prototypes": _noise((draw(SIZES), width), seed + 1)}
        return Case("sinkhorn", "", sslops.sinkhorn, features, options | {"unit_prototypes": draw(st.booleans())})
    return Case("sinkhorn", "", sslops.sinkhorn, {"scores": scores}, options)


@st.composite
def sigreg(draw: Any) -> Case:
    n, d, seed = draw(SIZES), draw(SIZES), draw(SEEDS)
    z = MILD[draw(st.sampled_from(sorted(MILD)))]((n, d), seed)
    options = _options(draw, slices=SIZES, knots=[2, 5, 17], t_max=[0.5, 3.0])

    def call(z: Tensor, **options: Any) -> Any:
        return sslops.sigreg(z, generator=_generator(seed), **options)

    return Case("sigreg", "", call, {"z": z}, options, ("z",))


def _last_layer(draw: Any, width: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """The inputs, options and graded inputs beside features, or beside logits none"""
    if not draw(st.booleans()):
        return {}, {}, ("student",)
    k, make = draw(SIZES), MILD[draw(st.sampled_from(sorted(MILD)))]
    layers = {
        name: make((k, width), seed + n) / width**0.5 for n, name in enumerate(("prototypes", "teacher_prototypes"))
    }
    unit = width > 2 and draw(st.booleans())  # as in _pair
    return layers, {"unit_prototypes": unit}, ("student", "prototypes")


@st.composite
def dino(draw: Any) -> Case:
    rows, k, seed = draw(SIZES), draw(SIZES), draw(SEEDS)
    make = MILD[draw(st.sampled_from(sorted(MILD)))]
    layers, more, graded = _last_layer(draw, k, seed + 2)
    inputs = {"student": make((3, rows, k), seed), "teacher": make((2, rows, k), seed + 1)} | layers
    options = _options(draw, student_temp=[0.1, 1.0], teacher_temp=[0.04, 0.5], same_view=[True, False],
                       reduction=["mean", "none"])  # fmt: skip
    return Case("dino", "", sslops.dino, inputs, options | more, graded)


@st.composite
def ibot(draw: Any) -> Case:
    inputs, _, seed = _pair(draw, ("student", "teacher"))
    layers, more, graded = _last_layer(draw, inputs["student"].shape[1], seed)
    options = _options(draw, student_temp=[0.1, 1.0], teacher_temp=[0.04, 0.5], reduction=["mean", "none"])
    return Case("ibot", "", sslops.ibot, inputs | layers, options | more, graded)


@st.composite
def gather_patches(draw: Any) -> Case:
    batch, height, width, p, q, seed = (draw(st.integers(1, 5)) for _ in range(6))
    images = _noise((batch, 3, height * p, width * q), seed)
    count = draw(st.integers(0, height * width))
    options = _options(draw, layout=["chw", "hwc"]) | {
        "patch_size": (p, q), "ids": _ids(batch, count, height * width, seed),
    }  # fmt: skip
    if draw(st.booleans()):
        options |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    return Case("gather_patches", "", sslops.gather_patches, {"images": images}, options, ("images",))


@st.composite
def masked_prediction(draw: Any) -> Case:
    batch, height, width, p, seed = (draw(st.integers(1, 5)) for _ in range(5))
    inputs = {
        "pred": _noise((batch, height * width, 3 * p * p), seed),
        "images": _noise((batch, 3, height * p, width * p), seed + 1),
    }
    mask = (_noise((batch, height * width), seed + 2) > 0).float()
    if draw(st.booleans()):
        options = _options(draw, norm_pix=[True, False]) | {"patch_size": p, "mask": mask}
        return Case("masked_prediction", "", sslops.masked_patch_mse, inputs, options, ("pred",))
    inputs["target"] = _noise(inputs["pred"].shape, seed + 1)
    del inputs["images"]
    options = _options(draw, loss=["squared", "l1", "smooth_l1"]) | {"mask": mask}
    return Case("masked_prediction", "", sslops.masked_prediction, inputs, options, ("pred",))


@st.composite
def gather_tokens(draw: Any) -> Case:
    batch, length, d, seed = draw(st.integers(1, 5)), draw(SIZES), draw(SIZES), draw(SEEDS)
    ids = _ids(batch, draw(st.integers(0, length)), length, seed)
    options = {"ids": ids, "unique": draw(st.booleans())}
    if not options["unique"]:
        options["ids"] = ids // 2
    if draw(st.booleans()):
        options["counts"] = torch.randint(ids.shape[1] + 1, (batch,), generator=_generator(seed))
    return Case("gather_tokens", "", sslops.gather_tokens, {"tokens": _noise((batch, length, d), seed)}, options,
                ("tokens",))  # fmt: skip


@st.composite
def restore_tokens(draw: Any) -> Case:
    batch, length, d, seed = draw(st.integers(1, 5)), draw(SIZES), draw(SIZES), draw(SEEDS)
    prefix, kept = draw(st.integers(0, 2)), draw(st.integers(0, length))
    inputs = {
        "visible": _noise((batch, prefix + kept, d), seed),
        "mask_token": _noise((1, 1, d), seed + 1),
        "pos_embed": _noise((1, prefix + length, d), seed + 2),
    }
    options = {"ids_restore": _ids(batch, length, length, seed), "num_prefix": prefix}
    if draw(st.booleans()):
        options["counts"] = torch.randint(kept + 1, (batch,), generator=_generator(seed))
    return Case("restore_tokens", "", sslops.restore_tokens, inputs, options, tuple(inputs))


@st.composite
def masked_token_cross_entropy(draw: Any) -> Case:
    rows, d, words, seed = draw(SIZES), draw(SIZES), draw(SIZES), draw(SEEDS)
    inputs = {
        "hidden": _noise((rows, d), seed), "weight": _noise((words, d), seed + 1), "bias": _noise((words,), seed + 2)
    }  # fmt: skip
    labels = torch.randint(words, (rows,), generator=_generator(seed))
    labels[_noise((rows,), seed + 3) > 0] = -100
    labels[seed % rows] = 0  # one at least
    options = _options(draw, label_smoothing=[0.0, 0.1], reduction=["mean", "none"]) | {"labels": labels}
    return Case("masked_token_cross_entropy", "", sslops.masked_token_cross_entropy, inputs, options, tuple(inputs))


@st.composite
def skip_gram(draw: Any) -> Case:
    pairs, words, d, seed = draw(SIZES), draw(SIZES), draw(SIZES), draw(SEEDS)
    make = MILD[draw(st.sampled_from(sorted(MILD)))]
    inputs = {"input_weight": make((words, d), seed), "output_weight": make((words, d), seed + 1)}
    shapes = {"centers": (pairs,), "contexts": (pairs,), "negatives": (pairs, draw(st.integers(0, 17)))}
    ids = {name: torch.randint(words, shape, generator=_generator(seed)) for name, shape in shapes.items()}
    options = _options(draw, reduction=["mean", "sum", "none"])
    return Case("skip_gram", "", sslops.skip_gram, inputs, options | ids, tuple(inputs))


CALLS: dict[str, st.SearchStrategy[Case]] = {
    "nt_xent": nt_xent(),
    "supcon": supcon(),
    "clip": clip(),
    "siglip": siglip(),
    "info_nce": info_nce(),
    "nearest": nearest(),
    "relic": relic(),
    "barlow_twins": columns("barlow_twins"),
    "vicreg": columns("vicreg"),
    "cross_correlation": columns("cross_correlation"),
    "sigreg": sigreg(),
    "sinkhorn": sinkhorn(),
    "skip_gram": skip_gram(),
    "dino": dino(),
    "ibot": ibot(),
    "gather_patches": gather_patches(),
    "masked_prediction": masked_prediction(),
    "gather_tokens": gather_tokens(),
    "restore_tokens": restore_tokens(),
    "masked_token_cross_entropy": masked_token_cross_entropy(),
}
