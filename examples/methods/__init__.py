"""The methods that pretrain.py trains: what each makes of an image, its networks, and its loss fused and eager."""

from .base import Method, TwoViews, augment, conv_encoder, mlp
from .contrastive import MoCo, RELICv2, SimCLR
from .masked import MAE, standard
from .prototypes import DINO, SwAV
from .redundancy import BarlowTwins, VICReg

__all__ = ["MAE", "METHODS", "Method", "TwoViews", "augment", "conv_encoder", "mlp", "standard"]

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "moco": MoCo,
    "relicv2": RELICv2,
    "dino": DINO,
    "swav": SwAV,
    "mae": MAE,
}
