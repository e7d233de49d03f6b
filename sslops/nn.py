"""The losses as modules, and what else training code has as modules."""

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _check, _patches
from ._check import Of
from ._precision import compute_dtype
from .ema import EMA
from .ops.barlow_twins import barlow_twins
from .ops.clip import clip
from .ops.dino import dino
from .ops.gather_patches import gather_patches
from .ops.ibot import ibot
from .ops.info_nce import info_nce
from .ops.masked_prediction import masked_patch_mse, masked_prediction
from .ops.masked_token_cross_entropy import masked_token_cross_entropy
from .ops.nearest import koleo
from .ops.nt_xent import nt_xent
from .ops.relic import relic
from .ops.siglip import siglip
from .ops.sigreg import lejepa, sigreg
from .ops.skip_gram import skip_gram
from .ops.supcon import supcon
from .ops.vicreg import vicreg
from .prototypes import PrototypeCenter, swav

__all__ = [
    "EMA",
    "BarlowTwinsLoss",
    "CLIPLoss",
    "DINOLoss",
    "IBOTLoss",
    "InfoNCELoss",
    "KoLeoLoss",
    "LeJEPALoss",
    "MaskedPatchEmbed",
    "MaskedPatchMSE",
    "MaskedPredictionLoss",
    "MaskedTokenCrossEntropy",
    "NTXentLoss",
    "PrototypeCenter",
    "RELICLoss",
    "SIGReg",
    "SigLIPLoss",
    "SkipGramLoss",
    "SupConLoss",
    "SwAVLoss",
    "VICRegLoss",
]


class _Loss(nn.Module):
    """An op whose tensors are given to forward() and whose other arguments, in their order, to the constructor.

    They are attributes, read at every call: change them at any time, or give forward() others by name. A temperature
    may be an nn.Parameter.
    """

    _op: Callable[..., Any]
    _signature: inspect.Signature
    __signature__: inspect.Signature  # of the class that is called

    def __init_subclass__(cls, op: Callable[..., Any] | None = None) -> None:
        if op is None:  # a user's subclass
            if "__init__" in vars(cls):
                own = list(inspect.signature(cls.__init__).parameters.values())
                cls.__signature__ = inspect.Signature(own[1:])
            return
        crops = Tensor | Sequence[Tensor]
        tensors = (Tensor, Tensor | None, crops, crops | None)
        parameters = inspect.signature(op).parameters.values()
        options = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in parameters if p.annotation not in tensors]
        cls._op, cls._signature = staticmethod(op), inspect.Signature(options)
        cls.__signature__ = cls._signature

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        bound.apply_defaults()
        self._names = tuple(bound.arguments)
        for name, value in bound.arguments.items():
            setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def forward(self, *tensors: Any, **named: Any) -> Any:
        return self._op(*tensors, **(self._options() | named))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())


class NTXentLoss(_Loss, op=nt_xent):
    """SimCLR's loss, (z0 [N, D], z1 [N, D]) -> [] or [2N], (z [V, N, D]) -> [] or [V, N]: see `sslops.nt_xent`."""


class BarlowTwinsLoss(_Loss, op=barlow_twins):
    """Barlow Twins' loss of two views, (z_a [N, D], z_b [N, D]) -> []: see `sslops.barlow_twins`."""


class CLIPLoss(_Loss, op=clip):
    """CLIP's loss, (image [N, D], text [N, D], logit_scale=[]) -> [] or [N]: see `sslops.clip`."""


class DINOLoss(_Loss, op=dino):
    """DINO's loss, (student [V, B, K], teacher [T, B, K], bias=[K], ..) -> [] or [B]: see `sslops.dino`."""


class IBOTLoss(_Loss, op=ibot):
    """iBOT's loss, (student [R, K], teacher [R, K], bias=[K], weights=[R], ..) -> [] or [R]: see `sslops.ibot`."""


class InfoNCELoss(_Loss, op=info_nce):
    """CPC's and MoCo's loss, (query [B, D], key [B, D], negatives [K, D]) -> [] or [B], ids, masks and paired negatives
    by name: see `sslops.info_nce`."""


class KoLeoLoss(_Loss, op=koleo):
    """The regulariser of DINOv2, (x [N, D]) -> []: see `sslops.koleo`."""


