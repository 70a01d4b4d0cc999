"""Any layout: strides, offsets and axes change where numbers are read, never which."""

import mmap

import pytest
import torch
from oracle import (
    assert_as_exact_as_torch,
    fused,
    inside,
    random_logits,
    random_targets,
    random_weight,
    untouched,
)

from fused_ce import fused_cross_entropy

SMALL, LONG = 65, 1100
VOCABS = [pytest.param(SMALL, id="small"), pytest.param(LONG, id="long")]
DTYPES = [torch.bfloat16, torch.float32]
ROUTES = [pytest.param(True, id="in-forward"), pytest.param(False, id="in-backward")]


def padded_vocabulary(v, **kw):
    return random_logits(3, v + 7, **kw)[:, :v], (3,), -1


def padded_on_the_left(v, **kw):
    return random_logits(3, v + 3, **kw)[:, 3:], (3,), -1


def next_token(v, **kw):
    return random_logits(2, 4, v, **kw)[:, :-1], (2, 3), -1


def next_token_of_padded(v, **kw):
    return random_logits(3, 3, v + 5, **kw)[:, 1:, :v], (3, 2), -1


def time_first(v, **kw):
    return random_logits(3, 2, v, **kw).transpose(0, 1), (2, 3), -1


def classes_first(v, **kw):
    return random_logits(v, 3, **kw).t(), (3,), -1


def every_other_row(v, **kw):
    return random_logits(5, v, **kw)[::2], (3,), -1


def every_other_class(v, **kw):
    return random_logits(3, 2 * v, **kw)[:, ::2], (3,), -1


def one_row_for_all(v, **kw):
    return random_logits(v, **kw).expand(3, v), (3,), -1


def one_class_for_all(v, **kw):
    return random_logits(3, 1, **kw).expand(3, v), (3,), -1


def sliding_windows(v, **kw):
    return random_logits(v + 6, **kw).unfold(0, v, 3), (3,), -1


def channels_first(v, **kw):
    return random_logits(2, v, 2, 1, **kw), (2, 2, 1), 1


def channels_last(v, **kw):
    return random_logits(2, v, 2, 2, **kw).to(memory_format=torch.channels_last), (2, 2, 2), 1


def sliced_image(v, **kw):
    return random_logits(2, v, 3, 4, **kw)[:, :, 1:, ::2], (2, 2, 2), 1


def three_levels(v, **kw):
    return random_logits(2, 3, 3, v, **kw)[:, :-1, :-1], (2, 2, 2), -1


def a_column_of_columns(v, **kw):
    return random_logits(3, 3, v, **kw)[:, 1], (3,), -1


LAYOUTS = [
    padded_vocabulary, padded_on_the_left, next_token, next_token_of_padded, time_first,
    classes_first, every_other_row, every_other_class, one_row_for_all, one_class_for_all,
    sliding_windows, channels_first, channels_last, sliced_image, three_levels,
    a_column_of_columns,
]  # fmt: skip


@pytest.mark.thinned
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "vocab_size, dtype",
    [pytest.param(SMALL, torch.float32, id="small"), pytest.param(LONG, torch.bfloat16, id="long")],
)
def test_layouts_of_logits(device, layout, vocab_size, dtype):
    logits, targets_shape, dim = layout(vocab_size, dtype=dtype, device=device)
    targets = random_targets(*targets_shape, classes=vocab_size, device=device)
    before = logits.clone()
    for route in (True, False):
        assert_as_exact_as_torch(
            logits, targets, dim=dim, reduction="none" if route else "mean", label_smoothing=0.1,
            grad_in_forward=route,
        )  # fmt: skip
    assert torch.equal(logits, before)


