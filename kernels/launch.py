"""Which kernel, block and warps: the only place that decides; and the order of the launches.

The four public functions are those of fused_ce/cpu.py; fused_ce/autograd.py calls either. All take
rows of logits (n_groups, rows_per_group, vocab_size), see fused_ce/rows.py. Nothing here waits for
the device.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch

from ..options import LossOptions
from ..rows import is_dense, is_packed
from .backward import launch_backward, launch_scale
from .forward import launch_forward
from .fused import launch_forward_with_grad
from .reduce import Workspace, launch_mean_divisor
from .small import launch_small
from .split import MAX_SPLIT_ROWS, MAX_SPLITS, launch_split

SMALL_VOCAB = 1024  # up to here a program holds whole rows, several at once
SPLIT_VOCAB = 8192  # from here on a row is worth several programs, if there are few rows
FULL_GPU = 1024  # programs of 128 threads that keep a large GPU's memory busy


@dataclass(frozen=True)
class StreamConfig:
    """A row is read in steps of `unroll` tiles of `block_v` columns.

    The in-forward gradient keeps the last `held` tiles of a row in registers; `evict` is the cache
    hint of what it reads twice.
    """

    block_v: int
    unroll: int
    num_warps: int
    held: int = 0
    evict: str = "evict_last"


@dataclass(frozen=True)
class SmallConfig:
    """`block_rows` whole rows of up to `block_v` columns a program."""

    block_rows: int
    block_v: int
    num_warps: int


@functools.cache
def stream_config(
    vocab_size: int, element_size: int, warp_size: int = 32, class_sums: bool = False
) -> StreamConfig:
    """For one pass over a row: a 16-byte vector a thread and tile, four tiles in flight, and more
    threads for longer rows.

    Two in flight in float64, and where class weights are summed too (class_sums): else registers
    spill.
    """
    threads = 128 if vocab_size <= 8192 else 256 if vocab_size <= 65536 else 512
    if element_size == 8:
        return _stream(min(threads, 256), element_size, warp_size, unroll=2)
    return _stream(threads, element_size, warp_size, unroll=2 if class_sums else 4)


@functools.cache
def held_config(vocab_size: int, element_size: int, warp_size: int = 32) -> StreamConfig:
    """For two passes over a row: as many threads as hold it in eight vectors each, up to 1,024.

    Those are 32 of the 64 registers that 1,024 threads have each, whatever the block: a row of
    65,536 16-bit logits, or two of 32,768, stays on a multiprocessor. Short rows have 64 threads
    and fewer vectors: what a thread does once for its row costs 51 instructions an element at
    V = 1,025 in all, with 128 threads 80. float64 has few of both: its arithmetic needs registers.
    """
    vectors = -(-vocab_size * element_size // 16)
    most_threads, most_held, unroll = (256, 4, 2) if element_size == 8 else (1024, 8, 4)
    threads = min(most_threads, max(64, _power_of_two(-(-vectors // most_held))))
    held = min(most_held, _power_of_two(-(-vectors // threads)))
    return _stream(threads, element_size, warp_size, min(unroll, held), held)


def _stream(threads, element_size, warp_size, unroll, held=0):
    return StreamConfig(
        block_v=threads * (16 // element_size),
        unroll=unroll,
        num_warps=threads // warp_size,
        held=held,
    )


def _power_of_two(at_least):
    return 1 << (at_least - 1).bit_length()


@functools.cache
def small_config(vocab_size: int, warp_size: int = 32) -> SmallConfig:
    """512 elements a warp of 32: 16 each, so that a few copies of them fit in registers.

    What a row costs once (its target, its addresses) every thread pays for every row of the tile,
    so a program takes few rows: 55 instructions an element at V = 65 against 145 for 16 rows.
    """
    block_v = _power_of_two(vocab_size)
    block_rows = max(1, 512 // block_v)
    num_warps = max(1, block_rows * block_v // (16 * warp_size))
    return SmallConfig(block_rows=block_rows, block_v=block_v, num_warps=num_warps)


@functools.cache
def split_config(element_size: int, warp_size: int = 32, class_sums: bool = False) -> StreamConfig:
    """For few rows: small programs, of which there are more."""
    return stream_config(SMALL_VOCAB, element_size, warp_size, class_sums)


def row_splits(n_rows: int, vocab_size: int, element_size: int) -> int:
    """How many programs share a row of the forward: 1, but for few and long rows.

    Each gets a whole step at least. The number depends on sizes alone, not on the GPU, so that a
    loss is the same on all of them.
    """
    if not 0 < n_rows <= MAX_SPLIT_ROWS or vocab_size < SPLIT_VOCAB:
        return 1
    config = split_config(element_size)
    steps = vocab_size // (config.block_v * config.unroll)
    return max(1, min(FULL_GPU // n_rows, steps, MAX_SPLITS))


@dataclass(frozen=True)
class Variant:
    """A choice of the policy, and the smallest shape known to make it."""

    kernel: str
    config: StreamConfig | SmallConfig
    n_rows: int
    vocab_size: int


def variants(
    element_size: int, warp_size: int = 32, vocab_sizes: tuple[int, ...] = ()
) -> list[Variant]:
    """Every kernel and configuration that can be chosen for V from 1 to 1,000,000.

    The shapes have vocabularies of `vocab_sizes` where those choose it, else one above a power of
    two: the policy changes nowhere else.
    """
    found = {}
    for vocab_size in (*vocab_sizes, *((1 << power) + 1 for power in range(20)), 1):
        for n_rows in (MAX_SPLIT_ROWS + 1, 1):
            for kernel, config in _choices(n_rows, vocab_size, element_size, warp_size):
                variant = Variant(kernel, config, n_rows, vocab_size)
                found.setdefault((kernel, config), variant)
    return list(found.values())


def _choices(n_rows, vocab_size, element_size, warp_size):
    if vocab_size <= SMALL_VOCAB:
        return [("small", small_config(vocab_size, warp_size))]
    stream = stream_config(vocab_size, element_size, warp_size)
    if row_splits(n_rows, vocab_size, element_size) > 1:
        few = split_config(element_size, warp_size)
        return [("split", few), ("backward", few), ("scale", stream)]
    held = held_config(vocab_size, element_size, warp_size)
    rows = [("forward", stream), ("forward_with_grad", held), ("backward", stream)]
    return [*rows, ("scale", stream)]


def forward(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, options: LossOptions
) -> tuple[torch.Tensor | None, ...]:
    """(loss () or (n_rows,), sums, row_max, row_sum); the last three are for `backward`."""
    with _on_device(logits):
        dtype, weight = _compute_dtype(logits), _contiguous(weight)
        splits = _splits(logits)
        workspace = _prepare(logits, targets, weight, options, dtype, splits)
        losses, loss = _outputs(logits, options, dtype)
        row_max, row_sum = None, None
        if _is_empty(logits):
            _fill_empty(loss, options)
        elif _is_small(logits):
            config = small_config(logits.shape[2], _warp_size(logits.device))
            launch_small(
                logits, targets, weight, workspace.sums, options, config, dtype,
                losses=losses, loss=loss, counters=workspace.counters,
            )  # fmt: skip
        else:
            row_max, row_sum = _per_row(logits, dtype), _per_row(logits, dtype)
            _forward_rows(
                _dense(logits), targets, weight, workspace, losses, loss, (row_max, row_sum),
                options, splits,
            )  # fmt: skip
        return losses if loss is None else loss, workspace.sums, row_max, row_sum


def forward_with_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    options: LossOptions,
    grad_logits: torch.Tensor,
) -> torch.Tensor:
    """The loss; fills grad_logits (laid out as the logits, or they) for an upstream of 1."""
    with _on_device(logits):
        dtype, weight = _compute_dtype(logits), _contiguous(weight)
        splits = _splits(logits)
        workspace = _prepare(logits, targets, weight, options, dtype, splits)
        losses, loss = _outputs(logits, options, dtype)
        if _is_empty(logits):
            _fill_empty(loss, options)
        elif _is_small(logits):
            config = small_config(logits.shape[2], _warp_size(logits.device))
            launch_small(
                logits, targets, weight, workspace.sums, options, config, dtype,
                losses=losses, loss=loss, counters=workspace.counters, grad_logits=grad_logits,
            )  # fmt: skip
        elif splits > 1:
            source, out = _dense_pair(logits, grad_logits)
            stats = _per_row(logits, dtype), _per_row(logits, dtype)
            _forward_rows(source, targets, weight, workspace, losses, loss, stats, options, splits)
            launch_backward(
                None, source, targets, weight, workspace.sums, *stats,
                out, options, _stream_config(logits, splits),
            )  # fmt: skip
            _copy_back(out, grad_logits)
        else:
            source, out = _dense_pair(logits, grad_logits)
            config = held_config(logits.shape[2], logits.element_size(), _warp_size(logits.device))
            launch_forward_with_grad(
                source, targets, weight, workspace, losses, loss, out, options, config
            )
            _copy_back(out, grad_logits)
        return losses if loss is None else loss


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
    sums, row_max, row_sum = stats
    with _on_device(logits):
        weight = _contiguous(weight)
        if _is_small(logits):
            config = small_config(logits.shape[2], _warp_size(logits.device))
            launch_small(
                logits, targets, weight, sums, options, config, _compute_dtype(logits),
                grad_logits=grad_logits, grad_losses=grad_losses,
            )  # fmt: skip
            return
        source, out = _dense_pair(logits, grad_logits)
        launch_backward(
            grad_losses, source, targets, weight, sums, row_max, row_sum, out, options,
            _stream_config(logits, _splits(logits)),
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


def _splits(logits: torch.Tensor) -> int:
    return row_splits(logits.shape[:2].numel(), logits.shape[2], logits.element_size())


def _stream_config(logits: torch.Tensor, splits: int = 1, class_sums: bool = False) -> StreamConfig:
    element_size, warp_size = logits.element_size(), _warp_size(logits.device)
    if splits > 1:
        return split_config(element_size, warp_size, class_sums)
    return stream_config(logits.shape[2], element_size, warp_size, class_sums)


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


def _compute_dtype(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _contiguous(weight):
    return None if weight is None else weight.contiguous()


def _per_row(logits, dtype):
    return torch.empty(logits.shape[:2].numel(), dtype=dtype, device=logits.device)


def _outputs(logits, options, dtype):
    """Where the losses (n_rows,) and the loss () go; no loss without a reduction."""
    losses = _per_row(logits, dtype)
    if options.reduction == "none":
        return losses, None
    return losses, torch.empty((), dtype=dtype, device=logits.device)


def _fill_empty(loss, options):
    if loss is not None:
        loss.fill_(torch.nan if options.reduction == "mean" else 0.0)


def _prepare(logits, targets, weight, options, dtype, splits):
    """What the row kernels need before the first row; split rows count their targets themselves."""
    n_rows = logits.shape[:2].numel()
    sums_weights = weight is not None and options.label_smoothing > 0.0
    workspace = Workspace(
        logits, dtype, n_row_counters=n_rows if splits > 1 else 0,
        counts=options.reduction != "none" or sums_weights or splits > 1,
    )  # fmt: skip
    if n_rows and (sums_weights or options.reduction == "mean" and splits == 1):
        launch_mean_divisor(targets, weight, workspace, logits.shape[2], options)
    return workspace


def _forward_rows(logits, targets, weight, workspace, losses, loss, stats, options, splits):
    """The losses of dense rows, one program or several a row."""
    class_sums = weight is not None and options.label_smoothing > 0.0
    config = _stream_config(logits, splits, class_sums)
    if splits > 1:
        launch_split(
            logits, targets, weight, workspace, losses, loss, stats, options, config, splits
        )
    else:
        launch_forward(logits, targets, weight, workspace, losses, loss, stats, options, config)


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
