"""How the rows of a call are cut into chunks, and the results of the chunks put together."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fused_ce.cpu import machine
from fused_ce.options import LossOptions
from fused_ce.rows import Result, Rows, compute_dtype
from fused_ce.tracing import is_autocast

Part = slice | torch.Tensor  # of rows: those of a slice, or those whose numbers a tensor holds

GPU_ROWS = 2048  # fewer, and the sum of grad_weight shows beside the products
GPU_BYTES = 1 << 30
CPU_ROWS = 512  # fewer, and the products take longer: 7 % for 256
CPU_MOST_ROWS = 1024
CPU_NATIVE_ROWS = 2048


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


def rows_at_once(n_rows: int, vocab_size: int, dtype: torch.dtype, device_type: str) -> int:
    """How many rows of logits are held at once, where nobody says: the one place that decides.

    On a CPU an eighth of them, from 512 to 1,024; half of that in 16 bits, whose sums are in 32.
    Where it multiplies 16 bits, up to 2,048 rows are one chunk: a gradient of the weight that needs
    no sum in 32 takes half the time. On a GPU 2,048, or as many as a GiB of logits has room for.
    All chunks are of about one size.
    """
    itemsize = dtype.itemsize
    if device_type == "cpu" and itemsize == 2 and n_rows <= CPU_NATIVE_ROWS:
        if machine.multiplies(dtype):
            return max(1, n_rows)
    if device_type == "cpu":
        most = max(CPU_ROWS, min(n_rows // 8, CPU_MOST_ROWS))
        most = most if itemsize > 2 else most // 2
    else:
        most = max(GPU_ROWS, GPU_BYTES // (padded(vocab_size) * itemsize))
    n_chunks = max(1, -(-n_rows // most))
    return max(1, -(-n_rows // n_chunks))


def padded(vocab_size: int) -> int:
    """The row stride of logits on a GPU: with less the products are not aligned."""
    return -(-vocab_size // 64) * 64


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
        size = rows_at_once(n_rows, vocab_size, plan.logits_dtype, device.type)
    parts: list[Part]
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
        if not losses and rows.normalizer is not None:
            total = total / rows.normalizer
    fields: dict[str, Any] = {}
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


def placed(found: Sequence[torch.Tensor], cut: Cut, out: torch.Tensor) -> torch.Tensor:
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