@pytest.mark.thinned
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_layouts_in_place(fused_device, layout, vocab_size):
    """The gradient of overlapping logits has no place in their storage, every other one has."""
    logits, targets_shape, dim = layout(vocab_size, device=fused_device)
    targets = random_targets(*targets_shape, classes=vocab_size, device=fused_device)
    for route in (True, False):
        _, right, upstream = fused(logits, targets, dim=dim, grad_in_forward=route)
        copy = torch.empty(0, device=fused_device).set_(
            logits.untyped_storage().clone(), logits.storage_offset(), logits.shape, logits.stride()
        )
        assert torch.equal(copy, logits)
        _, gradient, _ = fused(
            copy, targets, dim=dim, grad_in_forward=route, inplace=True, upstream=upstream
        )
        torch.testing.assert_close(gradient, right)


def contiguous(targets):
    return targets


def transposed(targets):
    return targets.t().contiguous().t()


def strided(targets):
    return inside(targets, -7, strides=(40, 3))[0]


def misaligned(targets):
    return inside(targets, -7, offset=1)[0]


def rows_alike(targets):
    return targets[:1].expand(targets.shape)


def columns_alike(targets):
    return targets[:, :1].expand(targets.shape)


@pytest.mark.thinned
@pytest.mark.parametrize(
    "layout", [contiguous, transposed, strided, misaligned, rows_alike, columns_alike]
)
@pytest.mark.parametrize("logits_layout", [contiguous, transposed], ids=["logits", "logits.t"])
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_layouts_of_targets(device, layout, logits_layout, vocab_size):
    logits = random_logits(2, 3, vocab_size, device=device)
    if logits_layout is transposed:
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    targets = layout(random_targets(2, 3, classes=vocab_size, device=device))
    before = targets.clone()
    for reduction, route in (("none", False), ("mean", True)):
        assert_as_exact_as_torch(
            logits, targets, reduction=reduction, grad_in_forward=route, ignore_index=3
        )
    assert torch.equal(targets, before)


@pytest.mark.thinned
@pytest.mark.parametrize("offset", [1, 3, 4, 7, 9])  # hypothesis has any: test_properties.py
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
def test_misaligned_base_address(fused_device, offset, dtype, grad_in_forward):
    values = random_logits(2, LONG, dtype=dtype, device=fused_device)
    targets = random_targets(2, classes=LONG, device=fused_device)
    logits, _ = inside(values, torch.nan, strides=(LONG + offset, 1), offset=offset)
    options = dict(grad_in_forward=grad_in_forward, label_smoothing=0.1, reduction="sum")
    assert_as_exact_as_torch(logits, targets, **options)
    loss, gradient, upstream = fused(values, targets, **options)
    moved, moved_gradient, _ = fused(logits, targets, upstream=upstream, **options)
    torch.testing.assert_close(loss, moved)
    torch.testing.assert_close(gradient, moved_gradient)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_logits_is_read_or_written(
    fused_device, vocab_size, grad_in_forward, inplace, dtype
):
    """NaN all around: one element read too many shows in the loss, one written in the storage."""
    values = random_logits(2, 3, vocab_size, dtype=dtype, device=fused_device)
    strides = (4 * (vocab_size + 5) + 3, vocab_size + 5, 1)
    logits, storage = inside(values, torch.nan, strides=strides, offset=3)
    targets = random_targets(2, 3, classes=vocab_size, device=fused_device)
    targets[0, 1] = -100
    options = dict(
        label_smoothing=0.1, reduction="none", grad_in_forward=grad_in_forward, inplace=inplace
    )
    _, gradient, _ = fused(logits, targets, **options)
    assert gradient.isfinite().all()
    assert untouched(storage, logits, torch.nan)
    if inplace:
        assert torch.equal(logits.detach(), gradient)
    else:
        assert torch.equal(logits, values)
        assert_as_exact_as_torch(logits, targets, **options)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
@pytest.mark.parametrize("make", [
    pytest.param(lambda n: torch.tensor(0.7).expand(n), id="stride-0"),
    pytest.param(lambda n: torch.arange(1.0, 2 * n + 1)[::2], id="every-other"),
    pytest.param(lambda n: torch.arange(1.0, n + 2)[1:], id="misaligned"),
    pytest.param(lambda n: torch.zeros(n), id="zero"),
])  # fmt: skip
def test_layouts_of_the_upstream_gradient(device, vocab_size, grad_in_forward, make):
    logits = random_logits(6, vocab_size, device=device)
    targets = random_targets(6, classes=vocab_size, device=device)
    targets[2] = -100
    upstream = make(6).to(device)
    before = upstream.clone()
    assert_as_exact_as_torch(
        logits, targets, reduction="none", grad_in_forward=grad_in_forward, upstream=upstream
    )
    assert torch.equal(upstream, before)


