"""What every promise is tried on: for each op a few calls of its public function, small, with the ways it branches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sslops


class Case(NamedTuple):
    op: str
    name: str
    call: Callable[..., Any]  # (**inputs, **options, backend=...) -> the result, or a tuple of which it is the first
    inputs: dict[str, Tensor]  # floating-point: what dtypes, strides, NaN and other devices are tried on
    options: dict[str, Any]
    graded: tuple[str, ...] = ()  # the inputs that have a gradient
    batched: bool = True  # the first dimension of all inputs is a batch of any size

    def run(self, backend: str | None, inputs: dict[str, Tensor] | None = None) -> Tensor:
        result = self.call(**(self.inputs if inputs is None else inputs), **self.options, backend=backend)
        return result[0] if isinstance(result, tuple) else result

    def run_with_gradients(self, backend: str | None, inputs: dict[str, Tensor] | None = None) -> list[Tensor]:
        """The result and the gradients under a fixed random cotangent"""
        leaves = {name: x.detach().requires_grad_(name in self.graded) for name, x in (inputs or self.inputs).items()}
        out = self.run(backend, leaves)
        if not self.graded:
            return [out]
        cotangent = torch.rand(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
        return [out.detach(), *torch.autograd.grad(out, [leaves[name] for name in self.graded], cotangent)]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ids(rows: int, count: int, of: int) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(of, generator=g)[:count] for _ in range(rows)])


def _drawn(function: Callable[..., Any]) -> Callable[..., Any]:
    """With a generator of its own, so that it draws the same at every call"""

    def drawn(*args: Any, **kwargs: Any) -> Any:
        return function(*args, generator=torch.Generator().manual_seed(5), **kwargs)

    return drawn


_Z = {"z0": _random(12, 20), "z1": _random(12, 20, seed=1)}
_AB = {"z_a": _random(12, 10), "z_b": _random(12, 10, seed=1)}
_QK = {"query": _random(12, 20), "key": _random(12, 20, seed=1)}
_OT = {"online": _random(12, 20), "target": _random(12, 20, seed=1)}
_IT = {"image": _random(12, 20), "text": _random(12, 20, seed=1)}
_RELIC = {"temperature": 0.3, "alpha": 1.0, "beta": 0.5}

_NEAR = {"query": _random(12, 20), "support": _random(14, 20, seed=1)}


@functools.wraps(sslops.nearest)
def nearest_values(*args: Any, **kwargs: Any) -> Tensor:
    return sslops.nearest(*args, **kwargs).values


_PRED = {"pred": _random(3, 6, 48), "target": _random(3, 3, 12, 8, seed=1), "mask": (_random(3, 6) > 0).float()}
_TOKENS = {
    "visible": _random(3, 5, 10),
    "mask_token": _random(1, 1, 10, seed=1),
    "pos_embed": _random(1, 8, 10, seed=2),
}
_PIXELS = {"images": torch.randint(256, (3, 3, 12, 8), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)}
_UNIT = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
_NOISE = {"noise": torch.rand(4, 10, generator=torch.Generator().manual_seed(0))}
_MASK = {"batch": 4, "length": 10, "mask_ratio": 0.7}
_COUNTS, _PADDED = torch.tensor([4, 0, 3]), torch.tensor([[5, 0, 3, 1], [-1, 9, -1, -1], [2, 4, 0, 2**40]])
_CORRUPTION = {"ids": _ids(4, 10, 50), "mask_token_id": 3, "vocab_size": 50}

_CROPS = {"student": _random(4, 6, 30), "teacher": _random(2, 6, 30, seed=1)}
_PATCHES = {"student": _random(9, 30), "teacher": _random(9, 30, seed=1)}
_LAYERS = {"prototypes": _random(30, 20, seed=2) / 20, "teacher_prototypes": _random(30, 10, seed=3) / 20}
_EMBEDDINGS = {"input_weight": _random(9, 20), "output_weight": _random(11, 20, seed=1)}
_PAIRS = {"centers": _ids(1, 7, 9)[0] % 5, "contexts": _ids(1, 7, 11)[0], "negatives": _ids(7, 3, 11)}  # fmt: skip
_LABELS = torch.tensor([3, -100, 29, -100, -100, 0, -100, 29, -100, 7, 1, -100])
_WORDS = {"hidden": _random(12, 20), "weight": _random(30, 20, seed=1), "bias": _random(30, seed=2)}

# fmt: off
CASES = [
    Case("nt_xent", "mean", sslops.nt_xent, _Z, {"temperature": 0.2}, ("z0", "z1")),
    Case("nt_xent", "rows", sslops.nt_xent, _Z, {"temperature": 0.02, "reduction": "none"}, ("z0", "z1")),
    Case("nt_xent", "metrics", sslops.nt_xent, _Z, {"normalize": False, "return_metrics": True}, ("z0", "z1")),
    Case("nt_xent", "views", sslops.nt_xent, {"z0": _random(3, 12, 20)}, {"reduction": "none"}, ("z0",), batched=False),
    Case("nt_xent", "ids", sslops.nt_xent, _Z, {"query_ids": torch.arange(12) % 5 - 1, "temperature": 0.02},
         ("z0", "z1"), batched=False),
    Case("nt_xent", "decoupled", sslops.nt_xent, _Z, {"temperature": 0.02, "decoupled": True}, ("z0", "z1")),
    Case("nt_xent", "weights", sslops.nt_xent, _Z, {"decoupled": True, "positive_weights": _random(2, 12).abs()},
         ("z0", "z1"), batched=False),
    Case("info_nce", "decoupled", sslops.info_nce, _QK, {"decoupled": True}, ("query", "key")),
    Case("info_nce", "in-batch", sslops.info_nce, _QK, {}, ("query", "key")),
    Case("info_nce", "queue", sslops.info_nce, _QK | {"negatives": _random(40, 20, seed=2)},
         {"temperature": 0.2, "reduction": "none"}, ("query", "key", "negatives"), batched=False),
    Case("info_nce", "mask", sslops.info_nce, _QK | {"negatives": _random(70, 20, seed=2)},
         {"negative_mask": _random(12, 70) > -0.5}, ("query", "key", "negatives"), batched=False),
    Case("info_nce", "paired", sslops.info_nce, _QK | {"paired_negatives": _random(12, 19, 20, seed=2)},
         {"temperature": 0.02}, ("query", "key", "paired_negatives")),
    Case("info_nce", "paired-mask", sslops.info_nce,
         _QK | {"negatives": _random(5, 20, seed=3), "paired_negatives": _random(12, 3, 20, seed=2)},
         {"paired_mask": _random(12, 3) > 0, "decoupled": True, "positive_weights": torch.linspace(0.5, 2, 12),
          "normalize": False, "temperature": 2.0, "return_metrics": True},
         ("query", "paired_negatives"), batched=False),
    Case("nearest", "ids", sslops.nearest, _NEAR, {}),
    Case("nearest", "values", nearest_values, _NEAR, {"k": 3, "normalize": True}),
    Case("nearest", "self", nearest_values, {"query": _Z["z0"], "support": _Z["z1"]}, {"exclude_self": True, "k": 2}),
    Case("relic", "all", sslops.relic, _OT, _RELIC, ("online", "target")),
    Case("relic", "drawn", _drawn(sslops.relic), _OT, _RELIC | {"num_negatives": 3}, ("online",)),
    Case("barlow_twins", "gram", sslops.barlow_twins, _AB, {"route": "gram"}, ("z_a", "z_b")),
    Case("barlow_twins", "panels", sslops.barlow_twins, _AB, {"route": "panels"}, ("z_a", "z_b")),
    Case("cross_correlation", "matrix", sslops.cross_correlation, _AB, {}, ("z_a", "z_b")),
    Case("vicreg", "gram", sslops.vicreg, _AB, {"route": "gram"}, ("z_a", "z_b")),
    Case("vicreg", "panels", sslops.vicreg, _AB, {"route": "panels"}, ("z_a", "z_b")),
    Case("vicreg", "one view", sslops.vicreg, {"z_a": _AB["z_a"]}, {"route": "gram"}, ("z_a",)),
    Case("sinkhorn", "scores", sslops.sinkhorn, {"scores": _random(12, 30)}, {"temperature": 0.1}),
    Case("sinkhorn", "features", sslops.sinkhorn, {"scores": _random(12, 20), "prototypes": _LAYERS["prototypes"]},
         {"temperature": 0.5, "unit_prototypes": True}, batched=False),
    Case("sigreg", "directions", sslops.sigreg, {"z": _random(12, 20)}, {"directions": _random(70, 20, seed=1) / 4},
         ("z",)),
    Case("sigreg", "views", sslops.sigreg, {"z": _random(3, 12, 20)},
         {"directions": _random(5, 20, seed=1), "knots": 5, "t_max": 2.0}, ("z",), batched=False),
    Case("sigreg", "drawn", _drawn(sslops.sigreg), {"z": _random(12, 20)}, {"slices": 70}, ("z",)),
    Case("dino", "crops", sslops.dino, _CROPS, {}, ("student",), batched=False),
    Case("dino", "features", sslops.dino,
         {"student": _random(4, 6, 20), "teacher": _random(2, 6, 10, seed=1)} | _LAYERS,
         {"unit_prototypes": True}, ("student", "prototypes"), batched=False),
    Case("ibot", "rows", sslops.ibot, _PATCHES, {}, ("student",)),
    Case("ibot", "features", sslops.ibot, {"student": _random(9, 20), "teacher": _random(9, 10, seed=1)} | _LAYERS,
         {"reduction": "none"}, ("student", "prototypes"), batched=False),
    Case("ibot", "frozen", sslops.ibot,
         {"student": _random(9, 20), "teacher": _PATCHES["teacher"], "prototypes": _LAYERS["prototypes"]},
         {"unit_prototypes": True}, ("student",), batched=False),
    Case("supcon", "rows", sslops.supcon, {"z": _random(12, 20)},
         {"labels": torch.arange(12) % 5 - 1, "temperature": 3.0, "normalize": False}, ("z",), batched=False),
    Case("supcon", "views", sslops.supcon, {"z": _random(3, 12, 20)},
         {"labels": torch.arange(12).int() % 5 - 1, "reduction": "none"}, ("z",), batched=False),
    Case("supcon", "in", sslops.supcon, {"z": _random(12, 20)},
         {"labels": torch.arange(12) % 5, "where": "in", "return_metrics": True}, ("z",), batched=False),
    Case("supcon", "in-views", sslops.supcon, {"z": _random(2, 12, 20)},
         {"labels": torch.arange(12) % 5 - 1, "where": "in", "temperature": 3.0, "normalize": False},
         ("z",), batched=False),
    Case("supcon", "ids", sslops.supcon, {"z": _random(12, 20)},
         {"labels": torch.arange(12) % 4, "query_ids": torch.arange(12).int() % 3 - 1,
          "weights": torch.arange(12.0) % 5, "temperature": 0.02}, ("z",), batched=False),
    Case("supcon", "keys", sslops.supcon, {"z": _random(12, 20), "keys": _random(70, 20, seed=1)},
         {"labels": torch.arange(12) % 5 - 1, "key_labels": torch.arange(70) % 7, "reduction": "none",
          "query_ids": torch.arange(12), "key_ids": torch.arange(70) % 30 - 1, "weights": torch.arange(12.0) % 5},
         ("z",), batched=False),
    Case("supcon", "in-keys", sslops.supcon, {"z": _random(2, 12, 20), "keys": _random(70, 20, seed=1)},
         {"labels": torch.arange(12) % 5 - 1, "key_labels": torch.arange(70).int() % 7, "where": "in",
          "temperature": 3.0, "normalize": False}, ("z",), batched=False),
    Case("clip", "mean", sslops.clip, _IT, {}, ("image", "text")),
    Case("clip", "rows", sslops.clip, _IT, {"logit_scale": 50.0, "reduction": "none"}, ("image", "text")),
    Case("clip", "metrics", sslops.clip, _IT, {"logit_scale": 3.0, "return_metrics": True}, ("image", "text")),
    Case("clip", "frozen", sslops.clip, _IT, {"logit_scale": 0.5, "normalize": False}, ("text",)),
    Case("siglip", "mean", sslops.siglip, _IT, {}, ("image", "text")),
    Case("siglip", "metrics", sslops.siglip, _IT, {"return_metrics": True}, ("image", "text")),
    Case("siglip", "frozen", sslops.siglip, _IT, {"logit_scale": 0.5, "bias": 0.3, "normalize": False}, ("text",)),
    Case("skip_gram", "mean", sslops.skip_gram, _EMBEDDINGS, _PAIRS, tuple(_EMBEDDINGS), batched=False),
    Case("skip_gram", "rows", sslops.skip_gram, _EMBEDDINGS,
         {name: x.int() for name, x in _PAIRS.items()} | {"reduction": "none"}, tuple(_EMBEDDINGS), batched=False),
    Case("skip_gram", "frozen", sslops.skip_gram, _EMBEDDINGS, _PAIRS | {"reduction": "sum"}, ("output_weight",),
         batched=False),
    Case("gather_patches", "chw", sslops.gather_patches, {"images": _random(3, 3, 12, 8)},
         {"ids": _ids(3, 4, 6), "patch_size": 4}, ("images",), batched=False),
    Case("gather_patches", "hwc", sslops.gather_patches, {"images": _random(3, 3, 12, 8)},
         {"ids": _ids(3, 4, 6).int(), "patch_size": 4, "layout": "hwc"} | _UNIT, ("images",), batched=False),
    Case("gather_patches", "uint8", sslops.gather_patches, {},
         {"ids": _ids(3, 4, 6), "patch_size": (4, 2), "layout": "hwc"} | _PIXELS | _UNIT, batched=False),
    Case("gather_patches", "video", sslops.gather_patches, {"images": _random(3, 2, 4, 6, 8)},
         {"ids": _ids(3, 4, 8), "patch_size": (2, 3, 4)}, ("images",), batched=False),
    Case("masked_prediction", "patch", sslops.masked_prediction, _PRED, {"patch_size": 4, "norm": "patch"}, ("pred",)),
    Case("masked_prediction", "pixels", sslops.masked_prediction, _PRED, {"patch_size": 4}, ("pred",)),
    Case("masked_prediction", "rows", sslops.masked_prediction, _PRED,
         {"patch_size": 4, "loss": "cosine", "norm": "channel", "layout": "chw", "reduction": "none"}, ("pred",)),
    Case("masked_prediction", "features", sslops.masked_prediction, _PRED | {"target": _random(3, 6, 48, seed=1)},
         {"loss": "smooth_l1", "norm": "layer"}, ("pred",)),
    Case("masked_prediction", "signal", sslops.masked_prediction,
         {"pred": _random(3, 6, 8), "target": _random(3, 2, 24, seed=1), "mask": _PRED["mask"]},
         {"patch_size": 4, "loss": "l1", "mean": [0.4, 0.5], "std": [2.0, 3.0]}, ("pred",)),
    Case("masked_token_cross_entropy", "mean", sslops.masked_token_cross_entropy, _WORDS,
         {"labels": _LABELS}, ("hidden", "weight", "bias"), batched=False),
    Case("masked_token_cross_entropy", "rows", sslops.masked_token_cross_entropy, _WORDS,
         {"labels": _LABELS, "reduction": "none", "label_smoothing": 0.1}, ("hidden", "weight", "bias"), batched=False),
    Case("masked_token_cross_entropy", "frozen", sslops.masked_token_cross_entropy,
         {"hidden": _random(3, 4, 20), "weight": _random(30, 20, seed=1)},
         {"labels": _LABELS.view(3, 4).int(), "reduction": "sum"}, ("hidden",), batched=False),
    Case("gather_tokens", "rows", sslops.gather_tokens, {"tokens": _random(3, 6, 10)},
         {"ids": _ids(3, 4, 6)}, ("tokens",), batched=False),
    Case("gather_tokens", "unique", sslops.gather_tokens, {"tokens": _random(3, 6, 10)},
         {"ids": _ids(3, 4, 6).int(), "unique": True}, ("tokens",), batched=False),
    Case("gather_tokens", "counts", sslops.gather_tokens, {"tokens": _random(3, 6, 10)},
         {"ids": _PADDED, "counts": _COUNTS, "unique": True}, ("tokens",), batched=False),
    Case("restore_tokens", "counts", sslops.restore_tokens, _TOKENS,
         {"ids_restore": _ids(3, 7, 7), "num_prefix": 1, "counts": _COUNTS.int()},
         ("visible", "mask_token", "pos_embed"), batched=False),
    Case("restore_tokens", "prefix", sslops.restore_tokens, _TOKENS,
         {"ids_restore": _ids(3, 7, 7), "num_prefix": 1}, ("visible", "mask_token", "pos_embed"), batched=False),
    Case("restore_tokens", "fixed", sslops.restore_tokens, {k: _TOKENS[k] for k in ("visible", "mask_token")},
         {"ids_restore": _ids(3, 7, 7).int()}, ("mask_token",), batched=False),
    Case("random_mask", "noise", sslops.random_mask, _NOISE, _MASK, batched=False),
    Case("random_mask", "lengths", sslops.random_mask, _NOISE,
         _MASK | {"lengths": torch.tensor([10, 0, 7, 3]).int(), "min_keep": 2, "max_keep": 5}, batched=False),
    Case("random_mask", "ratios", sslops.random_mask, {"mask_ratio": torch.tensor([0.9, 0.2, 0.5, 0.0])} | _NOISE,
         {"batch": 4, "length": 10}, batched=False),
    Case("random_mask", "padded", _drawn(sslops.random_mask), {}, _MASK | {"lengths": torch.tensor([10, 0, 7, 3])},
         batched=False),
    Case("random_mask", "tubes", _drawn(sslops.tube_mask), {}, {"batch": 4, "grid": (3, 2, 5), "mask_ratio": 0.7},
         batched=False),
    Case("random_mask", "blocks", _drawn(sslops.block_mask), {}, {"batch": 4, "grid": (4, 5), "mask_ratio": 0.7},
         batched=False),
    Case("multi_block_mask", "drawn", _drawn(sslops.multi_block_mask), {}, {"batch": 4, "grid": (6, 8)}, batched=False),
    Case("random_mask", "drawn", _drawn(sslops.random_mask), {}, _MASK, batched=False),
    Case("random_token_corruption", "drawn", _drawn(sslops.random_token_corruption), {}, _CORRUPTION, batched=False),
    Case("random_token_corruption", "special", _drawn(sslops.random_token_corruption), {},
         _CORRUPTION | {"special_tokens_mask": _ids(4, 10, 50) > 40}, batched=False),
    Case("random_token_corruption", "words", _drawn(sslops.random_token_corruption), {},
         _CORRUPTION | {"words": _ids(4, 10, 50) % 3, "special_ids": [0, 3, 4], "span_lengths": [1, 1, 0.5]},
         batched=False),
]
# fmt: on
