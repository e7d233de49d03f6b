"""The methods that pretrain.py trains: what each makes of an image, its networks, and its loss fused and eager."""

from .base import Method, TwoViews, augment, conv_encoder, mlp
from .bert import BERT, king_james
from .contrastive import NNCLR, MoCo, RELICv2, SimCLR, SupCon
from .masked import MAE, Data2Vec, standard
from .predictive import BYOL
from .prototypes import DINO, SwAV
from .redundancy import BarlowTwins, LeJEPA, VICReg
from .word2vec import Word2Vec

__all__ = [
    "BERT", "DINO", "MAE", "METHODS", "Method", "SwAV", "TwoViews", "Word2Vec", "augment", "conv_encoder",
    "king_james", "mlp", "standard",
]  # fmt: skip

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "supcon": SupCon,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "lejepa": LeJEPA,
    "moco": MoCo,
    "nnclr": NNCLR,
    "byol": BYOL,
    "relicv2": RELICv2,
    "dino": DINO,
    "swav": SwAV,
    "mae": MAE,
    "data2vec": Data2Vec,
    "bert": BERT,
    "word2vec": Word2Vec,
}
