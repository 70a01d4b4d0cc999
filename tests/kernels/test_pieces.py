"""Pieces that the kernels share, each in a kernel of its own; and the sums over rows."""

import pytest
import torch
from oracle import random_logits, random_targets, random_weight

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fused_ce.kernels.online_softmax import edge_columns, row_offset, split_row  # noqa: E402
from fused_ce.kernels.reduce import (  # noqa: E402
    COUNT_BLOCK,
    PARTIALS,
    SUM_BLOCK,
    launch_mean_divisor,
    launch_reduce_losses,
)


@triton.jit(do_not_specialize=["row", "rows_per_group", "group_stride", "row_stride"])
def offset_kernel(
    out_ptr, row: tl.int32, rows_per_group: tl.int32,
    group_stride: tl.int64, row_stride: tl.int64, GROUPED: tl.constexpr,
):  # fmt: skip
    tl.store(out_ptr, row_offset(row, rows_per_group, group_stride, row_stride, GROUPED))


@pytest.mark.parametrize("row, rows_per_group, group_stride, row_stride, right", [
    pytest.param(40_000, 50_000, 0, 65_536, 40_000 * 65_536, id="rows-beyond-32-bits"),
    pytest.param(40_001, 1, 70_000, 9, 40_001 * 70_000, id="groups-beyond-32-bits"),
    pytest.param(7, 2, 2**33, 2**32, 3 * 2**33 + 2**32, id="strides-beyond-32-bits"),
    pytest.param(5, 3, 100, 10, 120, id="group-and-row"),
])  # fmt: skip
def test_offsets_have_64_bits(kernel_device, row, rows_per_group, group_stride, row_stride, right):
    out = torch.zeros(1, dtype=torch.long, device=kernel_device)
    offset_kernel[(1,)](out, row, rows_per_group, group_stride, row_stride, GROUPED=True)
    assert out.item() == right
    if row < rows_per_group:
        offset_kernel[(1,)](out, row, 1, 0, row_stride, GROUPED=False)
        assert out.item() == right


@triton.jit(do_not_specialize=["vocab_size"])
def split_kernel(row_ptr, out_ptr, edges_ptr, vocab_size: tl.int32, VEC: tl.constexpr):
    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    edge, is_edge = edge_columns(skew, interior_size, vocab_size, VEC)
    tl.store(out_ptr, skew)
    tl.store(
        out_ptr + 1, ((interior_ptr.to(tl.int64) - row_ptr.to(tl.int64)) * VEC // 16).to(tl.int32)
    )
    tl.store(out_ptr + 2, interior_size)
    tl.store(edges_ptr + tl.arange(0, 2 * VEC), tl.where(is_edge, edge, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_interior_and_edges_cover_a_row_once(kernel_device, dtype):
    vector = 16 // dtype.itemsize
    for offset in range(vector + 1):
        for vocab_size in (*range(1, 3 * vector), 100):
            storage = torch.zeros(200, dtype=dtype, device=kernel_device)
            out = torch.zeros(3, dtype=torch.int32, device=kernel_device)
            edges = torch.zeros(2 * vector, dtype=torch.int32, device=kernel_device)
            row = storage[offset : offset + vocab_size]
            split_kernel[(1,)](row, out, edges, vocab_size, VEC=vector)
            skew, first, size = out.tolist()
            assert skew == row.data_ptr() % 16 // dtype.itemsize
            assert (row.data_ptr() + first * dtype.itemsize) % 16 == 0 and size % vector == 0
            columns = [c for c in edges.tolist() if c >= 0] + list(range(first, first + size))
            assert sorted(columns) == list(range(vocab_size))


@pytest.mark.parametrize("n_rows", [0, 1, COUNT_BLOCK + 1, COUNT_BLOCK * PARTIALS + 5], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_mean_divisor(kernel_device, n_rows, weighted):
    targets = random_targets(1, n_rows, classes=11, device=kernel_device)
    targets[targets == 3] = -100
    weight = random_weight(11, device=kernel_device) if weighted else None
    partials = torch.empty(PARTIALS, device=kernel_device)
    launch_mean_divisor(targets, weight, partials, 11, -100)
    counted = targets[targets >= 0]
    right = weight[counted].double().sum() if weighted else counted.numel()
    assert partials.sum().item() == pytest.approx(float(right), rel=1e-5)


def test_mean_divisor_of_groups(kernel_device):
    targets = random_targets(40, 60, classes=5, device=kernel_device)[:, 3:50]
    partials = torch.empty(PARTIALS, device=kernel_device)
    launch_mean_divisor(targets, None, partials, 5, 2)
    assert partials.sum() == (targets != 2).sum()


@pytest.mark.parametrize("n_rows", [0, 1, SUM_BLOCK, 2 * SUM_BLOCK + 3])
def test_sum_of_losses(kernel_device, n_rows):
    losses = random_logits(n_rows, dtype=torch.float64, device=kernel_device).abs()
    loss = torch.empty((), dtype=torch.float64, device=kernel_device)
    launch_reduce_losses(losses, None, loss)
    torch.testing.assert_close(loss, losses.sum())
    partials = torch.full((PARTIALS,), 0.5, dtype=torch.float64, device=kernel_device)
    launch_reduce_losses(losses, partials, loss)
    torch.testing.assert_close(loss, losses.sum() / 32)
