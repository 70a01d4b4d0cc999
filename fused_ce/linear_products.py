"""Matrix products of a chunk: to its logits, in one buffer for all chunks, and to gradients.

On a GPU they are cuBLAS's, of the operands' dtype. On a CPU without products of 16 bits PyTorch
emulates these, and takes four times as long as for float32: there operands of 16 bits are copied to
float32, a block of the vocabulary at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fused_ce.cpu import machine
from fused_ce.linear_chunks import Chunk, Part, Plan, padded
from fused_ce.rows import Rows, compute_dtype

# Hidden states (n_rows, H), the weight of a head (V, H), and its bias (V,).
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

BLOCK = 1024  # classes whose weights are copied at once: 2 MiB for H = 512; more is not faster


def _needs_copies(hidden: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the products are those of copies in float32."""
    is_half = hidden.dtype in (torch.float16, torch.bfloat16)
    on_cpu = hidden.device.type == "cpu"
    return on_cpu and is_half and not (dtype == hidden.dtype and machine.multiplies(hidden.dtype))


def _copies(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(classes, their weights in float32)."""
    for start in range(0, weight.shape[0], BLOCK):
        classes = slice(start, min(start + BLOCK, weight.shape[0]))
        yield classes, weight[classes].float()


def _rounded(grad_logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of another dtype with the same row stride, which aligns the products."""
    if grad_logits.dtype == dtype:
        return grad_logits
    (n_rows, vocab_size), (stride, _) = grad_logits.shape, grad_logits.stride()
    place = grad_logits.new_empty(n_rows, stride, dtype=dtype)[:, :vocab_size]
    return place.copy_(grad_logits)


class Products:
    """The matrix products that lead from hidden states to logits, a chunk at a time."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        rows: Rows, plan: Plan, n_rows: int,
    ):  # fmt: skip
        """For chunks of at most n_rows of hidden (n_rows, H); rows have all but the logits."""
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.rows = Rows._make(None if tensor is None else tensor.detach() for tensor in rows)
        self.dtype = plan.logits_dtype
        self.by_copies = _needs_copies(hidden, self.dtype)
        self.vocab_size = weight.shape[0]
        on_cpu = hidden.device.type == "cpu"
        stride = self.vocab_size if on_cpu else padded(self.vocab_size)
        self.buffer = hidden.new_empty(n_rows, stride, dtype=self.dtype)

    def chunk(self, part: Part, ignored: torch.Tensor | None) -> Chunk:
        """The logits of some rows, in the buffer until the next chunk's."""
        hidden = self.hidden[part]
        if ignored is not None:  # NaN in them would come back through 0 * NaN
            hidden = hidden.masked_fill(ignored[part][:, None], 0.0)
        logits = self.buffer[: hidden.shape[0], : self.vocab_size]
        if self.by_copies:
            self._fill_by_copies(hidden, logits)
        elif self.dtype != hidden.dtype:
            torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=logits)
            if self.bias is not None:
                logits.add_(self.bias)
        elif self.bias is None:
            torch.mm(hidden, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=logits)
        sample_weight = self.rows.sample_weight
        rows = self.rows._replace(
            logits=logits[None],
            targets=self.rows.targets[0][part][None],
            sample_weight=None if sample_weight is None else sample_weight[part],
        )
        return Chunk(part, hidden, rows)

    def _fill_by_copies(self, hidden, logits):
        """Each of them rounded once, if at all."""
        hidden = hidden.float()
        for classes, weight in _copies(self.weight):
            if self.bias is None:
                logits[:, classes] = torch.mm(hidden, weight.T)
            else:
                logits[:, classes] = torch.addmm(self.bias[classes].float(), hidden, weight.T)


class Gradients:
    """Of hidden states, weight and bias, those that are needed: sums over chunks."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        needs: Sequence[bool], n_chunks: int, covers_all: bool, wide_hidden: bool = False,
    ):  # fmt: skip
        """Places for them; rows that no chunk has get 0.

        `wide_hidden` is summed with others before it is rounded.
        """
        self.head_weight = weight.detach()
        self.by_copies = _needs_copies(hidden, hidden.dtype)
        needs_hidden, needs_weight, needs_bias = needs
        self.hidden: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        if needs_hidden:
            dtype = compute_dtype(hidden) if wide_hidden else hidden.dtype
            self.hidden = hidden.new_empty(hidden.shape, dtype=dtype)
            if not covers_all:
                self.hidden.zero_()
        if needs_weight:
            dtype = compute_dtype(weight) if n_chunks > 1 else weight.dtype
            self.weight = weight.new_empty(weight.shape, dtype=dtype)
            if n_chunks == 0:
                self.weight.zero_()
        if needs_bias and bias is not None:
            self.bias = bias.new_zeros(bias.shape, dtype=compute_dtype(bias))
        self.is_first = True

    def add(self, chunk: Chunk, grad_logits: torch.Tensor) -> None:
        """What a chunk contributes, by the gradient of its logits (n, V)."""
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)
        if self.by_copies:
            self._add_by_copies(chunk, grad_logits)
        else:
            self._add(chunk, _rounded(grad_logits, self.head_weight.dtype))
        self.is_first = False

    def _add(self, chunk, grad):
        if self.hidden is not None:
            self._add_hidden(chunk, grad, self.hidden)
        if self.weight is None:
            return
        hidden = chunk.hidden
        if self.weight.device.type == "cpu":  # where a product has one dtype
            grad, hidden = grad.to(self.weight.dtype), hidden.to(self.weight.dtype)
        in_dtype: dict[str, Any]
        in_dtype = {} if grad.dtype == self.weight.dtype else dict(out_dtype=self.weight.dtype)
        if self.is_first:
            torch.mm(grad.T, hidden, out=self.weight, **in_dtype)
        else:
            torch.addmm(self.weight, grad.T, hidden, out=self.weight, **in_dtype)

    def _add_hidden(self, chunk, grad, out):
        is_wide = out.dtype != grad.dtype
        if isinstance(chunk.part, slice) and not is_wide:
            torch.mm(grad, self.head_weight, out=out[chunk.part])
            return
        out_dtype = {}
        if is_wide and grad.device.type != "cpu":
            out_dtype = dict(out_dtype=out.dtype)
        out[chunk.part] = torch.mm(grad, self.head_weight, **out_dtype).to(out.dtype)

    def _add_by_copies(self, chunk, grad_logits):
        """One copy of a block's gradients for both products."""
        hidden, dtype = chunk.hidden.float(), self.head_weight.dtype
        of_hidden = torch.zeros_like(hidden)
        for classes, weight in _copies(self.head_weight):
            grad = grad_logits[:, classes].to(dtype).float()  # rounded as operands are
            if self.hidden is not None:
                of_hidden.addmm_(grad, weight)
            if self.weight is not None and self.is_first:
                self.weight[classes] = torch.mm(grad.T, hidden)
            elif self.weight is not None:
                self.weight[classes].addmm_(grad.T, hidden)
        if self.hidden is not None:
            self.hidden[chunk.part] = of_hidden.to(self.hidden.dtype)

    def finished(self) -> list[torch.Tensor | None]:
        """Those of hidden, weight and bias, each rounded once."""
        dtype = self.head_weight.dtype
        return [
            None if grad is None else grad.to(dtype)
            for grad in (self.hidden, self.weight, self.bias)
        ]
