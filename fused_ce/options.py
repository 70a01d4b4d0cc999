"""The options of the loss as one frozen value that travels through every layer."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossOptions:
    """What the user asked for. A new option is one line here, not one per signature."""

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
