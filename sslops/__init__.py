"""sslops: fused kernels for self-supervised learning in PyTorch."""

from . import nn
from .backend import explain
from .compat import patch_lightly, patch_open_clip, patch_solo, patch_transformers
from .ema import EMA, cosine_momentum, ema_avg_fn
from .masking import denormalize_patches, random_masking, unpatchify
from .negatives import NegativeSampler
from .ops.barlow_twins import barlow_twins
from .ops.clip import clip
from .ops.cross_correlation import cross_correlation
from .ops.dino import dino
from .ops.ema_update import ema_update_
from .ops.gather_patches import gather_patches
from .ops.gather_tokens import gather_tokens
from .ops.ibot import ibot
from .ops.info_nce import info_nce
from .ops.masked_prediction import masked_patch_mse, masked_prediction
from .ops.masked_token_cross_entropy import masked_token_cross_entropy
from .ops.multi_block_mask import multi_block_mask
from .ops.nearest import koleo, nearest
from .ops.nt_xent import nt_xent
from .ops.random_mask import block_mask, random_mask, tube_mask
from .ops.random_token_corruption import random_token_corruption
from .ops.relic import relic, relic_multicrop
from .ops.restore_tokens import restore_tokens
from .ops.siglip import siglip
from .ops.sigreg import lejepa, sigreg
from .ops.sinkhorn import sinkhorn
from .ops.skip_gram import skip_gram
from .ops.supcon import supcon
from .ops.vicreg import vicreg
from .prototypes import swav
from .queue import NegativeQueue

__version__ = "0.1.0"
__all__ = [
    "EMA",
    "NegativeQueue",
    "NegativeSampler",
    "barlow_twins",
    "block_mask",
    "clip",
    "cosine_momentum",
    "cross_correlation",
    "denormalize_patches",
    "dino",
    "ema_avg_fn",
    "ema_update_",
    "explain",
    "gather_patches",
    "gather_tokens",
    "ibot",
    "info_nce",
    "koleo",
    "lejepa",
    "masked_patch_mse",
    "masked_prediction",
    "masked_token_cross_entropy",
    "multi_block_mask",
    "nearest",
    "nn",
    "nt_xent",
    "patch_lightly",
    "patch_open_clip",
    "patch_solo",
    "patch_transformers",
    "random_mask",
    "random_masking",
    "random_token_corruption",
    "relic",
    "relic_multicrop",
    "restore_tokens",
    "siglip",
    "sigreg",
    "sinkhorn",
    "skip_gram",
    "supcon",
    "swav",
    "tube_mask",
    "unpatchify",
    "vicreg",
]
