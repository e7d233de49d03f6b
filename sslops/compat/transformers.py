"""transformers 5's ViTMAE on our ops, from pixels to loss: `patch_transformers()` exchanges methods of its classes.

Models that exist already take part, and the same seed gives the same masks. Only the visible patches are cut out and
embedded, the decoder's input is put together in one pass, and the loss reads only the masked patches. It is float32 for
bf16 and float16 models, and 0, not NaN, where nothing is masked. With interpolate_pos_encoding=True the embedding is
transformers' own.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..masking import random_masking as masked_tokens
from ..nn import embedded_patches
from ..ops.masked_prediction import masked_patch_mse
from ..ops.random_mask import random_mask
from ..ops.restore_tokens import restore_tokens
from ._rebind import Patch, theirs

__all__ = ["patch_transformers"]

_home: Any = None  # transformers' module, once it is patched


def _noise(sequence: Tensor, length: int) -> Tensor:
    return torch.rand(len(sequence), length, device=sequence.device)  # as transformers draws it


def random_masking(self: Any, sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    noise = _noise(sequence, sequence.shape[1]) if noise is None else noise
    return masked_tokens(sequence, self.config.mask_ratio, noise=noise)


def embedded(
    self: Any, pixel_values: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool = False
) -> Any:
    """ViTMAEEmbeddings.forward: [B, 1 + K, D], mask [B, L], ids_restore [B, L]"""
    if interpolate_pos_encoding:
        return theirs[embedded](self, pixel_values, noise, True)
    patches = self.patch_embeddings
    wanted = [len(pixel_values), patches.num_channels, *patches.image_size]
    if list(pixel_values.shape) != wanted:
        _check.bad_value("ViTMAE", "pixel_values", f"shape {wanted}", list(pixel_values.shape))
    noise = _noise(pixel_values, patches.num_patches) if noise is None else noise
    ids_keep, mask, ids_restore = random_mask(
        len(pixel_values), patches.num_patches, self.config.mask_ratio, noise=noise, device=pixel_values.device
    )
    positions = self.position_embeddings
    tokens = embedded_patches(patches.projection, pixel_values, ids_keep, positions[0, 1:])
    prefix = (self.cls_token + positions[:, :1]).expand(len(tokens), -1, -1)
    return torch.cat([prefix, tokens], dim=1), mask, ids_restore


def decoded(self: Any, hidden_states: Tensor, ids_restore: Tensor, interpolate_pos_encoding: bool = False) -> Any:
    """ViTMAEDecoder.forward"""
    visible = self.decoder_embed(hidden_states)
    if interpolate_pos_encoding:
        positions = self.interpolate_pos_encoding(visible.new_empty(1, 1 + ids_restore.shape[1], 0))
    else:
        positions = self.decoder_pos_embed
    tokens = restore_tokens(visible, self.mask_token, ids_restore, positions, num_prefix=1)
    for layer in self.decoder_layers:
        tokens = layer(tokens)
    logits = self.decoder_pred(self.decoder_norm(tokens))[:, 1:]
    return _home.ViTMAEDecoderOutput(logits=logits)


def pretrained(
    self: Any,
    pixel_values: Tensor,
    noise: Tensor | None = None,
    interpolate_pos_encoding: bool | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """ViTMAEForPreTraining.forward"""
    seen = self.vit(
        pixel_values, noise=noise, interpolate_pos_encoding=interpolate_pos_encoding, attention_mask=attention_mask,
        **kwargs,
    )  # fmt: skip
    found = self.decoder(seen.last_hidden_state, seen.ids_restore, interpolate_pos_encoding=interpolate_pos_encoding)
    loss = masked_patch_mse(
        found.logits, pixel_values, seen.mask, self.config.patch_size, norm_pix=self.config.norm_pix_loss
    )
    return _home.ViTMAEForPreTrainingOutput(
        loss=loss, logits=found.logits, mask=seen.mask, ids_restore=seen.ids_restore,
        hidden_states=seen.hidden_states, attentions=seen.attentions,
    )  # fmt: skip


_OURS: dict[tuple[str, str], Callable[..., Any]] = {
    ("ViTMAEEmbeddings", "random_masking"): random_masking,
    ("ViTMAEEmbeddings", "forward"): embedded,
    ("ViTMAEDecoder", "forward"): decoded,
    ("ViTMAEForPreTraining", "forward"): pretrained,
}


def patch_transformers() -> Patch:
    """Puts our ops into the methods of transformers' ViTMAE classes; models that exist already take part.

    Returns:
        A handle: `unpatch()` undoes it, as does the end of a `with` block. Patching again is harmless.

    Raises:
        ImportError: transformers is not there, or its ViTMAE is not that of version 5; nothing is patched then.
    """
    global _home
    try:
        home = importlib.import_module("transformers.models.vit_mae.modeling_vit_mae")
    except ImportError as error:
        raise ImportError(
            f"patch_transformers: wanted transformers 5, whose ViTMAE does not import: {error}"
        ) from error
    needed = [*_OURS, ("ViTMAEDecoder", "interpolate_pos_encoding")]
    if any(not hasattr(getattr(home, name, None), method) for name, method in needed) or not hasattr(
        home, "can_return_tuple"
    ):
        version = importlib.import_module("transformers").__version__
        raise ImportError(f"patch_transformers: wanted the ViTMAE of transformers 5, got that of {version}")
    if _home is None:
        _OURS["ViTMAEForPreTraining", "forward"] = home.can_return_tuple(pretrained)
        theirs.update({ours: getattr(getattr(home, name), method) for (name, method), ours in _OURS.items()})
        _home = home
    return Patch(lambda: {getattr(home, name) for name, _ in _OURS}, list(_OURS.values()))
