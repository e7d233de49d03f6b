"""BERT's masking on CUDA: one launch. It has no gradient, so there is no backward."""

from torch import Tensor

from sslops import _C

from .device import launch, refuses  # noqa: F401


def forward(
    ids: Tensor,
    key: Tensor,
    special: Tensor | None,
    mask_id: int,
    vocab_size: int,
    odds: tuple[int, int, int],
    corrupted: Tensor,
    labels: Tensor,
) -> None:
    """Fills `corrupted` and `labels`. odds: of being chosen, masked, masked or random, in units of 2^-32"""
    launch(
        ids.device, _C.cuda_random_token_corruption,
        ids.data_ptr(), 0 if special is None else special.data_ptr(), ids.numel(), mask_id, vocab_size, *odds,
        key.data_ptr(), corrupted.data_ptr(), labels.data_ptr(),
    )  # fmt: skip
