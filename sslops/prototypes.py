"""PrototypeCenter, DINO's running centre of the teacher's logits; and swav, SwAV's loss by sinkhorn and dino."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, distributed
from ._check import Of
from .ops.dino import dino
from .ops.sinkhorn import sinkhorn

__all__ = ["PrototypeCenter", "swav"]


_LAYER = {"center": Of("1 K"), "prototypes": Of("K D")}


class PrototypeCenter(nn.Module):
    """DINO's centre: the running mean of the teacher's logits, which keeps one prototype from taking all.

    ::

        center = sslops.nn.PrototypeCenter(65536)
        loss = sslops.dino(student, teacher, teacher_temp=tau, bias=center.bias(tau))
        center.update(teacher)  # after it is used, as DINO does

    With gradient accumulation the centre should move once a step: call update() with all its logits, or once.

    update() reads the teacher's logits once more.

    Args:
        prototypes: K, positive.
        momentum: in [0, 1], what the centre keeps of itself at an update.

    Attributes:
        center: [1, K] float32, in the state_dict under the name that DINO, DINOv2 and iBOT have for it.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, arXiv:2104.14294, Eq. 4.
    """

    center: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        _check.count("PrototypeCenter", "prototypes", prototypes, 1, 2**62)
        _check.probability("PrototypeCenter", momentum=momentum)
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    def bias(self, teacher_temp: float | Tensor) -> Tensor:
        """-center / teacher_temp [K], what `dino` and `ibot` add to the teacher's logits over the same temperature, a
        positive number or a 0-d tensor.
        """
        if not isinstance(teacher_temp, Tensor):
            _check.positive("PrototypeCenter.bias", teacher_temp=teacher_temp)
        return (-self.center / teacher_temp)[0]

    @distributed.in_step
    @torch.no_grad()
    def update(
        self,
        teacher: Tensor | Sequence[Tensor],
        *,
        prototypes: Tensor | None = None,
        unit_prototypes: bool = False,
        group: distributed.Group = None,
    ) -> None:
        """center = momentum * center + (1 - momentum) * the logits' mean.

        Args:
            teacher: [.., K], or a list of such, of any float dtype: the mean is over all rows of all. No rows on any
                rank leave the centre as it is. With prototypes features, [.., D].
            prototypes [K, D], unit_prototypes: the teacher's, as `dino` has them: the logits' mean is the product with
                the features' mean, and no logits are made.
            group: None, or "world" or a ProcessGroup: the mean over the rows of all ranks, which may have different
                numbers of them, so that centres that were equal stay so.

        Raises:
            TypeError, ValueError: logits of another K, dtype or device; torch.distributed not initialised.
        """
        op, k = "PrototypeCenter.update", self.center.shape[1]
        group = distributed.name(op, group)
        _check.flag(op, "unit_prototypes", unit_prototypes)
        if prototypes is not None:
            _check.tensors(op, {"center": self.center, "prototypes": prototypes, "K": k}, _LAYER)
            k = prototypes.shape[1]
        # A pass of its own: columns that `dino` summed saved 0 to 3% of its step.
        sums: Tensor = self.center.new_zeros(k, dtype=torch.promote_types(self.center.dtype, torch.float32))
        count: Any = 0
        for x in [teacher] if isinstance(teacher, Tensor) else teacher:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                _check.bad_type(
                    op, "teacher", "a floating-point tensor [.., K] or a list of them", getattr(x, "dtype", x)
                )
            if x.dim() < 1 or x.shape[-1] != k:
                _check.bad_value(op, "teacher", f"shape [.., {k}]", list(x.shape))
            _check.same_device(op, "the centre", self.center, teacher=x)
            rows = x.reshape(-1, k)
            sums += rows.sum(0, dtype=sums.dtype)
            count += len(rows)
        if group:  # one message, of float32 at least: half precision does not count rows
            total = torch.cat([sums, sums.new_full((1,), count)])
            total = torch.ops.sslops.all_reduce(total, group, "sum", op)
            sums, count = total[:k], total[k]
        elif torch.compiler.is_compiling():  # how many only the data may know, of x[mask]
            count = sums.new_full((), count)
        share, mean = (1 - self.momentum) * (count > 0), sums / (count + (count == 0))
        if prototypes is not None:
            weight = prototypes.to(sums.dtype)
            mean = (weight * mean).sum(1)  # a product would be autocast
            mean = mean / weight.norm(dim=1).clamp(min=1e-12) if unit_prototypes else mean
        self.center.lerp_(
            mean[None].to(self.center.dtype), share.to(self.center.dtype) if isinstance(share, Tensor) else share
        )

    def extra_repr(self) -> str:
        return f"{self.center.shape[1]}, momentum={self.momentum}"


@distributed.in_step
def swav(
    scores: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.1,
    epsilon: float | Tensor = 0.05,
    iterations: int = 3,
    assign: int = 2,
    queue: Tensor | Sequence[Tensor] | None = None,
    prototypes: Tensor | None = None,
    unit_prototypes: bool = False,
    reduction: str = "mean",
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
    """SwAV's loss: each crop must predict the balanced assignment to prototypes of another crop of its image.

    `sinkhorn` finds each assigned view's potentials, and `dino` its cross entropy with all other crops.

    Args:
        scores: [V, B, K], or a list of crops [B, K] or [V_i, B, K], of the same V_i on all ranks: similarities of unit
            embeddings with unit prototypes, the assigned views first. One tensor of those is fastest. With prototypes
            the embeddings, [V, B, D].
        temperature, epsilon: the student's softmax has scores / temperature, the assignment scores / epsilon. Positive
            numbers or 0-d tensors, without a gradient.
        iterations: Sinkhorn's.
        assign: how many views are assigned, 1 to V.
        queue: [assign, Q, K], or a list of [Q, K]: the scores of earlier embeddings with the same
            prototypes, which count in the balance only. No gradient. With prototypes the embeddings, [.., D].
        prototypes [K, D], unit_prototypes: as `dino` and `sinkhorn` have them: the last layer is part of the loss, and
            no scores are in memory whole.
        reduction, return_metrics, group, backend: as `dino` has them; with a group the balance is over all ranks.

    Returns, Raises: as `dino` does.

    Source: Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, arXiv:2006.09882.
    """
    for name, value in (("scores", scores), ("queue", queue)):
        given = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(x, Tensor) and x.dim() in (2, 3) for x in given) and (
            name == "scores" or value is not None
        ):
            wanted = "a tensor [V, B, K] or a list of crops [B, K]"
            _check.bad_type("swav", name, wanted, [list(getattr(x, "shape", [type(x).__name__])) for x in given])
    listed = [scores] if isinstance(scores, Tensor) else scores
    crops = [(crop[None] if crop.dim() == 2 else crop).detach() for crop in listed]
    views = [crop[v : v + 1] for crop in crops for v in range(len(crop))]
    for name, number in (("temperature", temperature), ("epsilon", epsilon)):
        if not isinstance(number, Tensor):
            _check.positive("swav", **{name: number})
    _check.count("swav", "iterations", iterations, 1)
    _check.count("swav", "assign", assign, 1)
    if len(views) < 2 or not views[0].shape[-1]:
        wanted = "at least 2 crops [B, K] and one prototype"
        _check.bad_value("swav", "scores", wanted, [list(view.shape[1:]) for view in views])
    if assign > len(views):
        _check.bad_value("swav", "assign", f"at most {len(views)}, the crops of scores", assign)
    if queue is not None and len(queue) != assign:
        _check.bad_value("swav", "queue", f"scores for each of the {assign} assigned views", f"{len(queue)}")
    shape = views[0].shape[1:]
    if odd := [list(view.shape[1:]) for view in views[:assign] if view.shape[1:] != shape]:
        _check.bad_value("swav", "scores", f"assigned views of one shape, {list(shape)}", odd[0])
    # those of one tensor at once: half the calls and messages of `sinkhorn`
    assigned = [crops[0][:assign]] if len(crops[0]) >= assign else views[:assign]
    balanced = assigned if queue is None else views[:assign]
    for k, earlier in enumerate(queue if queue is not None else ()):
        if not earlier.is_floating_point():
            _check.bad_type("swav", f"queue[{k}]", "a floating-point tensor", earlier.dtype)
        _check.same_device("swav", "scores", views[k], **{f"queue[{k}]": earlier})
        if earlier.dim() != 2 or earlier.shape[1] != views[k].shape[-1]:
            _check.bad_value("swav", f"queue[{k}]", f"shape [Q, {views[k].shape[-1]}]", list(earlier.shape))
        balanced[k] = torch.cat([views[k], earlier.detach().to(views[k].dtype)[None]], 1)
    options: dict[str, Any] = {
        "prototypes": prototypes, "unit_prototypes": unit_prototypes, "group": group, "backend": backend
    }  # fmt: skip
    bias = [sinkhorn(x, temperature=epsilon, iterations=iterations, **options) for x in balanced]
    return dino(
        scores, assigned, teacher_prototypes=prototypes, student_temp=temperature, teacher_temp=epsilon,
        bias=torch.cat(bias), reduction=reduction, return_metrics=return_metrics, **options,
    )  # fmt: skip
