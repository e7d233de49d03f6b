"""Other libraries' losses, where they are installed; each is None where it is not."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _let_torchvision_load() -> None:
    """PyPI's torchvision is built for CUDA: beside a torch that is not, it lacks these two and does not import."""
    cuda_only = "+cpu" not in importlib.metadata.version("torchvision") and torch.version.cuda is None
    if cuda_only and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_kept: list[torch.library.Library] = []  # a library's ops go with it


def _solo_file(path: str) -> ModuleType:
    """One file of solo-learn: the package as a whole wants torch 1.9."""
    file = importlib.metadata.distribution("solo-learn").locate_file(path)
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), str(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lightly_nt_xent(temperature: float) -> Callable | None:
    if not _installed("lightly"):
        return None
    _let_torchvision_load()
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature)


def solo_nt_xent(temperature: float) -> Callable | None:
    if not _installed("solo"):
        return None
    simclr_loss_func = _solo_file("solo/losses/simclr.py").simclr_loss_func
    return lambda z0, z1: simclr_loss_func(z0, z1, temperature)
