"""Random numbers that are a function of a key, the same everywhere: csrc/common/philox.h in torch, and the keys."""

import enum

import torch
from torch import Tensor

from . import _check


class RandomStream(enum.IntEnum):
    """Who draws: one key gives each op a stream of its own."""

    EMA_UPDATE = 1
    RANDOM_MASK = 2
    RANDOM_TOKEN_CORRUPTION = 3
    SIGREG = 4
    MASK_BLOCKS = 5
    MULTI_BLOCK_MASK = 6
    NEGATIVES = 7


def philox(key: int | Tensor, stream: RandomStream, first_block: int, blocks: int, device: torch.device) -> Tensor:
    """[blocks, 4] random 32-bit words as int64: Philox4x32-10 with the counter (block, stream, 0), block in 64 bits."""
    low = 0xFFFFFFFF
    block = torch.arange(first_block, first_block + blocks, device=device)
    c = [block & low, block >> 32 & low, torch.full_like(block, stream), torch.zeros_like(block)]
    keys = [key & low, key >> 32 & low]
    for _ in range(10):
        products = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # 64 bits, the sign bit being one of them
        high = [p >> 32 & low for p in products]
        c = [high[1] ^ c[1] ^ keys[0], products[1] & low, high[0] ^ c[3] ^ keys[1], products[0] & low]
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return torch.stack(c, dim=1)


def normals(key: Tensor, stream: RandomStream, blocks: int) -> Tensor:
    """[blocks, 4] normal numbers in float64: Box and Muller's of two radii and two angles a block"""
    uniform = ((philox(key, stream, 0, blocks, key.device) >> 9).double() + 0.5) * 2.0**-23  # exact in float32
    radii, angles = (-2 * uniform[:, :2].log()).sqrt(), 2 * torch.pi * uniform[:, 2:]
    return torch.cat([radii * angles.cos(), radii * angles.sin()], 1)


def on_device(op: str, device: torch.device | str | None) -> torch.device:
    """The device, or torch's default one"""
    try:
        return torch.empty(0, device=device).device
    # no name of a device, or of none that is here
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        return _check.bad_value(op, "device", "a device that is there", f"{device!r}: {error}")


def draw_key(op: str, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A 0-d int64 tensor from torch's generator of the device: nothing is read on the host."""
    if generator is not None and not isinstance(generator, torch.Generator):
        _check.bad_type(op, "generator", "a torch.Generator or None", type(generator).__name__)
    if generator is not None and generator.device.type != device.type:
        _check.bad_value(op, "generator", f"one on {device}", generator.device)
    return torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator, device=device)
