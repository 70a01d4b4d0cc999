"""What type checkers have to see in calls: read by mypy and pyright, run by nobody.

An ignored error is one that has to be there: mypy complains of what it need not ignore.
"""

from typing import Any

import torch
from torch import nn
from typing_extensions import assert_type

from fused_ce import (
    CrossEntropyStats,
    FusedCrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    backend,
    fused_cross_entropy,
    fused_linear_cross_entropy,
    reference_cross_entropy,
    reference_linear_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

Tensor = torch.Tensor
Both = tuple[torch.Tensor, CrossEntropyStats]
Either = torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]


def of_logits(x: Tensor, y: Tensor, asked: bool, options: dict[str, Any]) -> None:
    assert_type(fused_cross_entropy(x, y), Tensor)
    assert_type(fused_cross_entropy(x, y, x, dim=-1, softcap=30, normalizer=7), Tensor)
    assert_type(fused_cross_entropy(x, y, return_stats=False), Tensor)
    assert_type(fused_cross_entropy(x, y, return_stats=True), Both)
    assert_type(fused_cross_entropy(x, y, return_stats=asked), Either)
    assert_type(reference_cross_entropy(x, y), Tensor)
    assert_type(reference_cross_entropy(x, y, return_stats=True), Both)
    assert_type(reference_cross_entropy(x, y, return_stats=asked), Either)
    assert_type(vocab_parallel_cross_entropy(x, y), Tensor)
    assert_type(vocab_parallel_cross_entropy(x, y, return_stats=False), Tensor)
    assert_type(vocab_parallel_cross_entropy(x, y, return_stats=True), Both)
    assert_type(vocab_parallel_cross_entropy(x, y, return_stats=asked), Either)
    fused_cross_entropy(x, y, **options)


def of_hidden_states(h: Tensor, w: Tensor, y: Tensor, asked: bool) -> None:
    assert_type(fused_linear_cross_entropy(h, w, y), Tensor)
    assert_type(fused_linear_cross_entropy(h, w, y, return_stats=False), Tensor)
    assert_type(fused_linear_cross_entropy(h, w, y, return_stats=True), Both)
    assert_type(fused_linear_cross_entropy(h, w, y, return_stats=asked), Either)
    assert_type(reference_linear_cross_entropy(h, w, y), Tensor)
    assert_type(reference_linear_cross_entropy(h, w, y, return_stats=True), Both)
    assert_type(reference_linear_cross_entropy(h, w, y, return_stats=asked), Either)
    assert_type(vocab_parallel_linear_cross_entropy(h, w, y), Tensor)
    assert_type(vocab_parallel_linear_cross_entropy(h, w, y, return_stats=False), Tensor)
    assert_type(vocab_parallel_linear_cross_entropy(h, w, y, return_stats=True), Both)
    assert_type(vocab_parallel_linear_cross_entropy(h, w, y, return_stats=asked), Either)


def of_modules(x: Tensor, w: Tensor, y: Tensor, asked: bool) -> None:
    assert_type(FusedCrossEntropyLoss()(x, y), Tensor)
    assert_type(FusedCrossEntropyLoss(w, reduction="sum", return_stats=False)(x, y), Tensor)
    assert_type(FusedCrossEntropyLoss(return_stats=True)(x, y, sample_weight=w), Both)
    assert_type(FusedCrossEntropyLoss(return_stats=asked)(x, y), Either)
    assert_type(FusedCrossEntropyLoss(return_stats=True).forward(x, y), Both)
    assert_type(FusedLinearCrossEntropyLoss()(x, w, y), Tensor)
    assert_type(FusedLinearCrossEntropyLoss(return_stats=False)(x, w, y), Tensor)
    assert_type(FusedLinearCrossEntropyLoss(return_stats=True)(x, w, y, normalizer=7.0), Both)
    assert_type(FusedLinearCrossEntropyLoss(return_stats=asked)(x, w, y), Either)
    assert_type(FusedLinearCrossEntropyLoss(return_stats=True).forward(x, w, y), Both)


class Shifted(FusedCrossEntropyLoss):
    """A subclass of its plain name returns a tensor too."""

    def __init__(self) -> None:
        """With an option of its own."""
        super().__init__(dim=-1)

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        return super().forward(input[:, :-1], target[:, 1:], **options)


class Model(nn.Module):
    """Holds a loss under its plain name, which stands for one without stats."""

    loss: FusedCrossEntropyLoss
    torch_loss: nn.CrossEntropyLoss = FusedCrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.loss = Shifted()
        return assert_type(self.loss(x, y), Tensor)


def refused(x: Tensor, y: Tensor) -> None:
    fused_cross_entropy(x, y, return_stats="yes")  # type: ignore[call-overload]
    fused_cross_entropy(x, y, soft_cap=30.0)  # type: ignore[call-overload]
    FusedCrossEntropyLoss()(x, y, weight=x)  # type: ignore[call-arg]
    FusedLinearCrossEntropyLoss(inplace=True)  # type: ignore[call-overload]


def of_stats(x: Tensor, y: Tensor) -> None:
    loss, stats = fused_cross_entropy(x, y, return_stats=True)
    assert_type(stats.predictions, Tensor)
    losses, lse, entropy, predictions = stats
    assert_type(entropy, Tensor)
    with backend("reference") as nothing:
        assert_type(nothing, None)
