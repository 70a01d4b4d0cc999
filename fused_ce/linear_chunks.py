"""Logits of a chunk of rows, in one buffer for all chunks, and the gradients made of theirs."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fused_ce.options import LossOptions
from fused_ce.rows import Result, Rows, compute_dtype
from fused_ce.tracing import is_autocast

Part = slice | torch.Tensor  # of rows: those of a slice, or those whose numbers a tensor holds

GPU_ROWS = 2048  # fewer, and the sum of grad_weight shows beside the products
GPU_BYTES = 1 << 30
CPU_ROWS = 256  # fewer, and MKL's products are slower
CPU_MOST_ROWS = 1024


class Plan(NamedTuple):
    """How a call is computed: its options, and how its rows are cut.

    A normalizer travels with the rows, a number too.
    """

    options: LossOptions
    backend: str
    logits_dtype: torch.dtype
    skip_ignored: bool
    chunk_size: int | None

    @classmethod
    def of(
        cls, ignore_index, reduction, label_smoothing, z_loss, logit_scale, softcap, return_stats,
        backend, logits_dtype, skip_ignored, chunk_size,
    ) -> "Plan":  # fmt: skip
        """From the arguments of an operator."""
        options = LossOptions(
            ignore_index, reduction, label_smoothing, z_loss=z_loss, logit_scale=logit_scale,
            softcap=softcap, return_stats=return_stats,
        )  # fmt: skip
        return cls(options, backend, logits_dtype, skip_ignored, chunk_size)

    def flat(self) -> tuple:
        """As the arguments of an operator: what `of` takes."""
        options = self.options
        return (
            options.ignore_index, options.reduction, options.label_smoothing, options.z_loss,
            options.logit_scale, options.softcap, options.return_stats, self.backend,
            self.logits_dtype, self.skip_ignored, self.chunk_size,
        )  # fmt: skip


class Chunk(NamedTuple):
    """Rows whose logits are held, and their hidden states, cleared where they are ignored."""

    part: Part
    hidden: torch.Tensor  # (n, H)
    rows: Rows


def rows_at_once(n_rows: int, vocab_size: int, itemsize: int, device_type: str) -> int:
    """How many rows of logits are held at once, where nobody says: the one place that decides.

    On a CPU an eighth of them (a sixteenth in 16 bits, whose products need a copy in 32), from 256
    to 1,024. On a GPU 2,048, or as many as a GiB of logits has room for. All chunks are of about
    one size.
    """
    if device_type == "cpu":
        share = n_rows // (8 if itemsize > 2 else 16)
        most = max(CPU_ROWS, min(share, CPU_MOST_ROWS))
    else:
        most = max(GPU_ROWS, GPU_BYTES // (_padded(vocab_size) * itemsize))
    n_chunks = max(1, -(-n_rows // most))
    return max(1, -(-n_rows // n_chunks))


def _padded(vocab_size: int) -> int:
    """The row stride of logits on a GPU: with less the products are not aligned."""
    return -(-vocab_size // 64) * 64


class Products:
    """The matrix products that lead from hidden states to logits, a chunk at a time."""

    def __init__(self, hidden, weight, bias, rows, plan, n_rows):
        """For chunks of at most n_rows of hidden (n_rows, H); rows have all but the logits."""
        self.hidden, self.weight, self.bias = (
            None if tensor is None else tensor.detach() for tensor in (hidden, weight, bias)
        )
        self.rows = Rows(*(None if tensor is None else tensor.detach() for tensor in rows))
        self.dtype = plan.logits_dtype
        self.on_cpu = hidden.device.type == "cpu"
        self.vocab_size = weight.shape[0]
        stride = self.vocab_size if self.on_cpu else _padded(self.vocab_size)
        self.buffer = hidden.new_empty(n_rows, stride, dtype=self.dtype)
        if self.on_cpu and self.dtype != weight.dtype:
            self.weight = self.weight.to(self.dtype)  # a CPU's product is of one dtype

    def chunk(self, part: Part, ignored: torch.Tensor | None) -> Chunk:
        """The logits of some rows, in the buffer until the next chunk's."""
        hidden = self.hidden[part]
        if ignored is not None:  # NaN in them would come back through 0 * NaN
            hidden = hidden.masked_fill(ignored[part][:, None], 0.0)
        logits = self.buffer[: hidden.shape[0], : self.vocab_size]
        if self.on_cpu:
            operand = hidden.to(self.dtype)
            if self.bias is None:
                torch.mm(operand, self.weight.T, out=logits)
            else:
                torch.addmm(self.bias.to(self.dtype), operand, self.weight.T, out=logits)
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