class LeJEPALoss(_Loss, op=lejepa):
    """LeJEPA's loss, (global_views [G, N, D], local_views [L, N, D]) -> []: see `sslops.lejepa`."""


class MaskedPatchMSE(_Loss, op=masked_patch_mse):
    """MAE's loss, (pred [B, L, P], images [B, C, H, W], mask [B, L]) -> []: see `sslops.masked_patch_mse`."""


class MaskedPredictionLoss(_Loss, op=masked_prediction):
    """MAE's, data2vec's and others', (pred [B, L, P], target, mask [B, L]) -> []: see `sslops.masked_prediction`."""


class MaskedTokenCrossEntropy(_Loss, op=masked_token_cross_entropy):
    """BERT's loss, (hidden [N, D], weight [V, D], labels [N], bias=[V]) -> [] or [N]: see the op of that name."""


class RELICLoss(_Loss, op=relic):
    """RELIC's loss of a view from the online network and one from the target's, [B, D] each: see `sslops.relic`."""


class SigLIPLoss(_Loss, op=siglip):
    """SigLIP's loss, (image [N, D], text [N, D], logit_scale=[], bias=[]) -> []: see `sslops.siglip`."""


class SIGReg(_Loss, op=sigreg):
    """LeJEPA's regulariser, (z [N, D] or [V, N, D]) -> []: see `sslops.sigreg`."""


class SkipGramLoss(_Loss, op=skip_gram):
    """Word2Vec's loss, (input_weight [V, D], output_weight [W, D], centers [B], contexts [B], negatives [B, N]) -> []
    or [B]: see `sslops.skip_gram`.
    """


class SupConLoss(_Loss, op=supcon):
    """SupCon's loss, (z [M, D] or [V, N, D], labels [M] or [N], keys=[K, D], key_labels=[K], query_ids=, key_ids=,
    weights=) -> [] or [M] or [V, N]: see `sslops.supcon`.
    """


class SwAVLoss(_Loss, op=swav):
    """SwAV's loss, (scores [V, B, K], queue=[assign, Q, K]) -> [] or [B]: see `sslops.swav`."""


class VICRegLoss(_Loss, op=vicreg):
    """VICReg's loss of two views or one, (z_a [N, D], z_b [N, D]) -> []: see `sslops.vicreg`."""


_PATCHED = {
    "images": Of("B C ...", _patches.PIXEL_DTYPES),
    "ids": Of("B K", _check.ID_DTYPES, optional=True),
}


