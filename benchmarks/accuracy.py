"""How far a provider's loss and gradient are from float64: what is wrong is not worth timing."""

from dataclasses import dataclass

import torch

from benchmarks.cases import Case
from benchmarks.inputs import IGNORE_INDEX

CHECKED_ELEMENTS = 1 << 22  # of the gradient: rows spread evenly, the first and the last of them
CHUNK_ELEMENTS = 1 << 24  # 128 MiB of float64 at a time

# Relative, beyond what rounding the exact gradient to its dtype costs. The loss of 16-bit logits
# is itself rounded to 16 bits by torch.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


class WrongResult(Exception):
    """A provider's loss or gradient is not the reference's."""


@dataclass(frozen=True)
class Exact:
    """The float64 loss of an input, and its gradient in some of the rows."""

    case: Case
    loss: float
    rows: torch.Tensor  # (k,) indices
    gradient: torch.Tensor  # (k, vocab_size) float64

    @classmethod
    def of(cls, case: Case, logits: torch.Tensor, targets: torch.Tensor) -> "Exact":
        """Compute them, a chunk of rows at a time."""
        n_valid = int((targets != IGNORE_INDEX).sum())
        step = max(1, CHUNK_ELEMENTS // case.vocab_size)
        loss = 0.0
        for start in range(0, case.n_rows, step):
            x, y = logits[start : start + step].double(), targets[start : start + step]
            losses = x.logsumexp(dim=1) - x.gather(1, y.clamp(min=0)[:, None])[:, 0]
            loss += float(losses.masked_fill_(y == IGNORE_INDEX, 0.0).sum()) / n_valid
        count = max(2, min(case.n_rows, CHECKED_ELEMENTS // case.vocab_size))
        rows = torch.linspace(0, case.n_rows - 1, count, device=logits.device).round().long()
        y = targets[rows]
        gradient = logits[rows].double().softmax(dim=1)
        gradient.scatter_add_(1, y.clamp(min=0)[:, None], -torch.ones_like(gradient[:, :1]))
        gradient.masked_fill_((y == IGNORE_INDEX)[:, None], 0.0).div_(n_valid)
        return cls(case, loss, rows, gradient)

    def check(self, loss: torch.Tensor, gradient: torch.Tensor | None) -> float:
        """The relative error: of the gradient, or of the loss where there is no gradient.

        Gradients are compared in the sum of absolute differences over the sum of the exact ones:
        half of that is the targets' columns, half all the others, so that neither can hide.

        Raises:
            WrongResult: loss or gradient differ by more than a dtype explains.
        """
        loss = float(loss.detach())
        loss_error = abs(loss - self.loss) / abs(self.loss)
        if not loss_error <= LOSS_TOLERANCE[self.case.dtype]:  # NaN is wrong too
            raise WrongResult(f"wrong loss: {loss:.6g} instead of {self.loss:.6g}")
        if gradient is None:
            return loss_error
        if gradient.shape != (self.case.n_rows, self.case.vocab_size):
            raise WrongResult(f"wrong gradient: its shape is {tuple(gradient.shape)}")
        size = self.gradient.abs().sum()
        rounded = self.gradient.to(gradient.dtype).double()
        rounding = float((rounded - self.gradient).abs().sum() / size)
        error = float((gradient[self.rows].double() - self.gradient).abs().sum() / size)
        if not error <= GRADIENT_TOLERANCE[self.case.dtype] + 2 * rounding:
            raise WrongResult(f"wrong gradient: relative error {error:.1e}")
        return error
