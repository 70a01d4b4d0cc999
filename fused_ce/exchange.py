"""The numbers of rows that ranks tell each other: one all-gather for the rows of a loss.

Which classes a rank has follows from the sizes of all shards. These are remembered by the group and
the size of the own one; but another head, of other sizes elsewhere, may have a shard just as large
here. So each exchange carries them, and every rank sees what every other took them for.
"""

import itertools
import os
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fused_ce.options import LossOptions
from fused_ce.rows import Rows
from fused_ce.shards import Shard, ShardStatistics

HEADER = 5  # size, first, number of classes, where that is from; the sum of class weights
GUESSED, LEARNED, GIVEN = range(3)
_sizes_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Layout(NamedTuple):
    """How many classes each rank has, in rank order: perhaps a guess, until the next exchange."""

    sizes: tuple[int, ...]
    rank: int
    source: int = 1  # GUESSED, LEARNED or GIVEN

    @property
    def shard(self) -> Shard:
        """The classes of this rank."""
        return Shard(sum(self.sizes[: self.rank]), sum(self.sizes))

    @property
    def bounds(self) -> list[int]:
        """Where the classes of each rank begin, and where the last one's end."""
        return [0, *itertools.accumulate(self.sizes)]


class Gathered(NamedTuple):
    """What all ranks know of rows."""

    parts: ShardStatistics  # (n_ranks, n_rows)
    target_weight: torch.Tensor | None  # (n_rows,)
    weight_sums: torch.Tensor  # (n_ranks,)
    bounds: torch.Tensor  # (n_ranks + 1,) int64
    is_right: torch.Tensor | None  # (): whether every rank took the sizes for the same


class Exchange:
    """The exchanges of one loss, whose rows may come in chunks."""

    def __init__(
        self,
        group: "dist.ProcessGroup | None",
        size: int,
        sizes: Sequence[int] | None,
        backend: str,
    ):
        """`size` classes are here; `sizes` are those of all ranks, None to learn them."""
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "a vocabulary on several devices needs torch.distributed: call "
                "init_process_group() first, or fused_cross_entropy where all classes are on one"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.n_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("this process is not in the group that shares the vocabulary")
        self.size, self.on_host = size, backend != "triton"
        self.layout = self._layout(sizes)

    def _layout(self, sizes) -> Layout:
        if sizes is not None:
            sizes = tuple(int(size) for size in sizes)
            if len(sizes) != self.n_ranks or sizes[self.rank] != self.size or min(sizes) < 0:
                raise ValueError(
                    f"shard_sizes must have {self.n_ranks} sizes, the {self.size} classes of rank "
                    f"{self.rank} at its place, got {sizes}"
                )
            return Layout(sizes, self.rank, GIVEN)
        known = _sizes_of.get(self.group, {}).get(self.size)
        if known is not None:
            return Layout(known, self.rank)
        return Layout((self.size,) * self.n_ranks, self.rank, GUESSED)

    def of_rows(
        self, statistics: Callable[[Shard], tuple[ShardStatistics, torch.Tensor | None]],
        weight: torch.Tensor | None,
    ) -> Gathered:  # fmt: skip
        """Of what `statistics` finds, and the weight of the targets that are here."""
        return self.finish(self.start(statistics, weight))

    def start(self, statistics, weight) -> "Pending":
        """Send; other work may be done until `finish`."""
        found, target_weight = statistics(self.layout.shard)
        n_rows, dtype = found.row_sum.shape[0], found.row_sum.dtype
        columns = [found.row_max, found.row_sum, found.dot]
        if target_weight is not None:
            columns.append(target_weight)
        if found.exp_dot is not None:
            columns += [found.exp_dot, _as_bits(found.predictions, dtype)]
        sent = found.row_sum.new_empty(HEADER + len(columns) * n_rows)
        self._write_header(sent[:HEADER], weight)
        torch.stack(columns, out=sent[HEADER:].view(len(columns), n_rows))
        received = sent.new_empty(self.n_ranks, sent.shape[0])
        work = _all_gather(received, sent, self.group)
        return Pending(statistics, weight, self.layout, len(columns), received, work)

    def finish(self, pending: "Pending") -> Gathered:
        """What was received; once more where a guess was wrong."""
        pending.work.wait()
        while (right := self._corrected(pending)) is not None:
            self.layout = right
            pending = self.start(pending.statistics, pending.weight)
            pending.work.wait()
        received, sizes = pending.received, pending.layout.sizes
        headers, dtype = received[:, :HEADER], received.dtype
        bounds = _on(received.device, tuple(pending.layout.bounds))
        expected = _expected(received.device, sizes)
        row_max, row_sum, dot, *others = received[:, HEADER:].chunk(pending.n_columns, dim=1)
        target_weight = others.pop(0).sum(dim=0) if pending.n_columns in (4, 6) else None
        stats = (others[0], _as_ints(others[1], dtype)) if others else ()
        return Gathered(
            ShardStatistics(row_max, row_sum, dot, *stats),
            target_weight,
            headers[:, 4],
            bounds,
            None if self.on_host else (_as_ints(headers[:, :3], dtype) == expected).all(),
        )

    def sum(self, number: torch.Tensor) -> torch.Tensor:
        """Of a number of each rank, in rank order."""
        received = number.new_empty(self.n_ranks, 1)
        _all_gather(received, number.reshape(1), self.group).wait()
        return received[:, 0].sum()

    def _write_header(self, header, weight):
        shard, layout = self.layout.shard, self.layout
        ints = (self.size, *shard, layout.source)
        header[:4] = _as_bits(_on(header.device, ints), header.dtype)
        header[4] = self.size if weight is None else weight.to(header.dtype).sum()

    def _corrected(self, pending) -> Layout | None:
        """Another layout, which every rank finds, where somebody's was wrong.

        A GPU that knows the sizes does not stop to look: what it then gets wrong becomes NaN.
        """
        layout = pending.layout
        if layout.source != GUESSED and not self.on_host:
            return None
        headers = _as_ints(pending.received[:, :4], pending.received.dtype).tolist()
        sizes = tuple(size for size, *_ in headers)
        right = Layout(sizes, self.rank)
        bounds, n_classes = right.bounds, sum(sizes)
        taken = [tuple(header[:3]) for header in headers]
        if taken == [(size, bounds[rank], n_classes) for rank, size in enumerate(sizes)]:
            self._remember(sizes)
            return None
        sources = {source for *_, source in headers}
        if GIVEN in sources or not self.on_host and LEARNED in sources:
            raise RuntimeError(
                f"ranks have {sizes} classes, but some took it for others ({layout.sizes} on rank "
                f"{self.rank}): pass shard_sizes, the same on every rank"
            )
        self._remember(sizes)
        return right

    def _remember(self, sizes):
        if sizes[self.rank] == self.size:
            _sizes_of.setdefault(self.group, {})[self.size] = sizes


