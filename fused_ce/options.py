"""The options of the loss as one frozen value that travels through every layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LossOptions:
    """What the user asked for, checked. A new option is one line here, not one per signature."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    inplace: bool = False
    grad_in_forward: bool = True