@pytest.mark.parametrize("grad_in_forward", ROUTES)
def test_sum_of_none_is_sum(device, grad_in_forward):
    """`.sum()` hands back one number with stride 0 for all rows."""
    logits = random_logits(2, 3, LONG, device=device)
    targets = random_targets(2, 3, classes=LONG, device=device)
    leaf = logits.clone().requires_grad_()
    losses = fused_cross_entropy(leaf, targets, reduction="none", grad_in_forward=grad_in_forward)
    (2 * losses.sum()).backward()
    two = torch.tensor(2.0, device=device)
    _, right, _ = fused(logits, targets, reduction="sum", upstream=two)
    torch.testing.assert_close(leaf.grad, right)


def test_transposed_upstream_gradient(device):
    logits = random_logits(2, 3, SMALL, device=device)
    targets = random_targets(2, 3, classes=SMALL, device=device)
    upstream = random_logits(3, 2, device=device).t()
    for route in (True, False):
        assert_as_exact_as_torch(
            logits, targets, reduction="none", upstream=upstream, grad_in_forward=route
        )


@pytest.mark.parametrize("rows_per_group", [1, 2])
def test_one_group_a_sequence(device, rows_per_group):
    """Groups and rows have strides of their own, and swapping them shows."""
    logits = random_logits(4, 3, LONG, device=device)[:, :rows_per_group]
    targets = random_targets(4, 3, classes=LONG, device=device)[:, 1 : rows_per_group + 1]
    for route in (True, False):
        assert_as_exact_as_torch(logits, targets, reduction="none", grad_in_forward=route)


def uncommitted(n_elements, dtype, device):
    """A large tensor that takes no memory where nobody writes."""
    if device == "cuda":
        return torch.empty_strided((n_elements,), (1,), dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, n_elements * dtype.itemsize, flags=flags)
    except OSError as error:  # a limit of `ulimit -v`, or a kernel that never overcommits
        pytest.skip(f"no address space of {n_elements * dtype.itemsize:,} bytes: {error}")
    return torch.frombuffer(memory, dtype=dtype)


FAR = 2**31 + 24  # elements: one more bit than an int32 has, and 16-byte alignment


