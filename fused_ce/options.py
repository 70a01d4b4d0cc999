"""The options of a loss as one frozen value that travels through every layer; those of a row."""

from typing import NamedTuple

import torch


class LossOptions(NamedTuple):
    """What the user asked for. A new option is one line here, not one per signature.

    A tuple, because a frozen dataclass takes 1.1 microseconds longer to make.
    """

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    inplace: bool = False
    grad_in_forward: bool | None = None
    normalizer: float | torch.Tensor | None = None  # as a tensor it soon travels with the rows
    z_loss: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    return_stats: bool = False

    def makes_grad_in_forward(self, dtype: torch.dtype) -> bool:
        """Whether forward makes the gradient too, for logits of this dtype.

        By default not for "none", whose upstream gradient differs by row, and not in float16,
        where a gradient over n would underflow before a GradScaler's factor reaches it; nor where
        it would overwrite the logits that a gradient through the stats reads again.
        """
        if self.grad_in_forward is None:
            if self.inplace and self.return_stats:
                return False
            return self.reduction != "none" and dtype != torch.float16
        return self.grad_in_forward


class RowOptions(NamedTuple):
    """What the loss of a row depends on, in the order of the operators' arguments."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float | None
    return_stats: bool
    backend: str

    @classmethod
    def of(cls, options: LossOptions, backend: str) -> "RowOptions":
        """Those of a call."""
        return cls(
            options.ignore_index, options.label_smoothing, options.z_loss, options.logit_scale,
            options.softcap, options.return_stats, backend,
        )  # fmt: skip

    @property
    def loss_options(self) -> LossOptions:
        """As the implementations take them."""
        return LossOptions(
            self.ignore_index, "none", self.label_smoothing, z_loss=self.z_loss,
            logit_scale=self.logit_scale, softcap=self.softcap, return_stats=self.return_stats,
        )  # fmt: skip
