"""Which kernel, block and warps: the only place that decides.

The functions of sizes are pure; those of tensors ask them. None depends on the GPU but for the
threads of its warps, so that a loss is the same on all of them, and in Triton's interpreter.
"""

import functools
from dataclasses import dataclass

import torch

from ..options import LossOptions
from ..rows import Rows
from .arguments import loads_shares

SMALL_VOCAB = 1024  # up to here a program holds whole rows, several at once
SPLIT_VOCAB = 8192  # from here on a row is worth several programs, if there are few rows
MAX_SPLITS = 128  # programs that share a row
MAX_SPLIT_ROWS = 128
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
    """`block_rows` whole rows of up to `block_v` columns a program, each on `lanes` threads."""

    block_rows: int
    block_v: int
    num_warps: int
    lanes: int


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
    """One warp, 16 elements a thread, so that a few copies of them fit in registers; 32 from V =
    513 on.

    They are of one row, on as few lanes as hold it: what a row costs once (its target, its
    addresses, its sums over lanes) a warp then pays once for several rows. 56 instructions an
    element at V = 65, loss and gradient, where every lane had columns of every row 113.
    """
    block_v = _power_of_two(vocab_size)
    lanes = min(warp_size, max(1, block_v // 16))
    block_rows = max(warp_size // lanes, 512 // block_v)
    return SmallConfig(block_rows=block_rows, block_v=block_v, num_warps=1, lanes=lanes)


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

    Each gets as many steps, the last what is left: none is without columns. The number depends on
    sizes alone, not on the GPU, so that a loss is the same on all of them.
    """
    if not 0 < n_rows <= MAX_SPLIT_ROWS or vocab_size < SPLIT_VOCAB:
        return 1
    config = split_config(element_size)
    steps = -(-vocab_size // (config.block_v * config.unroll))
    most = min(FULL_GPU // n_rows, steps, MAX_SPLITS)
    each = -(-steps // most)
    return -(-steps // each)


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


def is_small(logits: torch.Tensor) -> bool:
    """Whether a program holds whole rows of these logits."""
    return logits.shape[2] <= SMALL_VOCAB


def is_heavy(rows: Rows, options: LossOptions) -> bool:
    """Whether the statistics of a row take many more registers than those of a softmax."""
    each = options.return_stats, options.softcap is not None, options.label_smoothing > 0.0
    return loads_shares(rows, options) or all(each)


def small_of(logits: torch.Tensor) -> SmallConfig:
    """`small_config` of these logits."""
    return small_config(logits.shape[2], warp_size_of(logits.device))


def held_of(rows: Rows, options: LossOptions) -> StreamConfig:
    """`held_config` of these rows."""
    return held_config(*_sizes(rows.logits), is_heavy(rows, options))


def stream_of(logits: torch.Tensor, splits: int = 1, heavy: bool = False) -> StreamConfig:
    """`stream_config` of these logits, or `split_config` if their rows are shared."""
    vocab_size, element_size, warp_size = _sizes(logits)
    if splits > 1:
        return split_config(element_size, warp_size, heavy)
    return stream_config(vocab_size, element_size, warp_size, heavy)


def tangents_of(rows: Rows, options: LossOptions) -> StreamConfig:
    """`tangents_config` of these rows, whose statistics need no options of their own."""
    heavy = options.softcap is not None or loads_shares(rows, options)
    return tangents_config(*_sizes(rows.logits), heavy)


def _sizes(logits):
    return logits.shape[2], logits.element_size(), warp_size_of(logits.device)


def warp_size_of(device: torch.device) -> int:
    """64 on AMD's CDNA, 32 on its RDNA and everywhere else, the interpreter included."""
    if torch.version.hip is None or device.type != "cuda":
        return 32
    return torch.cuda.get_device_properties(device).warp_size