@pytest.mark.parametrize("shape, strides", [
    pytest.param((1, 2, LONG), (0, FAR, 1), id="rows"),
    pytest.param((2, 2, LONG), (FAR, LONG, 1), id="groups"),
    pytest.param((1, 2, SMALL), (0, FAR, 1), id="small-rows"),
    pytest.param((2, 2, SMALL), (FAR, SMALL, 1), id="small-groups"),
    pytest.param((1, 2, 3), (0, 1, FAR // 2), id="small-classes"),
])  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs memory that is not committed")
def test_offsets_beyond_32_bits(fused_device, shape, strides, inplace):
    values = random_logits(*shape, dtype=torch.float16, device=fused_device)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    logits = uncommitted(extent, torch.float16, fused_device).as_strided(shape, strides)
    targets = random_targets(*shape[:2], classes=shape[2], device=fused_device)
    for route in (True, False):
        logits.copy_(values)
        options = dict(reduction="sum", grad_in_forward=route)
        loss, right, upstream = fused(values, targets, dim=-1, **options)
        far, gradient, _ = fused(
            logits, targets, dim=-1, inplace=inplace, upstream=upstream, **options
        )
        # not bit for bit: rows at another address modulo 16 are added up in another order
        torch.testing.assert_close(far, loss, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(gradient, right, rtol=2e-3, atol=1e-7)
        assert torch.equal(logits, gradient if inplace else values)


def test_targets_beyond_32_bits(fused_device):
    for vocab_size in (SMALL, LONG):
        logits = random_logits(2, vocab_size, device=fused_device)
        far = uncommitted(FAR + 1, torch.uint8, fused_device).as_strided((2,), (FAR,))
        far[0], far[1] = 5, 64
        targets = torch.tensor([5, 64], device=fused_device)
        for route in (True, False):
            loss, gradient, upstream = fused(logits, far, grad_in_forward=route)
            right, right_gradient, _ = fused(
                logits, targets, grad_in_forward=route, upstream=upstream
            )
            # not bit for bit: targets of another dtype are read by another binary
            torch.testing.assert_close(loss, right, rtol=1e-6, atol=0.0)
            torch.testing.assert_close(gradient, right_gradient, rtol=1e-5, atol=1e-8)


def negative(tensor):
    """The same numbers with torch's lazy negative bit: nobody has computed them yet."""
    lazy = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, tensor)
    return lazy


@pytest.mark.parametrize("grad_in_forward", [True, False])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("vocab_size", [65, 1100])
def test_lazy_negative_bits(device, vocab_size, inplace, grad_in_forward):
    """Of every tensor that a pointer is taken of; such logits are not overwritten."""
    logits = random_logits(4, vocab_size, device=device)
    targets = random_targets(4, classes=vocab_size, device=device)
    weight, sample_weight = random_weight(vocab_size, device=device), torch.rand(4, device=device)
    upstream = torch.tensor(-0.7, device=device)
    options = dict(grad_in_forward=grad_in_forward, label_smoothing=0.1, z_loss=0.1)

    def results(of, inplace=False):
        leaf, factors = logits.clone().requires_grad_(), sample_weight.clone().requires_grad_()
        loss, stats = fused_cross_entropy(
            of(leaf), targets, of(weight), sample_weight=of(factors), return_stats=True,
            normalizer=of(torch.tensor(3.0, device=device)), inplace=inplace, **options,
        )  # fmt: skip
        torch.autograd.backward([loss, stats.lse], [of(upstream), of(stats.losses.detach())])
        return loss.detach(), leaf.grad, factors.grad

    if inplace:
        options["grad_in_forward"] = False  # the gradient of the stats reads the logits again
    torch.testing.assert_close(results(negative, inplace), results(lambda tensor: tensor))


@pytest.mark.parametrize("vocab_size", [65, 1100])
def test_probabilities_with_a_lazy_negative_bit(device, vocab_size):
    logits = random_logits(3, vocab_size, device=device)
    probabilities = random_logits(3, vocab_size, device=device, seed=1).softmax(-1)
    right = fused_cross_entropy(logits, probabilities)
    torch.testing.assert_close(
        fused_cross_entropy(negative(logits), negative(probabilities)), right
    )


@pytest.mark.parametrize("grad_in_forward", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab_size", [65, 1100])
def test_zero_tensors_as_upstream_gradients(device, vocab_size, reduction, grad_in_forward):
    """They have no memory at all."""
    logits = random_logits(3, vocab_size, device=device).requires_grad_()
    targets = random_targets(3, classes=vocab_size, device=device)
    loss = fused_cross_entropy(
        logits, targets, reduction=reduction, grad_in_forward=grad_in_forward
    )
    loss.backward(torch._efficientzerotensor(loss.shape, device=device))
    assert (logits.grad == 0).all()


def test_lazy_directions_of_second_derivatives(device):
    logits = random_logits(3, 65, device=device).requires_grad_()
    targets = random_targets(3, classes=65, device=device)
    (gradient,) = torch.autograd.grad(
        fused_cross_entropy(logits, targets), logits, create_graph=True
    )
    direction = random_logits(3, 65, device=device, seed=1)
    grads = [
        torch.autograd.grad(gradient, logits, of(direction), retain_graph=True)[0]
        for of in (negative, torch.clone)
    ]
    torch.testing.assert_close(*grads)
    zero = torch._efficientzerotensor(gradient.shape, device=device)
    assert (torch.autograd.grad(gradient, logits, zero)[0] == 0).all()
