"""The loss as `torch.nn` modules."""

import torch
from torch import nn

from fused_ce.cross_entropy import check_options, fused_cross_entropy
from fused_ce.options import LossOptions


class FusedCrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` computed by `fused_cross_entropy`.

    Takes that class's arguments, in its order, and those of `fused_cross_entropy` as keywords;
    being a subclass, it stands wherever the original is expected and shares its `state_dict`.

    Args:
        weight: (C,), floating, or None; a buffer of the module.
        size_average: deprecated by torch; use `reduction`.
        ignore_index: rows with this target count nothing.
        reduce: deprecated by torch; use `reduction`.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        dim: the class axis of the logits; None lets the shape of the targets decide.
        inplace: let the gradient overwrite the storage of the logits.
        grad_in_forward: compute the gradient with the loss; None chooses.

    Raises:
        TypeError, ValueError: an option is not what `fused_cross_entropy` takes.
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dim: int | None = None,
        inplace: bool = False,
        grad_in_forward: bool | None = None,
    ) -> None:
        """Store the options; `forward` reads the attributes, so they may be changed later."""
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.dim = dim
        self.inplace = inplace
        self.grad_in_forward = grad_in_forward
        check_options(
            LossOptions(
                self.ignore_index, self.reduction, self.label_smoothing, inplace, grad_in_forward
            )
        )

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits and targets; the names are torch's, all else is the function's."""
        return fused_cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            dim=self.dim,
            inplace=self.inplace,
            grad_in_forward=self.grad_in_forward,
        )

    def extra_repr(self) -> str:
        """What `print(module)` shows between the brackets."""
        shown = (
            "ignore_index",
            "reduction",
            "label_smoothing",
            "dim",
            "inplace",
            "grad_in_forward",
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
