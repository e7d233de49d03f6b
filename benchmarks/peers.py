"""Other libraries' losses, where they are installed; None where it is not; what fails does so when called."""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F


def or_failing(make: Callable[..., Callable | None]) -> Callable[..., Callable | None]:
    """make, but what goes wrong in it does so where its result is called: there record() says of which variant"""

    @functools.wraps(make)
    def made(*args: object, **kwargs: object) -> Callable | None:
        try:
            return make(*args, **kwargs)
        except Exception as error:
            return functools.partial(_fail, error)

    return made


def _fail(error: Exception, *_: object) -> None:
    raise error


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _let_torchvision_load() -> None:
    """PyPI's torchvision is built for CUDA: beside a torch that is not, it lacks these two and does not import."""
    if not _installed("torchvision"):
        return
    cuda_only = "+cpu" not in importlib.metadata.version("torchvision") and torch.version.cuda is None
    if cuda_only and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_kept: list[torch.library.Library] = []  # a library's ops go with it


def lightly() -> ModuleType | None:
    if not _installed("lightly"):
        return None
    _let_torchvision_load()
    return importlib.import_module("lightly")


def solo_file(path: str) -> ModuleType | None:
    """One file of solo-learn: the package as a whole wants torch 1.9."""
    if not _installed("solo"):
        return None
    file = importlib.metadata.distribution("solo-learn").locate_file(path)
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), str(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@or_failing
def lightly_loss(name: str, **options: object) -> Callable | None:
    return lightly() and getattr(importlib.import_module("lightly.loss"), name)(**options)


@or_failing
def solo_loss(method: str, **options: object) -> Callable | None:
    file = solo_file(f"solo/losses/{method}.py")
    return file and partial(getattr(file, f"{method}_loss_func"), **options)


@or_failing
def memeff_info_nce(temperature: float) -> Callable | None:
    """In-batch, with gradients to queries and keys. A GPU's only, as the next two."""
    if not _installed("memeff"):
        return None
    from memeff import MemoryEfficientQwen3Loss

    # cosines never exceed 2: no negative is dropped; stable=True would scale the gradient
    return MemoryEfficientQwen3Loss(temperature, margin=2.0, stable=False)


@or_failing
def inf_cl_info_nce(temperature: float) -> Callable | None:
    if not _installed("inf_cl"):
        return None
    from inf_cl import cal_flash_loss

    def loss(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query, key = F.normalize(query), F.normalize(key)
        return cal_flash_loss(query, key, scale=1 / temperature, head_dim=min(256, query.shape[1])).mean()

    return loss


@or_failing
def liger_info_nce(temperature: float) -> Callable | None:
    """Its fused linear layer and cross entropy, the keys being the layer's weight: logits in chunks."""
    if not _installed("liger_kernel"):
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()

    def loss(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        positives = torch.arange(len(query), device=query.device)
        return fused(F.normalize(key), F.normalize(query) / temperature, positives)

    return loss
