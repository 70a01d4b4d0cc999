"""How far a provider's loss and gradients are from float64: what is wrong is not worth timing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.cases import Case
from benchmarks.inputs import IGNORE_INDEX

CHECKED_ELEMENTS = 1 << 22  # of the gradient: rows spread evenly, the first and the last of them
CHECKED_STATES, CHECKED_CLASSES = 64, 512  # rows of the gradients of hidden states and head
CHUNK_ELEMENTS = 1 << 24  # 128 MiB of float64 at a time

# Relative, beyond what rounding the exact gradient to its dtype costs. The loss of 16-bit logits
# is itself rounded to 16 bits by torch.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


class WrongResult(Exception):
    """A provider's loss or gradient is not the reference's."""


class Errors(NamedTuple):
    """Relative errors of a result, against float64."""

    loss: float
    gradients: tuple[float, ...] = ()

    @property
    def largest(self) -> float:
        """Of the gradients, or that of the loss where there are none."""
        return max(self.gradients, default=self.loss)


class Part(NamedTuple):
    """Some rows of an exact gradient."""

    name: str
    of: int  # the number of the gradient among those of a result
    shape: torch.Size  # of the whole gradient
    rows: torch.Tensor  # (k,) indices
    gradient: torch.Tensor  # (k, ...) float64


@dataclass(frozen=True)
class Exact:
    """The float64 loss of an input, and its gradients in some of their rows."""

    case: Case
    loss: float
    parts: list[Part]

    @classmethod
    def of(cls, case: Case, *tensors: torch.Tensor) -> "Exact":
        """Compute them from logits and targets, or from hidden states, weight and targets."""
        return cls(case, *(_of_head if case.kind == "linear" else _of_logits)(*tensors))

    def check(self, loss: torch.Tensor, *gradients: torch.Tensor) -> Errors:
        """The relative errors of a loss, and of its gradients where there are any.

        Gradients are compared in the sum of absolute differences over the sum of the exact ones.
        Of logits half of that is the targets' columns, half all the others, so that neither can
        hide; the rows of a head's gradient that are targets are compared apart from the others.

        Raises:
            WrongResult: loss or gradient differ by more than a dtype explains.
        """
        loss = float(loss.detach())
        loss_error = abs(loss - self.loss) / abs(self.loss)
        if not loss_error <= LOSS_TOLERANCE[self.case.dtype]:  # NaN is wrong too
            raise WrongResult(f"wrong loss: {loss:.6g} instead of {self.loss:.6g}")
        parts = self.parts if gradients else ()
        return Errors(loss_error, tuple(self._error(part, gradients[part.of]) for part in parts))

    def _error(self, part: Part, gradient: torch.Tensor) -> float:
        if gradient.shape != part.shape:
            raise WrongResult(f"wrong {part.name}: its shape is {tuple(gradient.shape)}")
        size = part.gradient.abs().sum()
        rounded = part.gradient.to(gradient.dtype).double()
        rounding = float((rounded - part.gradient).abs().sum() / size)
        error = float((gradient[part.rows].double() - part.gradient).abs().sum() / size)
        if not error <= GRADIENT_TOLERANCE[self.case.dtype] + 2 * rounding:
            raise WrongResult(f"wrong {part.name}: relative error {error:.1e}")
        return error


def _of_logits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, list[Part]]:
    """The loss, and the gradient of some rows of (n_rows, vocab_size)."""
    n_rows, vocab_size = logits.shape
    loss, _ = _loss_and_lse(lambda part: logits[part].double(), vocab_size, targets)
    rows = _spread(torch.arange(n_rows, device=logits.device), CHECKED_ELEMENTS // vocab_size)
    gradient = _gradient_of_logits(logits[rows].double(), rows, targets)
    return loss, [Part("gradient", 0, logits.shape, rows, gradient)]


def _of_head(hidden, weight, targets) -> tuple[float, list[Part]]:
    """The loss, and some rows of the gradients of hidden (n_rows, H) and weight (V, H)."""
    states, head = hidden.double(), weight.double()
    vocab_size = weight.shape[0]
    loss, lse = _loss_and_lse(lambda part: states[part] @ head.T, vocab_size, targets)
    rows = _spread(torch.arange(len(targets), device=targets.device), CHECKED_STATES)
    gradient = _gradient_of_logits(states[rows] @ head.T, rows, targets) @ head
    parts = [Part("gradient of hidden", 0, hidden.shape, rows, gradient)]
    counts = targets != IGNORE_INDEX
    learnt = torch.zeros(vocab_size, dtype=torch.bool, device=targets.device)
    learnt[targets[counts]] = True
    for name, classes in (("targets", learnt), ("others", ~learnt)):
        rows = _spread(classes.nonzero()[:, 0], CHECKED_CLASSES)
        if len(rows):
            of_logits = (states @ head[rows].T - lse[:, None]).exp_()
            of_logits.sub_((targets[:, None] == rows).double())
            of_logits.masked_fill_(~counts[:, None], 0.0).div_(counts.sum())
            gradient = of_logits.T @ states
            parts.append(Part(f"gradient of weight ({name})", 1, weight.shape, rows, gradient))
    return loss, parts


def _loss_and_lse(
    logits_of: Callable[[slice], torch.Tensor], vocab_size: int, targets: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """The mean loss and the lse of every row, from the float64 logits of a chunk of rows."""
    n_rows, loss = len(targets), 0.0
    lse = torch.empty(n_rows, dtype=torch.float64, device=targets.device)
    step = max(1, CHUNK_ELEMENTS // vocab_size)
    for start in range(0, n_rows, step):
        part = slice(start, start + step)
        x, y = logits_of(part), targets[part]
        lse[part] = x.logsumexp(dim=1)
        losses = lse[part] - x.gather(1, y.clamp(min=0)[:, None])[:, 0]
        loss += float(losses.masked_fill_(y == IGNORE_INDEX, 0.0).sum())
    return loss / int((targets != IGNORE_INDEX).sum()), lse


def _gradient_of_logits(logits, rows, targets) -> torch.Tensor:
    """That of the mean loss, in the rows whose float64 logits are given."""
    y = targets[rows]
    gradient = logits.softmax(dim=1)
    gradient.scatter_add_(1, y.clamp(min=0)[:, None], -torch.ones_like(gradient[:, :1]))
    n_valid = (targets != IGNORE_INDEX).sum()
    return gradient.masked_fill_((y == IGNORE_INDEX)[:, None], 0.0).div_(n_valid)


def _spread(indices: torch.Tensor, count: int) -> torch.Tensor:
    """At most so many of the indices (at least two), spread evenly: the first and the last too."""
    count = max(2, min(len(indices), count)) if len(indices) else 0
    at = torch.linspace(0, len(indices) - 1, count, device=indices.device)
    return indices[at.round().long()]
