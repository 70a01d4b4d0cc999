"""Properties of random calls: shapes, strides, dtypes and options that nobody thought of."""

import math

import pytest
import torch
from oracle import FLOATS, assert_as_exact_as_torch, random_logits, random_weight

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fused_ce import fused_cross_entropy  # noqa: E402

# derandomized: the same examples on every run, or a rare failure would stop someone else's change
STABLE = settings(
    derandomize=True, max_examples=60, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@st.composite
def layouts(draw):
    """(shape, permutation, strides' padding, steps, offset) of a logits tensor of any layout."""
    batch = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    vocab_size = draw(st.sampled_from([1, 2, 5, 33, 130, 1025, 1400]))
    if vocab_size > 1000:
        batch = batch[:2]
    axis = draw(st.integers(0, len(batch)))
    shape = (*batch[:axis], vocab_size, *batch[axis:])
    order = draw(st.permutations(range(len(shape))))
    padding = draw(st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape)))
    expanded = draw(st.sets(st.integers(0, len(shape) - 1), max_size=1))
    return shape, axis, order, padding, expanded, draw(st.integers(0, 9))


def laid_out(values, order, padding, expanded, offset):
    """values in a storage where axis order[-1] is innermost and each axis has room left over."""
    strides, extent = [0] * values.dim(), 1
    for axis in reversed(order):
        if axis not in expanded:
            strides[axis] = extent
            extent *= values.shape[axis] + padding[axis]
    storage = torch.full((offset + extent + 64,), torch.nan, dtype=values.dtype)
    view = storage.as_strided(values.shape, strides, offset)
    for axis in expanded:
        values = values.narrow(axis, 0, 1)
    return view.copy_(values.expand(view.shape)) if not expanded else _fill(view, values, expanded)


def _fill(view, values, expanded):
    """copy_ refuses to write to memory that is shared: write its one representative."""
    one = view
    for axis in expanded:
        one = one.narrow(axis, 0, 1)
    one.copy_(values)
    return view


@STABLE
@given(data=st.data())
def test_any_call_is_as_exact_as_torch(device, data):
    shape, axis, order, padding, expanded, offset = data.draw(layouts())
    dtype = data.draw(st.sampled_from(FLOATS))
    seed = data.draw(st.integers(0, 1000))
    batch, vocab_size = (*shape[:axis], *shape[axis + 1 :]), shape[axis]
    values = random_logits(*shape, dtype=dtype, seed=seed)
    logits = laid_out(values, order, padding, expanded, offset).to(device)

    targets = torch.randint(vocab_size, batch, generator=torch.Generator().manual_seed(seed))
    ignore_index = data.draw(st.sampled_from([-100, 0, 1, -1]))
    if ignore_index < 0 and targets.numel() > 1:
        targets.view(-1)[0] = ignore_index
    if targets.dim() > 1 and data.draw(st.booleans()):
        targets = targets.transpose(0, 1).contiguous().transpose(0, 1)
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    if reduction == "mean" and (targets == ignore_index).all():
        reduction = "sum"
    weight = random_weight(vocab_size, dtype) if data.draw(st.booleans()) else None
    assert_as_exact_as_torch(
        logits, targets.to(device), None if weight is None else weight.to(device), dim=axis,
        reduction=reduction, ignore_index=ignore_index,
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        grad_in_forward=data.draw(st.sampled_from([None, True, False])),
        ulps_of_one=2,
    )  # fmt: skip


@STABLE
@given(
    seed=st.integers(0, 1000), vocab_size=st.integers(1, 80),
    offset=st.floats(-100, 100), scale=st.floats(0.1, 30),
)  # fmt: skip
def test_laws_of_cross_entropy(device, seed, vocab_size, offset, scale):
    """Not negative; moved by nothing; at most range + log V; gradient rows sum to 0."""
    logits = random_logits(3, vocab_size, dtype=torch.float64, seed=seed, scale=scale)
    logits = logits.to(device).requires_grad_()
    targets = torch.arange(3, device=device) % vocab_size
    losses = fused_cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    moved = fused_cross_entropy(logits.detach() + offset, targets, reduction="none")
    torch.testing.assert_close(losses.detach(), moved, rtol=1e-9, atol=1e-9)
    spread = (logits.max(dim=1).values - logits.min(dim=1).values).detach()
    assert (losses >= 0).all()
    assert (losses <= spread + math.log(vocab_size) + 1e-9).all()
    assert gradient.sum(dim=1).abs().max() <= 1e-12
    assert (gradient.abs() <= 1 + 1e-12).all()
    assert torch.equal(gradient < 0, (gradient < 0) & _is_target(gradient, targets))


def _is_target(gradient, targets):
    return torch.zeros_like(gradient, dtype=torch.bool).scatter_(1, targets[:, None], True)
