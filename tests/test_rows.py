"""Rows: views of any layout, and a gradient buffer that lies as its logits do."""

import itertools

import pytest
import torch
from oracle import random_logits

from fused_ce.rows import as_rows, empty_gradient, is_dense, overlaps


def make(shape, strides, dtype=torch.float32, offset=0):
    extent = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
    return torch.arange(max(extent, 1)).to(dtype).as_strided(shape, strides, offset)


def shares_storage(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("logits, dim, shape", [
    pytest.param(torch.zeros(7), 0, (1, 1, 7), id="one-row"),
    pytest.param(torch.zeros(4, 7), 1, (1, 4, 7), id="matrix"),
    pytest.param(torch.zeros(2, 3, 7), 2, (1, 6, 7), id="contiguous-is-one-group"),
    pytest.param(torch.zeros(2, 4, 7)[:, :-1], 2, (2, 3, 7), id="next-token"),
    pytest.param(torch.zeros(2, 4, 9)[:, 1:, :7], 2, (2, 3, 7), id="next-token-padded"),
    pytest.param(torch.zeros(4, 2, 7).transpose(0, 1), 2, (2, 4, 7), id="time-first"),
    pytest.param(torch.zeros(2, 7, 3), 1, (2, 3, 7), id="classes-on-axis-1"),
    pytest.param(torch.zeros(2, 7, 3, 4), 1, (2, 12, 7), id="image"),
    pytest.param(torch.zeros(7, 4).t(), 1, (1, 4, 7), id="classes-first"),
    pytest.param(torch.zeros(7).expand(4, 7), 1, (1, 4, 7), id="expanded"),
    pytest.param(torch.zeros(5, 1, 2, 7)[:, :, :1], 3, (1, 5, 7), id="axes-of-one"),
    pytest.param(torch.zeros(0, 3, 7), 2, (1, 0, 7), id="no-rows"),
])  # fmt: skip
def test_rows_are_views_of_the_fewest_groups(logits, dim, shape):
    targets = torch.zeros(logits.shape[:dim] + logits.shape[dim + 1 :], dtype=torch.long)
    rows, flat = as_rows(logits, targets, dim)
    assert tuple(rows.shape) == shape
    assert tuple(flat.shape) == shape[:2]
    assert shares_storage(rows, logits)


def test_every_layout_of_three_axes_keeps_its_order():
    """All that two levels of stride can hold, and what they cannot."""
    target_axes = [(3, 1), (1, 2), (0, 1), (1, 0), (9, 2)]
    axes = [(3 * 7, 7), (7, 2 * 7), (100, 7), (7, 0), (0, 7), (0, 0), (9, 50)]
    for strides, target_strides in itertools.product(axes, target_axes):
        logits, targets = make((2, 3, 7), (*strides, 1)), make((2, 3), target_strides).long()
        rows, flat = as_rows(logits, targets, 2)
        assert shares_storage(rows, logits)
        assert torch.equal(rows.reshape(6, 7), logits.reshape(6, 7))
        assert torch.equal(flat.reshape(6), targets.reshape(6))


def test_only_three_levels_of_stride_are_copied():
    logits = random_logits(3, 4, 5, 7)[:, :-1, :-1]
    targets = torch.arange(3 * 3 * 4).view(3, 3, 4)
    rows, flat = as_rows(logits, targets, 3)
    assert not shares_storage(rows, logits)
    assert torch.equal(rows.reshape(-1, 7), logits.reshape(-1, 7))
    assert torch.equal(flat.reshape(-1), targets.reshape(-1))


def test_targets_are_copied_before_logits():
    logits = random_logits(2, 3, 4, 7)
    targets = torch.arange(4 * 3 * 2).view(4, 3, 2).transpose(0, 2)
    rows, flat = as_rows(logits, targets, 3)
    assert shares_storage(rows, logits)
    assert not shares_storage(flat, targets)
    assert torch.equal(flat.reshape(-1), targets.reshape(-1))


@pytest.mark.parametrize("shape, strides", [
    ((2, 0, 5), (0, 7, 1)), ((0, 3, 5), (1, 1, 1)), ((2, 0, 3, 5), (5, 9, 100, 1)),
])  # fmt: skip
def test_no_rows_of_any_stride(shape, strides):
    logits = torch.zeros(1).as_strided(shape, strides)
    rows, flat = as_rows(logits, torch.zeros(shape[:-1]).long(), len(shape) - 1)
    assert rows.numel() == flat.numel() == 0
    assert rows.shape[2] == 5


def test_one_class_is_dense_at_any_stride():
    assert is_dense(make((1, 4, 1), (9, 2, 50)))
    assert is_dense(make((1, 4, 3), (9, 3, 1)))
    assert not is_dense(make((1, 4, 3), (1, 1, 4)))
    assert not is_dense(make((1, 4, 3), (12, 3, 0)))


def test_overlaps_is_never_wrongly_false():
    """Against the addresses themselves; a needless True only costs a buffer."""
    for shape in [(2, 3, 4), (1, 3, 2), (2, 1, 1), (2, 2, 2)]:
        for strides in itertools.product([0, 1, 2, 3, 4, 6, 12, 13], repeat=3):
            rows = make(shape, strides)
            shared = rows.reshape(-1).unique().numel() < rows.numel()
            assert overlaps(rows) or not shared, (shape, strides)


@pytest.mark.parametrize("strides", [(12, 4, 1), (1, 2, 6), (100, 7, 1), (4, 8, 1)])
def test_ordinary_layouts_do_not_overlap(strides):
    assert not overlaps(make((2, 3, 4) if strides != (4, 8, 1) else (2, 3, 4), strides))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", range(0, 10))
def test_gradient_rows_lie_as_their_logits_do(dtype, offset):
    """The kernels split both at the same columns: the addresses agree modulo 16 bytes."""
    for row_stride, group_stride in itertools.product((7, 8, 11, 16, 19), (21, 40, 57, 64, 83)):
        logits = make((3, 2, 7), (group_stride, row_stride, 1), dtype, offset)
        gradient = empty_gradient(logits)
        assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
        assert is_dense(gradient) and not overlaps(gradient)
        for group, row in itertools.product(range(3), range(2)):
            addresses = logits[group, row].data_ptr(), gradient[group, row].data_ptr()
            assert addresses[0] % 16 == addresses[1] % 16
        bytes_of_rows = 6 * (7 * dtype.itemsize + 15)
        assert gradient.untyped_storage().nbytes() <= bytes_of_rows + 3 * 15 + 16


def test_gradient_of_expanded_logits_does_not_overlap():
    for strides in ((0, 0, 1), (0, 7, 1), (7, 0, 1), (0, 0, 0), (3, 1, 1)):
        gradient = empty_gradient(make((2, 3, 7), strides))
        assert not overlaps(gradient), strides


def test_gradient_of_contiguous_logits_is_contiguous():
    assert empty_gradient(torch.zeros(1, 6, 50257)).is_contiguous()
    assert empty_gradient(torch.zeros(2, 3, 7)).is_contiguous()
    assert empty_gradient(torch.zeros(1, 0, 7)).shape == (1, 0, 7)
