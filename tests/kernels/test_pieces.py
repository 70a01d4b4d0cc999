"""Pieces that the kernels share, each in a kernel of its own; and the sums over rows."""

import numpy as np
import pytest
import torch
from oracle import extended, random_logits, random_targets, random_weight

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fused_ce.kernels.reduce import (  # noqa: E402
    COUNT_BLOCK,
    DIVISOR,
    FIRST_PART,
    GROUP_ROWS,
    PARTS,
    REDUCED,
    SUM_BLOCK,
    prepared_workspace,
    reduce_losses,
)
from fused_ce.kernels.row_access import edge_columns, row_offset, split_row  # noqa: E402
from fused_ce.kernels.transform import capped, transform_of  # noqa: E402
from fused_ce.options import LossOptions  # noqa: E402
from fused_ce.rows import Rows  # noqa: E402


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


def divisor_of(
    targets, weight=None, sample_weight=None, normalizer=None, *,
    number=None, classes=11, splits=1, **options,
):  # fmt: skip
    """The sum of the parts of what a mean over rows of these targets divides by; the rest is 0."""
    logits = torch.zeros(*targets.shape[:2], classes, device=targets.device)
    rows = Rows(logits, targets, weight, sample_weight, normalizer)
    workspace = prepared_workspace(
        rows, LossOptions(normalizer=number, **options), torch.float32, splits
    )
    n_rows = logits.shape[:2].numel()
    zeros = workspace[REDUCED.value :]
    n_zeros = 1 + 2 * -(-n_rows // GROUP_ROWS) + (n_rows if splits > 1 else 0)
    assert zeros.tolist() == [0] * n_zeros
    return workspace[FIRST_PART.value : FIRST_PART.value + PARTS.value].sum().item()


@pytest.mark.parametrize("n_rows", [1, COUNT_BLOCK + 1, COUNT_BLOCK * PARTS.value + 5], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("sampled", [False, True], ids=["", "sample-weight"])
def test_mean_divisor(kernel_device, n_rows, weighted, sampled):
    targets = random_targets(1, n_rows, classes=11, device=kernel_device)
    targets[targets == 3] = -100
    weight = random_weight(11, device=kernel_device) if weighted else None
    sample_weight = random_weight(n_rows, device=kernel_device) if sampled else None
    right = (targets[0] >= 0).double()
    right *= weight[targets[0].clamp(0)].double() if weighted else 1.0
    right *= sample_weight.double() if sampled else 1.0
    divisor = divisor_of(targets, weight, sample_weight)
    assert divisor == pytest.approx(float(right.sum()), rel=1e-5)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_workspace_of_more_groups_than_a_program_zeroes(kernel_device, monkeypatch, splits,
                                                         reduction):  # fmt: skip
    """Every program of the count zeroes some of the counters; without a count, one does."""
    monkeypatch.setattr("fused_ce.kernels.reduce.COUNT_BLOCK", 16)
    monkeypatch.setattr("fused_ce.kernels.reduce.GROUP_ROWS", 2)
    monkeypatch.setitem(globals(), "GROUP_ROWS", 2)
    targets = random_targets(1, 100, classes=11, device=kernel_device)
    divisor = divisor_of(targets, splits=splits, reduction=reduction)
    assert divisor == 100 or reduction == "sum"


@pytest.mark.parametrize("normalizer", [
    pytest.param(7.5, id="number"), pytest.param(torch.tensor(7.5), id="float32"),
    pytest.param(torch.tensor(7.5, dtype=torch.float64), id="float64"),
    pytest.param(torch.tensor(7), id="int64"), pytest.param(torch.tensor(7).byte(), id="uint8"),
    pytest.param(torch.tensor([1.0, 7.5, 1.0]).bfloat16()[1], id="view"),
])  # fmt: skip
def test_normalizer_is_the_divisor(kernel_device, normalizer):
    targets = random_targets(1, 3000, classes=11, device=kernel_device)
    given = {"number": normalizer}
    if isinstance(normalizer, torch.Tensor):
        given = {"normalizer": normalizer.to(kernel_device)}
    assert divisor_of(targets, **given) == float(normalizer)


def test_mean_divisor_of_groups(kernel_device):
    targets = random_targets(40, 60, classes=5, device=kernel_device)[:, 3:50]
    assert divisor_of(targets, classes=5, ignore_index=2) == (targets != 2).sum()


def test_mean_divisor_of_probabilities(kernel_device):
    """The sample weights alone: neither classes nor ignore_index have a say."""
    probabilities = random_logits(3, 7, 11, device=kernel_device)
    weight = random_weight(11, device=kernel_device)
    sample_weight = random_weight(21, device=kernel_device)
    divisor = divisor_of(probabilities, weight, sample_weight)
    assert divisor == pytest.approx(float(sample_weight.sum()), rel=1e-5)
    assert divisor_of(probabilities, weight) == 21


@triton.jit(do_not_specialize=["scale", "cap"])
def cap_kernel(
    x_ptr, out_ptr, slope_ptr, scale: tl.float64, cap: tl.float64, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale, cap = transform_of(scale, cap, x_ptr.dtype.element_ty, True, True)
    result, slope = capped(tl.load(x_ptr + at), scale, cap)
    tl.store(out_ptr + at, result)
    tl.store(slope_ptr + at, slope)


@pytest.mark.parametrize("cap", [1.0, 0.5, 30.0, 2.0**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cap_and_its_derivative_are_exact_to_a_few_eps_of_themselves(kernel_device, dtype, cap):
    """Tiny and huge arguments too, where a difference from 1 would have lost all digits, and those
    around 0.4, where one formula follows another."""
    sizes = torch.cat([
        torch.logspace(-30, -1, 100, dtype=torch.float64),
        torch.linspace(0.1, 18, 924, dtype=torch.float64),
        torch.linspace(0.35, 0.45, 1024, dtype=torch.float64),
    ])  # fmt: skip
    x = (cap * torch.cat([sizes, -sizes])).to(dtype).to(kernel_device)
    out, slope = torch.empty_like(x), torch.empty_like(x)
    cap_kernel[(32,)](x, out, slope, 1 / cap, cap, BLOCK=128)
    argument = extended(x) / cap
    eps = torch.finfo(dtype).eps
    right, right_slope = cap * np.tanh(argument), np.cosh(argument) ** -2
    rounded = 0 if cap == 2 ** int(np.log2(cap)) else 1  # 1 / cap
    assert (abs(extended(out) - right) <= (4 + rounded) * eps * abs(right)).all()
    # exp rounds its argument, 2 |x|
    assert (abs(extended(slope) - right_slope) <= (4 + 4 * abs(argument)) * eps * right_slope).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cap_of_what_is_no_number(kernel_device, dtype):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], dtype=dtype, device=kernel_device)
    out, slope = torch.empty_like(x), torch.empty_like(x)
    cap_kernel[(1,)](x, out, slope, 0.2, 5.0, BLOCK=4)
    right = torch.tensor([5.0, -5.0, torch.nan, 0.0], dtype=dtype)
    torch.testing.assert_close(out.cpu(), right, equal_nan=True, rtol=0.0, atol=0.0)
    right = torch.tensor([0.0, 0.0, torch.nan, 1.0], dtype=dtype)
    torch.testing.assert_close(slope.cpu(), right, equal_nan=True, rtol=0.0, atol=0.0)


@triton.jit(do_not_specialize=["n_rows"])
def sum_kernel(
    values_ptr, losses_ptr, loss_ptr, workspace_ptr, n_rows: tl.int32,
    ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Programs as the loss has them: each stores ROWS losses."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    values = tl.load(values_ptr + rows, mask=rows < n_rows)
    tl.store(losses_ptr + rows, values, mask=rows < n_rows)
    reduce_losses(
        losses_ptr, loss_ptr, workspace_ptr, tl.program_id(0), tl.num_programs(0), n_rows, ROWS,
        GROUP_ROWS, SUM_BLOCK, MEAN,
    )  # fmt: skip


@pytest.mark.parametrize("n_rows", [1, GROUP_ROWS - 1, GROUP_ROWS, 2 * GROUP_ROWS + 3])
@pytest.mark.parametrize("rows, mean", [(1, False), (8, True)], ids=["sum", "mean"])
def test_sum_of_losses(kernel_device, n_rows, rows, mean):
    values = random_logits(n_rows, dtype=torch.float64, device=kernel_device).abs()
    targets = torch.zeros(1, n_rows, dtype=torch.long, device=kernel_device)
    workspace = prepared_workspace(
        Rows(values.view(1, -1, 1), targets), LossOptions(normalizer=32.0), torch.float64
    )
    losses = torch.empty_like(values)
    loss = torch.empty((), dtype=torch.float64, device=kernel_device)
    sum_kernel[(-(-n_rows // rows),)](
        values, losses, loss, workspace, n_rows,
        ROWS=rows, GROUP_ROWS=GROUP_ROWS, SUM_BLOCK=SUM_BLOCK, MEAN=mean,
    )  # fmt: skip
    torch.testing.assert_close(loss, values.sum() / (32 if mean else 1))
    if mean:
        assert workspace[DIVISOR.value] == 32
