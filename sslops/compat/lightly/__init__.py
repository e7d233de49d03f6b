"""lightly 1.6's losses and utilities on our ops: the same names, arguments, defaults, attributes and state_dicts.

What differs: losses are float32 for bf16 and float16 inputs and under autocast, where lightly's may be bf16; types,
shapes and values that no loss is meant for (a negative temperature, a momentum above 1, views of different dtypes,
SwaVLoss or CAPILoss without Sinkhorn iterations) raise ValueError or TypeError. NTXentLoss has no attribute
cross_entropy. DINOLoss, IBOTPatchLoss, IBOTPlusPlusPatchLoss and MSNLoss, and what derives from it, give the teacher no
gradient, and DetConBLoss refuses targets that want one. CAPILoss adds no 1e-8 to the sums that it divides by.
KoLeoLoss refuses a batch of one row. SIGReg's batches are of one size on all ranks.
update_momentum takes no DTensors and no two models that share memory: for fully_shard there is `sslops.EMA`.

gather_distributed=True gives lightly's values and gradients, which DDP's averaging makes right: a rank's loss is of its
own rows (NTXentLoss) or has its own invariance (VICRegLoss), and BarlowTwinsLoss averages [D, D] matrices whose columns
each rank normalised by itself. The ops' `group=` takes one batch that is spread over the ranks.

CO2Regularizer stays lightly's: each row's softmax has its own positive beside the bank's rows, which no op takes as
prototypes; and its gradient is to reach the targets, too (in 1.6 there is none: it ends in `torch.tensor(loss)`).

lightly-train 0.18's SimCLR, DINO and DenseCL's global loss are lightly's, as is its DINOv2's KoLeo: patch before it is
imported (its DenseCL does not start beside lightly 1.6, whose memory bank wants a width). Not replaced are its own:
DenseCLLoss, which is `info_nce(out0, out1, negatives.t())`; DINOv2's DINOLoss and IBOTPatchLoss, which are given the
teacher's probabilities, where `dino` and `ibot` make them from the logits; the distillations; and update_momentum.
"""

from .contrastive import (
    DCLLoss,
    DCLWLoss,
    DetConBLoss,
    DetConSLoss,
    NTXentLoss,
    negative_mises_fisher_weights,
)
from .losses import BarlowTwinsLoss, KoLeoLoss, LeJEPALoss, NegativeCosineSimilarity, SIGReg, VICRegLoss
from .prototypes import (
    CAPILoss,
    DINOLoss,
    IBOTPatchLoss,
    IBOTPlusPlusPatchLoss,
    MSNLoss,
    PMSNCustomLoss,
    PMSNLoss,
    SwaVLoss,
)
from .state import Center, MemoryBankModule, NNMemoryBankModule, update_momentum
from .tokens import get_at_index, patchify, random_token_mask, repeat_token, set_at_index

REPLACED = {
    "lightly.loss.ntx_ent_loss": (NTXentLoss,),
    "lightly.loss.dcl_loss": (DCLLoss, DCLWLoss, negative_mises_fisher_weights),
    "lightly.loss.detcon_loss": (DetConBLoss, DetConSLoss),
    "lightly.loss.barlow_twins_loss": (BarlowTwinsLoss,),
    "lightly.loss.vicreg_loss": (VICRegLoss,),
    "lightly.loss.dino_loss": (DINOLoss,),
    "lightly.loss.ibot_loss": (IBOTPatchLoss, IBOTPlusPlusPatchLoss),
    "lightly.loss.swav_loss": (SwaVLoss,),
    "lightly.loss.msn_loss": (MSNLoss,),
    "lightly.loss.pmsn_loss": (PMSNLoss, PMSNCustomLoss),
    "lightly.loss.capi_loss": (CAPILoss,),
    "lightly.loss.koleo_loss": (KoLeoLoss,),
    "lightly.loss.lejepa_loss": (SIGReg, LeJEPALoss),
    "lightly.models.modules.center": (Center,),
    "lightly.loss.negative_cosine_similarity": (NegativeCosineSimilarity,),
    "lightly.models.modules.memory_bank": (MemoryBankModule,),
    "lightly.models.modules.nn_memory_bank": (NNMemoryBankModule,),
    "lightly.models.utils": (
        update_momentum, random_token_mask, get_at_index, set_at_index, repeat_token, patchify,
    ),
}  # fmt: skip