def embedded_patches(
    proj: Any,
    images: Tensor,
    ids: Tensor,
    table: Tensor | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """The tokens [B, K, D] of patches ids [B, K], by the weights of a convolution; table: their positions, [L, D]"""
    # What autocast would round the pixels to for the product, straight from the images.
    patches = gather_patches(images, ids, proj.kernel_size, mean=mean, std=std, dtype=compute_dtype(proj.weight))
    # As a matrix: to add in place to a view would cost autograd a copy.
    tokens = F.linear(patches.flatten(0, 1), proj.weight.flatten(1), proj.bias)
    if table is not None:
        positions = F.embedding(ids.flatten(), table)
        tokens = tokens.add_(positions) if tokens.dtype == positions.dtype else tokens + positions
    return tokens.unflatten(0, ids.shape)


class MaskedPatchEmbed(nn.Module):
    """Patch embedding, positions and masking in one: only the patches that stay visible are embedded.

    In place of `x = patch_embed(images)`, `x = x + pos_embed` and a gather of the visible tokens, with the same tokens
    and weight gradients. The weights are those of timm's and MAE's PatchEmbed, and of VideoMAE's with its tubelets,
    under the same names.

    Args:
        img_size, patch_size: in pixels: a number, (height, width), (length,) of signals, or (frames, height, width) of
            videos and volumes. A number stands for as many as the other one has, or for (height, width). The patches
            tile the images.
        in_chans: channels C of the images.
        embed_dim: length D of a token.
        bias: whether the projection has one.
        mean, std: C numbers each; a pixel x becomes (x - mean) / std.

    Shapes:
        images: [B, C, *img_size], of the weights' dtype, or uint8, which is divided by 255; or of any other size that
            the patches tile.
        ids: [B, K] int64 or int32, the visible patches of each image in row-major order of the grid; all if None.
        pos_embed: [L, D] or [1, L, D], added to the tokens of the patches that they belong to, or None. For images of
            another grid than img_size has, L patches of img_size's are interpolated (linear, bicubic, trilinear); any
            other L must be that of the images.
        returns: [B, K, D].
    """

    def __init__(
        self,
        img_size: int | tuple[int, ...] = 224,
        patch_size: int | tuple[int, ...] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        op = "MaskedPatchEmbed"
        axes = next((len(given) for given in (img_size, patch_size) if isinstance(given, (tuple, list))), 2)
        if not 1 <= axes <= 3:
            _check.bad_value(op, "img_size", "1 to 3 sizes", axes)
        self.img_size = tuple(_patches.sides(op, "img_size", img_size, axes))
        self.patch_size = tuple(_patches.sides(op, "patch_size", patch_size, axes))
        if len(self.patch_size) != axes or any(map(operator.mod, self.img_size, self.patch_size)):
            _check.bad_value(op, "patch_size", f"a size that divides the images', {self.img_size}", self.patch_size)
        self.grid_size = tuple(map(operator.floordiv, self.img_size, self.patch_size))
        self.num_patches = math.prod(self.grid_size)
        for name, size in (("in_chans", in_chans), ("embed_dim", embed_dim)):
            _check.count(op, name, size, 1, 2**31 - 1)
        self.mean, self.std = mean, std
        convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.proj = convolution(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias)

    def forward(self, images: Tensor, ids: Tensor | None = None, pos_embed: Tensor | None = None) -> Tensor:
        op, ids, channels = "MaskedPatchEmbed", _check.ids64(ids), self.proj.in_channels
        _check.tensors(op, {"images": images, "ids": ids}, _PATCHED)
        if images.dim() != 2 + len(self.patch_size) or images.shape[1] != channels:
            sizes = [channels, *("size" for _ in self.patch_size)]
            _check.bad_value(op, "images", f"shape [B, {', '.join(map(str, sizes))}]", list(images.shape))
        mean, std = _patches.numbers(op, "mean", self.mean), _patches.numbers(op, "std", self.std)
        _patches.check(op, images, self.patch_size, mean, std)
        _check.same_device(op, "the weights", self.proj.weight, images=images)
        grid = _patches.grid(images, self.patch_size)
        if ids is None:
            ids = torch.arange(math.prod(grid), device=images.device).expand(len(images), -1)
        elif not torch.compiler.is_compiling():
            _check.id_range(op, math.prod(grid), ids=ids)
        if pos_embed is not None:
            pos_embed = self._positions(images, grid, pos_embed)
        return embedded_patches(self.proj, images, ids, pos_embed, mean or None, std or None)

    def _positions(self, images: Tensor, grid: Sequence[int], pos_embed: Tensor) -> Tensor:
        """A row for each patch of the images' grid, [L, D]"""
        op, width, count = "MaskedPatchEmbed", self.proj.out_channels, math.prod(grid)
        if not isinstance(pos_embed, Tensor) or not pos_embed.is_floating_point():
            got = getattr(pos_embed, "dtype", type(pos_embed).__name__)
            _check.bad_type(op, "pos_embed", "a floating-point tensor", got)
        tables = [(rows, width) for rows in (count, self.num_patches)]
        if tuple(pos_embed.shape) not in (*tables, *((1, *table) for table in tables)):
            rows = f"{list(tables[0])} or {[1, *tables[0]]}, a row for each patch and none for a class token"
            _check.bad_value(op, "pos_embed", rows, list(pos_embed.shape))
        _check.same_device(op, "images", images, pos_embed=pos_embed)
        table = pos_embed.flatten(0, -2)
        if len(table) != self.num_patches or tuple(grid) == self.grid_size:
            return table
        mode = ("linear", "bicubic", "trilinear")[len(grid) - 1]
        at_grid = table.t().reshape(1, width, *self.grid_size)
        return F.interpolate(at_grid, list(grid), mode=mode, align_corners=False).flatten(2)[0].t()
