"""What a call with `return_stats=True` tells of each target."""

from typing import Any, NamedTuple

import torch


class CrossEntropyStats(NamedTuple):
    """What a call with `return_stats=True` tells of each target; all have the targets' shape.

    `lse`, `entropy` and `predictions` are of the scaled and capped logits. Ignored targets are 0
    in them, and -1 in `predictions`; the prediction of a row that holds NaN is any class. Gradients
    flow through the first three.
    """

    losses: torch.Tensor  # what reduction="none" returns
    lse: torch.Tensor  # log(sum(exp(logits)))
    entropy: torch.Tensor  # of softmax(logits), in nats
    predictions: torch.Tensor  # the class of the largest of them, the first of several; int64


def _new_stats(cls: Any, losses: Any, *others: Any, **named: Any) -> Any:
    """From four values or, as torch's own named tuples, from one iterable.

    So does `Tensor.__torch_function__` give results the type of a subclass.
    """
    if not others and not named:
        return _new_of_four(cls, *losses)
    return _new_of_four(cls, losses, *others, **named)


_new_of_four = CrossEntropyStats.__new__
# To type checkers it is the constructor of four.
CrossEntropyStats.__new__ = staticmethod(_new_stats)  # type: ignore[method-assign, assignment]
