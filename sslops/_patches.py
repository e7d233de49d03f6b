"""Patches of images [B, C, H, W]: row-major over the grid, each of height x width pixels."""

from torch import Tensor

from . import _check


def pair(op: str, argument: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """A number of pixels, or (height, width), as (height, width)."""
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        _check.bad_type(op, argument, "an int or a pair of ints (height, width)", repr(value))
    if min(sides) < 1:
        _check.bad_value(op, argument, "at least 1 pixel", sides)
    return sides


def count(images: Tensor, height: int, width: int) -> int:
    """Of the patches of height x width in each of the images [B, C, H, W]"""
    return images.shape[2] // height * (images.shape[3] // width)


def check_tiles(op: str, images: Tensor, height: int, width: int) -> None:
    """That patches of height x width tile the images [B, C, H, W]."""
    for name, side in (("height", height), ("width", width)):
        if side < 1:
            _check.bad_value(op, name, "at least 1 pixel", side)
    if images.shape[1] < 1:
        _check.bad_value(op, "images", "shape [B, C, H, W] with a channel", list(images.shape))
    rows, columns = images.shape[2:]
    if rows % height or columns % width or not rows or not columns:
        _check.bad_value(op, "images", f"a size that patches of {height} x {width} tile", f"{rows} x {columns}")


def patchify(images: Tensor, height: int, width: int, layout: str) -> Tensor:
    """[B, L, C * height * width]: each patch in the order of a convolution's weight ("chw") or of MAE's ("hwc")."""
    grid = images.unfold(2, height, height).unfold(3, width, width)  # [B, C, rows, columns, height, width]
    order = (0, 2, 3, 1, 4, 5) if layout == "chw" else (0, 2, 3, 4, 5, 1)
    return grid.permute(order).flatten(3).flatten(1, 2)
