"""pretrain.py under torchrun: every step's batch lies spread over the processes, and is trained on as one."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Mean(torch.autograd.Function):
    """Of the ranks' tensors; its gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return Mean.apply(grad)


class BatchNorm(nn.Module):
    """A BatchNorm whose statistics are those of all ranks; torch's SyncBatchNorm runs on GPUs only."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not (self.training and dist.is_initialized()):
            return norm(x)
        rows = [d for d in range(x.dim()) if d != 1]
        mean = Mean.apply(x.mean(rows, keepdim=True))
        var = Mean.apply((x - mean).square().mean(rows, keepdim=True))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            norm.running_mean.lerp_(mean.flatten(), norm.momentum)
            norm.running_var.lerp_(var.flatten() * (count / (count - 1)), norm.momentum)
        shape = mean.shape
        return (x - mean) * (var + norm.eps).rsqrt() * norm.weight.view(shape) + norm.bias.view(shape)


def convert(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, BatchNorm(child))
        else:
            convert(child)


def start() -> bool:
    """Whether torchrun started this process: then it is in the group."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    dist.init_process_group("gloo")
    return True


def leads() -> bool:
    """Whether this process reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def end() -> None:
    """The first process goes on alone."""
    if dist.is_initialized():
        dist.barrier()  # nobody's connections close under another's last message
        dist.destroy_process_group()


def own_rows(views: Tensor) -> Tensor:
    """This rank's of two views of a batch, one after the other."""
    world = dist.get_world_size()
    return views.unflatten(0, (2, world, -1))[:, dist.get_rank()].flatten(0, 1)


def average_gradients(parameters: list[Tensor]) -> None:
    """As DistributedDataParallel does."""
    for x in parameters:
        x.grad = Mean.apply(x.grad)
