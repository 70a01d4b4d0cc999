"""Which kernel, block and warps: the only place that decides; and the order of the launches.

The four public functions are those of fused_ce/cpu.py; fused_ce/autograd.py calls either. All take
rows of logits (n_groups, rows_per_group, vocab_size), see fused_ce/rows.py. Nothing here waits for
the device.
"""

import contextlib
from dataclasses import dataclass

import torch

from ..options import LossOptions
from ..rows import is_dense, is_packed
from .backward import launch_backward, launch_scale
from .forward import launch_forward
from .fused import launch_forward_with_grad
from .reduce import PARTIALS, launch_mean_divisor, launch_reduce_losses
from .small import launch_small

SMALL_VOCAB = 1024  # up to here a program holds whole rows, several at once


@dataclass(frozen=True)
class StreamConfig:
    """A row is read in steps of `unroll` tiles of `block_v` columns."""

    block_v: int
    unroll: int
    num_warps: int


@dataclass(frozen=True)
class SmallConfig:
    """`block_rows` whole rows of up to `block_v` columns a program."""

    block_rows: int
    block_v: int
    num_warps: int


def stream_config(vocab_size: int, element_size: int, warp_size: int = 32) -> StreamConfig:
    """One 16-byte vector a thread and tile, four tiles in flight; more threads for longer rows."""
    threads = 128 if vocab_size <= 8192 else 256 if vocab_size <= 65536 else 512
    return StreamConfig(
        block_v=threads * (16 // element_size), unroll=4, num_warps=threads // warp_size
    )


def small_config(vocab_size: int, warp_size: int = 32) -> SmallConfig:
    """512 elements a warp of 32: 16 each, so that a few copies of them fit in registers.

    What a row costs once (its target, its addresses) every thread pays for every row of the tile,
    so a program takes few rows: 55 instructions an element at V = 65 against 145 for 16 rows.
    """
    block_v = 1 << (vocab_size - 1).bit_length()
    block_rows = max(1, 512 // block_v)
    num_warps = max(1, block_rows * block_v // (16 * warp_size))
    return SmallConfig(block_rows=block_rows, block_v=block_v, num_warps=num_warps)


def forward(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, options: LossOptions
) -> tuple[torch.Tensor | None, ...]:
    """(loss () or (n_rows,), partials, row_max, row_sum); the last three are for `backward`."""
    with _on_device(logits):
        dtype, weight, weight_sum = _class_weights(logits, weight, options)
        partials = _count(logits, targets, weight, options, dtype)
        losses, row_max, row_sum = _per_row(logits, dtype), None, None
        if _is_empty(logits):
            pass
        elif _is_small(logits):
            config = small_config(logits.shape[2], _warp_size(logits.device))
            launch_small(
                logits, targets, weight, weight_sum, partials, options, config, dtype, losses=losses
            )
        else:
            row_max, row_sum = _per_row(logits, dtype), _per_row(logits, dtype)
            launch_forward(
                _dense(logits), targets, weight, weight_sum, losses, row_max, row_sum, options,
                _stream_config(logits),
            )  # fmt: skip
        return _reduce(losses, partials, options), partials, row_max, row_sum


def forward_with_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    options: LossOptions,
    grad_logits: torch.Tensor,
) -> torch.Tensor:
    """The loss; fills grad_logits (laid out as the logits, or they) for an upstream of 1."""
    with _on_device(logits):
        dtype, weight, weight_sum = _class_weights(logits, weight, options)
        partials = _count(logits, targets, weight, options, dtype)
        losses = _per_row(logits, dtype)
        if _is_empty(logits):
            pass
        elif _is_small(logits):
            config = small_config(logits.shape[2], _warp_size(logits.device))
            launch_small(
                logits, targets, weight, weight_sum, partials, options, config, dtype,
                losses=losses, grad_logits=grad_logits,
            )  # fmt: skip
        else:
            source, out = _dense_pair(logits, grad_logits)
            launch_forward_with_grad(
                source, targets, weight, weight_sum, partials, losses, out, options,
                _stream_config(logits),
            )  # fmt: skip
            _copy_back(out, grad_logits)
        return _reduce(losses, partials, options)


def backward(
    grad_losses: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    stats: tuple[torch.Tensor | None, ...],
    options: LossOptions,
    grad_logits: torch.Tensor,
) -> None:
    """Fills grad_logits (laid out as the logits, or they) from the upstream () or (n_rows,)."""
    if _is_empty(logits):
        return
    partials, row_max, row_sum = stats
    with _on_device(logits):
        dtype, weight, weight_sum = _class_weights(logits, weight, options)
        if _is_small(logits):
            config = small_config(logits.shape[2], _warp_size(logits.device))
            launch_small(
                logits, targets, weight, weight_sum, partials, options, config, dtype,
                grad_logits=grad_logits, grad_losses=grad_losses,
            )  # fmt: skip
            return
        source, out = _dense_pair(logits, grad_logits)
        launch_backward(
            grad_losses, source, targets, weight, weight_sum, partials, row_max, row_sum, out,
            options, _stream_config(logits),
        )  # fmt: skip
        _copy_back(out, grad_logits)


def scale(grad_logits: torch.Tensor, grad_losses: torch.Tensor, out: torch.Tensor) -> None:
    """out = grad_logits * grad_losses, () or (n_rows,); out may be grad_logits."""
    if _is_empty(grad_logits):
        return
    with _on_device(grad_logits):
        config = _stream_config(grad_logits)
        if (
            grad_losses.dim() == 0
            and is_packed(grad_logits)
            and out.stride() == grad_logits.stride()
        ):
            launch_scale(grad_logits, grad_losses, out, config)
            return
        source, dense_out = _dense_pair(grad_logits, out)
        launch_scale(source, grad_losses, dense_out, config)
        _copy_back(dense_out, out)


def _is_empty(logits: torch.Tensor) -> bool:
    return logits.numel() == 0


def _is_small(logits: torch.Tensor) -> bool:
    return logits.shape[2] <= SMALL_VOCAB


def _stream_config(logits: torch.Tensor) -> StreamConfig:
    return stream_config(logits.shape[2], logits.element_size(), _warp_size(logits.device))


def _warp_size(device: torch.device) -> int:
    """64 on AMD's CDNA, 32 on its RDNA and everywhere else, the interpreter included."""
    if torch.version.hip is None or device.type != "cuda":
        return 32
    return torch.cuda.get_device_properties(device).warp_size


def _on_device(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


def _class_weights(logits, weight, options):
    """The dtype of the arithmetic, the weight in it, and its sum where smoothing needs that."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if weight is None:
        return dtype, None, None
    weight = weight.to(dtype).contiguous()
    return dtype, weight, weight.sum() if options.label_smoothing else None


def _per_row(logits, dtype):
    return torch.empty(logits.shape[:2].numel(), dtype=dtype, device=logits.device)


def _count(logits, targets, weight, options, dtype):
    """Partial sums of what "mean" divides by; the gradient needs them before the first row."""
    if options.reduction != "mean":
        return None
    partials = torch.empty(PARTIALS, dtype=dtype, device=logits.device)
    launch_mean_divisor(targets, weight, partials, logits.shape[2], options.ignore_index)
    return partials


def _reduce(losses, partials, options):
    if options.reduction == "none":
        return losses
    loss = torch.empty((), dtype=losses.dtype, device=losses.device)
    launch_reduce_losses(losses, partials, loss)
    return loss


def _dense(rows):
    """The rows with their vocabulary contiguous: a copy only of long rows that are not."""
    return rows if is_dense(rows) else rows.contiguous()


def _dense_pair(rows, out):
    """Dense rows and a dense place for their gradient: one copy is both."""
    if is_dense(rows):
        return rows, out
    copy = rows.contiguous()
    return copy, copy


def _copy_back(dense_out, out):
    if dense_out is not out:
        out.copy_(dense_out)