class Gradients:
    """Of hidden states, weight and bias, those that are needed: sums over chunks."""

    def __init__(self, hidden, weight, bias, needs, n_chunks, covers_all):
        """Places for them; rows that no chunk has get 0."""
        self.head_weight = weight.detach()
        needs_hidden, needs_weight, needs_bias = needs
        self.hidden = self.weight = self.bias = None
        if needs_hidden:
            self.hidden = hidden.new_empty(hidden.shape)
            if not covers_all:
                self.hidden.zero_()
        self.sums = n_chunks > 1 and compute_dtype(weight) != weight.dtype
        self.weight_dtype = weight.dtype
        if needs_weight:
            dtype = compute_dtype(weight) if self.sums else weight.dtype
            self.weight = weight.new_empty(weight.shape, dtype=dtype)
            if n_chunks == 0:
                self.weight.zero_()
        if needs_bias:
            self.bias = bias.new_zeros(bias.shape, dtype=compute_dtype(bias))
            self.bias_dtype = bias.dtype
        self.is_first = True

    def add(self, chunk: Chunk, grad_logits: torch.Tensor) -> None:
        """What a chunk contributes, by the gradient of its logits (n, V)."""
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)
        grad = grad_logits.to(self.head_weight.dtype)
        if self.hidden is not None and isinstance(chunk.part, slice):
            torch.mm(grad, self.head_weight, out=self.hidden[chunk.part])
        elif self.hidden is not None:
            self.hidden[chunk.part] = torch.mm(grad, self.head_weight)
        if self.weight is not None:
            self._add_to_weight(grad.T, chunk.hidden)
        self.is_first = False

    def _add_to_weight(self, grad, hidden):
        if self.weight.device.type == "cpu":  # where a product has one dtype
            grad, hidden = grad.to(self.weight.dtype), hidden.to(self.weight.dtype)
        in_dtype = {} if grad.dtype == self.weight.dtype else dict(out_dtype=self.weight.dtype)
        if self.is_first:
            torch.mm(grad, hidden, out=self.weight, **in_dtype)
        else:
            torch.addmm(self.weight, grad, hidden, out=self.weight, **in_dtype)

    def finished(self) -> list[torch.Tensor | None]:
        """Those of hidden, weight and bias, each rounded once."""
        weight = None if self.weight is None else self.weight.to(self.weight_dtype)
        bias = None if self.bias is None else self.bias.to(self.bias_dtype)
        return [self.hidden, weight, bias]


class Cut(NamedTuple):
    """The rows of a call cut into parts."""

    parts: list[Part]
    largest: int
    ignored: torch.Tensor | None  # (n_rows,), where such rows are in the parts
    covers_all: bool


def cut(rows: Rows, plan: Plan, device: torch.device) -> Cut:
    """The parts of all rows; with skip_ignored those that count, which the host has to know."""
    n_rows, ignored, counted = rows.targets.shape[1], None, None
    if not rows.has_probabilities:
        ignored = rows.targets[0] == plan.options.ignore_index
        if plan.skip_ignored:
            counted, ignored = (~ignored).nonzero().squeeze(1), None
            counted = None if counted.shape[0] == n_rows else counted
            n_rows = n_rows if counted is None else counted.shape[0]
        elif device.type == "cpu" and not ignored.any():
            ignored = None
    vocab_size = rows.logits.shape[2]
    size = plan.chunk_size
    if size is None:
        size = rows_at_once(n_rows, vocab_size, plan.logits_dtype.itemsize, device.type)
    parts = [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
    if counted is not None:
        parts = [counted[part] for part in parts]
    return Cut(parts, min(size, n_rows), ignored, counted is None)


def merged(results: list[Result], cut: Cut, rows: Rows, options: LossOptions) -> Result:
    """The results of the chunks as one: sums of losses, the rest in the place of its rows."""
    n_rows, dtype = rows.targets.shape[1], compute_dtype(rows.logits)
    if options.reduction != "none":
        losses = [result.loss for result in results]
        total = torch.stack(losses).sum() if losses else rows.logits.new_zeros((), dtype=dtype)
        if not losses and options.reduction == "mean":
            total = total / rows.normalizer
    fields = {}
    for name in ("losses", "unweighted", "lse", "entropy", "predictions"):
        found = [getattr(result, name) for result in results]
        if name == "losses" and options.reduction == "none":
            found = [result.loss for result in results]
        if found and found[0] is not None or not found:
            kind = torch.int64 if name == "predictions" else dtype
            fill = -1 if name == "predictions" else 0
            fields[name] = placed(found, cut, rows.logits.new_full((n_rows,), fill, dtype=kind))
    loss = fields["losses"] if options.reduction == "none" else total
    divisor = rows.normalizer if options.reduction == "mean" else None
    return Result(loss, divisor=divisor, **fields)


def placed(found: list[torch.Tensor], cut: Cut, out: torch.Tensor) -> torch.Tensor:
    """The values of the parts where their rows are."""
    for part, values in zip(cut.parts, found, strict=True):
        out[part] = values
    return out


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """The dtypes of products are decided here."""
    if not is_autocast(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield
