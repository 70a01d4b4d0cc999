"""Which kernel, block and warps: the only place that decides; and the order of the launches.

The five public functions are those of fused_ce/cpu.py; fused_ce/autograd.py calls either. All take
rows of logits (n_groups, rows_per_group, vocab_size), see fused_ce/rows.py. Nothing here waits for
the device.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch

from ..options import LossOptions
from ..rows import (
    Direction,
    Result,
    Rows,
    Tangents,
    Upstream,
    empty_gradient,
    is_dense,
    is_packed,
)
from .arguments import Outputs, RowStatistics, is_congruent, loads_shares
from .backward import launch_backward, launch_scale
from .forward import launch_forward
from .fused import launch_forward_with_grad
from .reduce import Workspace, launch_mean_divisor
from .small import launch_small
from .split import MAX_SPLIT_ROWS, MAX_SPLITS, launch_split
from .tangents import launch_tangents

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
    vocab_size: int, element_size: int, warp_size: int = 32, heavy: bool = False
) -> StreamConfig:
    """For one pass over a row: a 16-byte vector a thread and tile, four tiles in flight, and more
    threads for longer rows.

    Two in flight in float64, and where more is done with a logit than a softmax (heavy): else
    registers spill.
    """
    threads = 128 if vocab_size <= 8192 else 256 if vocab_size <= 65536 else 512
    if element_size == 8:
        return _stream(min(threads, 256), element_size, warp_size, unroll=2)
    return _stream(threads, element_size, warp_size, unroll=2 if heavy else 4)


@functools.cache
def held_config(
    vocab_size: int, element_size: int, warp_size: int = 32, heavy: bool = False
) -> StreamConfig:
    """For two passes over a row: as many threads as hold it in eight vectors each, up to 1,024.

    Those are 32 of the 64 registers that 1,024 threads have each, whatever the block: a row of
    65,536 16-bit logits, or two of 32,768, stays on a multiprocessor. Short rows have 64 threads
    and fewer vectors: what a thread does once for its row costs 51 instructions an element at
    V = 1,025 in all, with 128 threads 80. float64 has few of both, its arithmetic needs registers;
    and so have rows where more is done with a logit than a softmax (heavy): with 1,024 threads they
    spill up to 400 bytes.
    """
    vectors = -(-vocab_size * element_size // 16)
    most_threads, most_held, unroll = 1024, 8, 4
    if element_size == 8:
        most_threads, most_held, unroll = 256, 4, 2
    elif heavy:
        most_threads, most_held, unroll = 512, 4, 2
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
def split_config(element_size: int, warp_size: int = 32, heavy: bool = False) -> StreamConfig:
    """For few rows: small programs, of which there are more."""
    return stream_config(SMALL_VOCAB, element_size, warp_size, heavy)


@functools.cache
def tangents_config(
    vocab_size: int, element_size: int, warp_size: int = 32, heavy: bool = False
) -> StreamConfig:
    """For two passes over a row and its direction: as many threads as read it in eight vectors
    each, up to 1,024.

    A large GPU, with 1,024 threads a multiprocessor, then works on 35 MB of rows at a time, and the
    second pass finds them in its caches. One tile in flight in float64, and where more is done with
    a logit than a softmax (heavy): two take up to 170 registers, one takes 64.
    """
    most_threads, unroll = 1024, 2
    if element_size == 8:
        most_threads, unroll = 256, 1
    elif heavy:
        most_threads, unroll = 512, 1
    vectors = -(-vocab_size * element_size // 16)
    threads = min(most_threads, max(64, _power_of_two(-(-vectors // 8))))
    return _stream(threads, element_size, warp_size, unroll)


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


def forward(rows: Rows, options: LossOptions, unweighted: bool = False) -> Result:
    """The loss, and what else was asked for; `saved` is for `backward`."""
    return _forward(rows, options, unweighted, None)


def forward_with_grad(
    rows: Rows, options: LossOptions, grad_logits: torch.Tensor, unweighted: bool = False
) -> Result:
    """The same; fills grad_logits (laid out as the logits, or they) for an upstream of 1."""
    return _forward(rows, options, unweighted, grad_logits)


def _forward(rows, options, unweighted, grad_logits):
    logits = rows.logits
    with _on_device(logits):
        dtype, rows = _compute_dtype(logits), _as_kernels_take_them(rows)
        splits = _splits(logits)
        workspace, counts = _prepare(rows, options, dtype, splits)
        outputs = _outputs(rows, options, dtype, unweighted)
        statistics = RowStatistics()
        if logits.numel() == 0:
            _fill_empty(outputs.loss, rows, options)
        elif _is_small(logits):
            config = small_config(logits.shape[2], _warp_size(logits.device))
            launch_small(
                rows, options, workspace.sums, workspace.counters, config, dtype,
                outputs=outputs, grad_logits=grad_logits,
            )  # fmt: skip
        else:
            is_read_again = grad_logits is None or options.return_stats or splits > 1
            if is_read_again:
                statistics = _statistics(rows, options, dtype)
            _forward_of_long_rows(
                rows, options, workspace, outputs, statistics, grad_logits, splits, counts
            )
    divisor = None
    if options.reduction == "mean" and (options.return_stats or unweighted):
        divisor = workspace.sums[0]
    losses, loss, *asked = outputs
    entropy = outputs.entropy
    if entropy is not None:
        entropy = entropy.clone()  # the user may change the other
    saved = (workspace.sums, entropy, *statistics)
    return Result(losses if loss is None else loss, losses, *asked, divisor, saved)


def _forward_of_long_rows(
    rows, options, workspace, outputs, statistics, grad_logits, splits, counts
):
    """One program a row, or several; for a gradient each row is held or read again."""
    logits, dense, out = rows.logits, _dense(rows), grad_logits
    if out is not None and dense.logits is not logits:
        out = dense.logits  # one copy is both
    heavy = _is_heavy(rows, options)
    if splits == 1 and out is not None:
        warp_size = _warp_size(logits.device)
        config = held_config(logits.shape[2], logits.element_size(), warp_size, heavy)
        launch_forward_with_grad(dense, options, workspace, outputs, statistics, out, config)
    elif splits == 1:
        config = _stream_config(logits, splits, heavy)
        launch_forward(dense, options, workspace, outputs, statistics, config)
    else:
        config = _stream_config(logits, splits, heavy)
        launch_split(dense, options, workspace, outputs, statistics, config, splits, counts)
    if splits > 1 and out is not None:
        launch_backward(
            Upstream(None), dense, options, workspace.sums, statistics, None, out, None,
            _stream_config(logits, splits),
        )  # fmt: skip
    _copy_back(out, grad_logits)


def backward(
    upstream: Upstream,
    rows: Rows,
    saved: tuple[torch.Tensor | None, ...],
    options: LossOptions,
    grad_logits: torch.Tensor | None,
    grad_targets: torch.Tensor | None = None,
) -> None:
    """Fills grad_logits (laid out as the logits, or they) and grad_targets, whichever is given."""
    logits = rows.logits
    if logits.numel() == 0:
        return
    sums, entropy, *statistics = saved
    with _on_device(logits):
        upstream = _dense_upstream(upstream, logits)
        rows = _as_kernels_take_them(rows)
        if _is_small(logits):
            config = small_config(logits.shape[2], _warp_size(logits.device))
            launch_small(
                rows, options, sums, None, config, _compute_dtype(logits),
                upstream=upstream, grad_logits=grad_logits, grad_targets=grad_targets,
            )  # fmt: skip
            return
        dense = _dense(rows)
        out, out_targets = grad_logits, grad_targets
        if grad_logits is not None and dense.logits is not logits:
            out = dense.logits
        if grad_targets is not None and not is_dense(grad_targets):
            out_targets = torch.empty_like(dense.targets)
        launch_backward(
            upstream, dense, options, sums, statistics, entropy, out, out_targets,
            _stream_config(logits, _splits(logits)),
        )  # fmt: skip
        _copy_back(out, grad_logits)
        _copy_back(out_targets, grad_targets)


def scale(grad_logits: torch.Tensor, grad_losses: torch.Tensor, out: torch.Tensor) -> None:
    """out = grad_logits * grad_losses, () or (n_rows,); out may be grad_logits."""
    if grad_logits.numel() == 0:
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


def tangents(
    direction: Direction,
    upstream: Upstream,
    rows: Rows,
    options: LossOptions,
    grad_logits: torch.Tensor | None = None,
    grad_targets: torch.Tensor | None = None,
) -> Tangents:
    """Derivatives of rows along a direction, without sample_weight and reduction.

    Fills grad_logits and grad_targets, where given, with those of what `backward` would write for
    this upstream gradient, (n_rows,) each: a product with the Hessian.
    """
    logits = rows.logits
    with _on_device(logits):
        results = Tangents(*(_per_row(logits, _compute_dtype(logits)) for _ in range(3)))
        if logits.numel() == 0:
            return results
        dense = _dense(_as_kernels_take_them(rows))
        out, out_targets = grad_logits, grad_targets
        if grad_logits is not None and dense.logits is not logits:
            out = dense.logits
        if grad_targets is not None and not is_dense(grad_targets):
            out_targets = torch.empty_like(dense.targets)
        if out is not None or out_targets is not None:
            upstream = _dense_upstream(upstream, logits)
        direction = Direction(
            _beside(direction.logits, dense.logits), _beside(direction.targets, dense.targets)
        )
        heavy = options.softcap is not None or loads_shares(rows, options)
        config = tangents_config(
            logits.shape[2], logits.element_size(), _warp_size(logits.device), heavy
        )
        launch_tangents(direction, upstream, dense, options, results, out, out_targets, config)
        _copy_back(out, grad_logits)
        _copy_back(out_targets, grad_targets)
    return results


def _beside(tangent, rows):
    """A tangent of dense rows that begins where they do, counted from a 16-byte boundary."""
    if tangent is None or is_dense(tangent) and is_congruent(rows, tangent):
        return tangent
    return empty_gradient(rows).copy_(tangent)


def _is_small(logits: torch.Tensor) -> bool:
    return logits.shape[2] <= SMALL_VOCAB


def _splits(logits: torch.Tensor) -> int:
    return row_splits(logits.shape[:2].numel(), logits.shape[2], logits.element_size())


def _stream_config(logits: torch.Tensor, splits: int = 1, heavy: bool = False) -> StreamConfig:
    element_size, warp_size = logits.element_size(), _warp_size(logits.device)
    if splits > 1:
        return split_config(element_size, warp_size, heavy)
    return stream_config(logits.shape[2], element_size, warp_size, heavy)


def _is_heavy(rows: Rows, options: LossOptions) -> bool:
    """Whether the statistics of a row take many more registers than those of a softmax."""
    return options.return_stats or options.softcap is not None or loads_shares(rows, options)


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


def _as_kernels_take_them(rows):
    """Class and sample weights contiguous: a few bytes a class or row."""
    weight, sample_weight = rows.weight, rows.sample_weight
    if weight is None and sample_weight is None:
        return rows
    return rows._replace(
        weight=None if weight is None else weight.contiguous(),
        sample_weight=None if sample_weight is None else sample_weight.contiguous(),
    )


def _per_row(logits, dtype):
    return torch.empty(logits.shape[:2].numel(), dtype=dtype, device=logits.device)


def _outputs(rows, options, dtype, unweighted):
    """Places for what was asked for; no loss without a reduction."""
    logits, loss = rows.logits, None
    if options.reduction != "none":
        loss = torch.empty((), dtype=dtype, device=logits.device)
    outputs = Outputs(_per_row(logits, dtype), loss)
    if unweighted:
        outputs = outputs._replace(unweighted=_per_row(logits, dtype))
    if options.return_stats:
        outputs = outputs._replace(
            lse=_per_row(logits, dtype),
            entropy=_per_row(logits, dtype),
            predictions=_per_row(logits, torch.int64),
        )
    return outputs


def _statistics(rows, options, dtype):
    return RowStatistics(
        _per_row(rows.logits, dtype),
        _per_row(rows.logits, dtype),
        _per_row(rows.logits, dtype) if loads_shares(rows, options) else None,
    )


def _fill_empty(loss, rows, options):
    if loss is not None:
        divides = rows.normalizer is not None or options.normalizer is not None
        loss.fill_(torch.nan if options.reduction == "mean" and not divides else 0.0)


def _prepare(rows, options, dtype, splits):
    """A workspace with the divisor of a mean in it; and whether it is left to the row kernel.

    Split rows count their targets themselves.
    """
    n_rows = rows.logits.shape[:2].numel()
    is_mean = options.reduction == "mean"
    workspace = Workspace(
        rows.logits, dtype, n_row_counters=n_rows if splits > 1 else 0,
        counts=options.reduction != "none" or splits > 1,
    )  # fmt: skip
    divisor = options.normalizer if rows.normalizer is None else rows.normalizer
    if divisor is None and rows.has_probabilities and rows.sample_weight is None:
        divisor = n_rows
    if is_mean and divisor is not None:
        workspace.sums[0].fill_(divisor)
    elif is_mean and splits == 1 and n_rows:
        launch_mean_divisor(rows, workspace, options)
    return workspace, is_mean and divisor is None and splits > 1


def _dense_upstream(upstream, logits):
    """Gradients of stats contiguous, n_rows numbers each; of the loss 0 where it has none, for
    which a kernel would take 1."""
    loss, lse, entropy = upstream
    return Upstream(
        logits.new_zeros(()) if loss is None else loss,
        None if lse is None else lse.contiguous(),
        None if entropy is None else entropy.contiguous(),
    )


def _dense(rows):
    """The rows with their vocabulary contiguous: a copy only of long rows that are not."""
    logits, targets = rows.logits, rows.targets
    if rows.has_probabilities and not is_dense(targets):
        rows = rows._replace(targets=targets.contiguous())
    return rows if is_dense(logits) else rows._replace(logits=logits.contiguous())


def _dense_pair(rows, out):
    """Dense rows and a dense place for their gradient: one copy is both."""
    if is_dense(rows):
        return rows, out
    copy = rows.contiguous()
    return copy, copy


def _copy_back(dense_out, out):
    if dense_out is not out:
        out.copy_(dense_out)