class Pending(NamedTuple):
    """An exchange that has begun."""

    statistics: Callable
    weight: torch.Tensor | None
    layout: Layout
    n_columns: int  # 3; with class weights one more, with stats two
    received: torch.Tensor  # (n_ranks, HEADER + k * n_rows)
    work: "dist.Work"


def check_agreement(
    group: "dist.ProcessGroup | None", options: LossOptions, rows: Rows, **facts: object
) -> None:
    """Under FUSED_CE_DEBUG=1, raise ValueError on every rank if they do not call alike.

    It costs an exchange of its own, and stops a GPU to read what is whole on every rank.
    """
    if os.environ.get("FUSED_CE_DEBUG") != "1":
        return
    facts |= options._asdict()
    for name in ("targets", "sample_weight"):
        facts[name] = _digest(getattr(rows, name))
    if rows.normalizer is not None:
        facts["normalizer"] = float(rows.normalizer)
    facts["weight"] = rows.weight is not None
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, facts, group=group)
    names = sorted(set().union(*of_ranks))
    differing = [
        f"{name} {[of_rank.get(name) for of_rank in of_ranks]}"
        for name in names
        # by what they look like: NaN is not NaN
        if any(repr(of_rank.get(name)) != repr(of_ranks[0].get(name)) for of_rank in of_ranks)
    ]
    if differing:
        raise ValueError("ranks disagree, in rank order: " + "; ".join(differing))


def _digest(tensor: torch.Tensor | None) -> int | None:
    """Equal where tensors are, and hardly elsewhere."""
    if tensor is None:
        return None
    return zlib.crc32(repr(tensor.detach().cpu().flatten().tolist()).encode())


def all_reduced(tensor: torch.Tensor, group: "dist.ProcessGroup") -> torch.Tensor:
    """Summed over the ranks, in place."""
    dist.all_reduce(tensor, group=group)
    return tensor


def _all_gather(received, sent, group) -> "dist.Work":
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    # A Work it is because async_op is True.
    return gather(received.view(-1), sent, group=group, async_op=True)  # pyright: ignore[reportReturnType]


def _as_bits(integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integers, below 2**31 for float32, in the place of numbers: they travel as they are."""
    kind = torch.int64 if dtype == torch.float64 else torch.int32
    return integers.to(kind).view(dtype)


def _as_ints(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kind = torch.int64 if dtype == torch.float64 else torch.int32
    return numbers.contiguous().view(kind).long()


_constants: dict = {}


def _on(device: torch.device, values: tuple[int, ...]) -> torch.Tensor:
    """int64 on the device; a copy only the first time."""
    key = device, values
    if key not in _constants:
        if len(_constants) > 256:
            _constants.clear()
        _constants[key] = torch.tensor(values, dtype=torch.int64, device=device)
    return _constants[key]


def _expected(device: torch.device, sizes: tuple[int, ...]) -> torch.Tensor:
    """The headers of ranks that took the sizes for these, (n_ranks, 3)."""
    bounds = Layout(sizes, 0).bounds
    flat = tuple(
        value
        for size, first in zip(sizes, bounds, strict=False)
        for value in (size, first, bounds[-1])
    )
    return _on(device, flat).view(len(sizes), 3)
