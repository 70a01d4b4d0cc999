"""Properties of random calls: shapes, strides, dtypes and options that nobody thought of."""

import math

import pytest
import torch
import torch.nn.functional as F
from devices import CUDA, entered
from oracle import (
    FLOATS,
    assert_all_as_exact_as_torch,
    assert_as_exact_as_torch,
    computed,
    random_logits,
    random_targets,
    random_upstream,
    random_weight,
)

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fused_ce import fused_cross_entropy, fused_linear_cross_entropy  # noqa: E402

REDUCTIONS = ["mean", "sum", "none"]
ROUTES = [None, True, False]

# derandomized: the same examples on every run, or a rare failure would stop someone else's change
STABLE = settings(
    derandomize=True, max_examples=60, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

FEWER = settings(STABLE, max_examples=20)  # of a law; interpreted, an example takes 0.1 s


@pytest.fixture(params=["cpu", pytest.param("triton", marks=pytest.mark.slow), "reference", CUDA])
def device(request):
    """Any backend."""
    with entered(request.param) as where:
        yield where


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


def some(data, *values):
    return data.draw(st.sampled_from(values))


def extras(data):
    """Options that change the number, each of them absent half of the time."""
    drawn = dict(
        label_smoothing=some(data, 0.0, 0.0, 0.1, 1.0), z_loss=some(data, 0.0, 0.0, 1e-3, -0.2),
        logit_scale=some(data, 1.0, 1.0, 0.3, -1.5), softcap=some(data, None, None, 2.0, 30.0),
    )  # fmt: skip
    plain = dict(label_smoothing=0.0, z_loss=0.0, logit_scale=1.0, softcap=None)
    return {name: value for name, value in drawn.items() if value != plain[name]}


def factors(shape, seed, dtype=torch.float32):
    """Of any sign; their sum is not near 0, where a mean is ill-conditioned."""
    return random_logits(*shape, dtype=dtype, seed=seed + 7, scale=0.3) + 0.7


def a_call(data, *, probabilities):
    """Logits, targets, weight and options of a random call, in any layout."""
    shape, axis, order, padding, expanded, offset = data.draw(layouts())
    dtype, seed = data.draw(st.sampled_from(FLOATS)), data.draw(st.integers(0, 1000))
    batch, vocab_size = (*shape[:axis], *shape[axis + 1 :]), shape[axis]
    values = random_logits(*shape, dtype=dtype, seed=seed)
    logits = laid_out(values, order, padding, expanded, offset)
    options = dict(extras(data), reduction=some(data, *REDUCTIONS), dim=axis)
    options["grad_in_forward"] = some(data, *ROUTES)
    options["return_stats"] = data.draw(st.booleans())
    options["inplace"] = some(data, False, False, True)
    if probabilities:
        soft = random_logits(*shape, dtype=some(data, dtype, torch.float32), seed=seed + 1)
        targets = laid_out(soft, data.draw(st.permutations(order)), padding, set(), offset // 2)
    else:
        targets = random_targets(*batch, classes=vocab_size, seed=seed)
        if targets.numel() > 1:
            targets.view(-1)[-1] = -100
    if data.draw(st.booleans()):
        values = factors(batch, seed, some(data, dtype, torch.float32))
        options["sample_weight"] = values if options["reduction"] == "mean" else values - 0.7
    if options["reduction"] == "mean":
        number = some(data, None, None, 3.5, torch.tensor(7))
        options.update({} if number is None else dict(normalizer=number))
    weight = random_weight(vocab_size, dtype) if data.draw(st.booleans()) else None
    if options["inplace"] and options["return_stats"]:
        options["grad_in_forward"] = False  # or a gradient through the stats is an error
    return logits, targets, weight, options


def on(device, value):
    """Tensors move, with their strides; whatever else stays."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
@settings(STABLE, max_examples=40)
@given(data=st.data())
def test_any_call_with_any_options_is_as_exact_as_torch(device, probabilities, data):
    *tensors, options = a_call(data, probabilities=probabilities)
    options = {name: on(device, value) for name, value in options.items()}
    assert_all_as_exact_as_torch(*(on(device, tensor) for tensor in tensors), **options)


SIZES = st.sampled_from([1, 2, 33, 70])


@st.composite
def small_calls(draw):
    """(logits, targets, weight, sample_weight) in float64: a law must hold to rounding."""
    seed, n_rows, vocab_size = draw(st.integers(0, 999)), draw(st.integers(2, 5)), draw(SIZES)
    scale = draw(st.sampled_from([0.1, 3.0, 20.0]))
    logits = random_logits(n_rows, vocab_size, dtype=torch.float64, seed=seed, scale=scale)
    targets = random_targets(n_rows, classes=vocab_size, seed=seed)
    if draw(st.booleans()):
        targets = random_logits(n_rows, vocab_size, dtype=torch.float64, seed=seed + 1).softmax(1)
    weight = random_weight(vocab_size, torch.float64) if draw(st.booleans()) else None
    sample_weight = factors((n_rows,), seed, torch.float64) if draw(st.booleans()) else None
    return logits, targets, weight, sample_weight


def agree(left, right):
    for name in left:
        scale = 1.0 + right[name].abs().max().item() if right[name].numel() else 1.0
        torch.testing.assert_close(
            left[name], right[name], rtol=0.0, atol=1e-11 * scale, msg=f"{name}: {{}}".format
        )


def outcome(device, logits, targets, weight=None, sample_weight=None, **options):
    """All values and gradients of a call, with the stats."""
    values, _ = computed(
        on(device, logits), on(device, targets), on(device, weight),
        sample_weight=on(device, sample_weight), return_stats=True, **options,
    )  # fmt: skip
    return {name: value.cpu() for name, value in values.items()}


@FEWER
@given(call=small_calls(), offset=st.floats(-100, 100), data=st.data())
def test_a_common_offset_moves_lse_and_nothing_else(device, call, offset, data):
    """Without z_loss, which sees it, and softcap, which bends it."""
    logits, *rest = call
    options = dict(label_smoothing=some(data, 0.0, 0.2), reduction=some(data, *REDUCTIONS))
    options["grad_in_forward"] = some(data, *ROUTES)
    before = outcome(device, logits, *rest, **options)
    after = outcome(device, logits + offset, *rest, **options)
    after["lse"] -= offset
    agree(before, after)


@FEWER
@given(call=small_calls(), data=st.data())
def test_renaming_the_classes_renames_the_gradient(device, call, data):
    logits, targets, weight, sample_weight = call
    order = torch.tensor(data.draw(st.permutations(range(logits.shape[1]))))
    options = dict(extras(data), reduction=some(data, *REDUCTIONS))
    options["grad_in_forward"] = some(data, *ROUTES)
    soft = targets.is_floating_point()
    renamed = targets[:, order] if soft else order.argsort()[targets]
    before = outcome(device, logits, targets, weight, sample_weight, **options)
    after = outcome(
        device, logits[:, order], renamed, None if weight is None else weight[order],
        sample_weight, **options,
    )  # fmt: skip
    for name in ("grad_logits", "grad_targets"):
        if name in before:
            before[name] = before[name][:, order]
    if options.get("softcap") is None:
        after["predictions"] = order[after["predictions"]]
    else:  # what is capped may tie
        before.pop("predictions"), after.pop("predictions")
    agree(before, after)


@FEWER
@given(call=small_calls(), data=st.data())
def test_reordering_the_rows_reorders_the_rows(device, call, data):
    logits, targets, weight, sample_weight = call
    order = torch.tensor(data.draw(st.permutations(range(len(logits)))))
    options = dict(extras(data), reduction="none", grad_in_forward=some(data, *ROUTES))
    before = losses_and_gradient(device, call, random_upstream(logits[:, 0]), options)
    moved = [None if tensor is None else tensor[order] for tensor in (logits, targets)]
    call = (*moved, weight, None if sample_weight is None else sample_weight[order])
    after = losses_and_gradient(device, call, random_upstream(logits[:, 0])[order], options)
    agree({name: value[order] for name, value in before.items()}, after)


def losses_and_gradient(device, call, upstream, options):
    logits, targets, weight, sample_weight = (on(device, tensor) for tensor in call)
    leaf = logits.clone().requires_grad_()
    losses = fused_cross_entropy(leaf, targets, weight, sample_weight=sample_weight, **options)
    (gradient,) = torch.autograd.grad(losses, leaf, on(device, upstream))
    return dict(losses=losses.detach().cpu(), gradient=gradient.cpu())


@FEWER
@given(call=small_calls(), data=st.data())
def test_sums_of_gradient_rows(device, call, data):
    """G * v * 2 * z_loss * lse, whatever the targets: softmax and what it is compared with cancel.

    Scaled by logit_scale; a cap gives each class a slope of its own and has no such law.
    """
    options = dict(extras(data), reduction="none", grad_in_forward=some(data, *ROUTES))
    options.pop("softcap", None)
    logits, targets, weight, sample_weight = call
    upstream = random_upstream(logits[:, 0])
    gradient = losses_and_gradient(device, call, upstream, options)["gradient"]
    scale = options.get("logit_scale", 1.0)
    lse = (logits * scale).logsumexp(dim=1)
    right = upstream * 2 * options.get("z_loss", 0.0) * lse * scale
    right = right if sample_weight is None else right * sample_weight
    torch.testing.assert_close(gradient.sum(dim=1), right, rtol=1e-10, atol=1e-11)


@FEWER
@given(call=small_calls(), data=st.data())
def test_a_loss_of_distributions_is_not_negative(device, call, data):
    """Nor below the entropy of a distribution that it is compared with (Gibbs)."""
    logits, targets, weight, _ = call
    smoothing = some(data, 0.0, 0.1, 1.0)
    kwargs = dict(reduction="none", label_smoothing=smoothing, return_stats=True)
    losses, stats = fused_cross_entropy(
        on(device, logits), on(device, targets), on(device, weight), **kwargs
    )
    assert (losses >= 0).all() and (stats.entropy >= 0).all()
    assert (stats.entropy <= math.log(logits.shape[1]) + 1e-12).all()
    if targets.is_floating_point() and weight is None:
        mixed = (1 - smoothing) * targets + smoothing / logits.shape[1]
        assert (losses.cpu() >= torch.special.entr(mixed).sum(dim=1) - 1e-12).all()


@FEWER
@given(call=small_calls(), data=st.data())
def test_ignoring_a_row_is_deleting_it(device, call, data):
    logits, targets, weight, sample_weight = call
    if targets.is_floating_point():
        targets = targets.argmax(dim=1)
    options = dict(extras(data), grad_in_forward=some(data, *ROUTES))
    options.update(some(data, {}, dict(reduction="sum"), dict(normalizer=2.5)))
    row = data.draw(st.integers(0, len(logits) - 1))
    kept = torch.arange(len(logits)) != row
    ignored = targets.masked_fill(~kept, -100)
    poisoned = logits.masked_fill(~kept[:, None], torch.nan)
    options["through"] = ("loss",)  # the stats of fewer rows get other random upstreams
    whole = outcome(device, poisoned, ignored, weight, sample_weight, **options)
    less = outcome(
        device, logits[kept], targets[kept], weight,
        None if sample_weight is None else sample_weight[kept], **options,
    )  # fmt: skip
    for name, value in whole.items():
        if value.dim() > 0:
            assert (value[row] == (-1 if name == "predictions" else 0)).all(), name
            whole[name] = value[kept]
    agree(whole, less)


@FEWER
@given(call=small_calls(), data=st.data())
def test_parts_with_a_common_normalizer_are_the_whole(device, call, data):
    logits, targets, weight, sample_weight = call
    options = dict(extras(data), through=("loss",), grad_in_forward=some(data, *ROUTES))
    number = some(data, 4.5, torch.tensor(3, device=device))
    whole = outcome(device, *call, normalizer=number, **options)
    cut = data.draw(st.integers(0, len(logits)))
    parts = [
        outcome(
            device, logits[rows], targets[rows], weight,
            None if sample_weight is None else sample_weight[rows], normalizer=number, **options,
        )
        for rows in (slice(0, cut), slice(cut, None))
    ]  # fmt: skip
    together = {
        name: parts[0][name] + parts[1][name] if name == "loss"
        else torch.cat([part[name] for part in parts])
        for name in whole
    }  # fmt: skip
    agree(together, whole)


@FEWER
@given(call=small_calls(), data=st.data())
def test_one_hot_probabilities_are_classes(device, call, data):
    """Without class weights also for "mean", which divides by them for classes alone."""
    logits, targets, weight, sample_weight = call
    if targets.is_floating_point():
        targets = targets.argmax(dim=1)
    one_hot = F.one_hot(targets, logits.shape[1]).double()
    options = dict(extras(data), grad_in_forward=some(data, *ROUTES))
    options["reduction"] = some(data, *REDUCTIONS[weight is not None :])
    hard = outcome(device, logits, targets, weight, sample_weight, **options)
    soft = outcome(device, logits, one_hot, weight, sample_weight, **options)
    assert soft.pop("grad_targets").shape == logits.shape
    agree(hard, soft)


@FEWER
@given(call=small_calls(), data=st.data())
def test_a_sample_weight_of_0_or_1_is_a_mask(device, call, data):
    """For the loss and its gradient; a stat is kept of a row that weighs nothing."""
    logits, targets, weight, _ = call
    if targets.is_floating_point():
        targets = targets.argmax(dim=1)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=5)))
    mask = mask[: len(logits)]
    options = dict(extras(data), grad_in_forward=some(data, *ROUTES), through=("loss",))
    options.update(some(data, dict(reduction="sum"), dict(normalizer=2.5), dict()))
    if not mask.any() and "reduction" not in options:
        options["normalizer"] = 2.5  # or the mean is 0 / 0
    masked = outcome(device, logits, targets, weight, mask.double(), **options)
    ignored = outcome(device, logits, targets.masked_fill(~mask, -100), weight, **options)
    names = ("loss", "losses", "grad_logits")
    agree({name: masked[name] for name in names}, {name: ignored[name] for name in names})


@FEWER
@given(call=small_calls(), data=st.data())
def test_both_routes_and_inplace_give_the_same_numbers(device, call, data):
    options = dict(extras(data), reduction=some(data, *REDUCTIONS))
    right = outcome(device, *call, **options)
    for route in (True, False):
        for inplace in (False, True) if not route else (False,):
            copies = [None if tensor is None else tensor.clone() for tensor in call]
            again = outcome(device, *copies, grad_in_forward=route, inplace=inplace, **options)
            agree(again, right)


@st.composite
def heads(draw):
    """(hidden, weight, bias or None, targets, options) of a linear loss in float64."""
    n_rows, n_features = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    vocab_size = draw(st.sampled_from([1, 2, 7, 33, 1030]))
    seed = draw(st.integers(0, 99))
    hidden = random_logits(n_rows, n_features, dtype=torch.float64, seed=seed, scale=2.0)
    weight = random_logits(vocab_size, n_features, dtype=torch.float64, seed=seed + 1, scale=1.0)
    bias = random_logits(vocab_size, dtype=torch.float64, seed=seed + 2)
    targets = random_targets(n_rows, classes=vocab_size, seed=seed)
    ignored = draw(st.lists(st.booleans(), min_size=n_rows, max_size=n_rows))
    targets[torch.tensor(ignored)] = -100
    options = dict(
        reduction=draw(st.sampled_from(REDUCTIONS)),
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        z_loss=draw(st.sampled_from([0.0, 0.01])),
        softcap=draw(st.sampled_from([None, 4.0])),
        logit_scale=draw(st.sampled_from([1.0, -0.5])),
        grad_in_forward=draw(st.sampled_from(ROUTES)),
    )
    return hidden, weight, bias if draw(st.booleans()) else None, targets, options


def linear_outcome(device, hidden, weight, bias, targets, options, **cutting):
    """Loss, losses and gradients, for an upstream gradient that is not 1."""
    leaves = [
        on(device, t).detach().requires_grad_() for t in (hidden, weight, bias) if t is not None
    ]
    bias = leaves[2] if bias is not None else None
    loss, stats = fused_linear_cross_entropy(
        *leaves[:2], targets.to(device), linear_bias=bias, return_stats=True, **options, **cutting
    )
    grads = torch.autograd.grad(loss, leaves, random_upstream(loss))
    return [loss.detach(), *(s.detach() for s in stats), *grads]


@given(heads(), st.integers(1, 12), st.sampled_from([None, True, False]))
@FEWER
def test_any_chunk_size_gives_the_same(device, head, chunk_size, skip_ignored):
    whole = linear_outcome(device, *head, chunk_size=100, skip_ignored=False)
    parts = linear_outcome(device, *head, chunk_size=chunk_size, skip_ignored=skip_ignored)
    torch.testing.assert_close(parts, whole, equal_nan=True)


@given(heads(), st.integers(1, 5), st.randoms(use_true_random=False))
@FEWER
def test_permuting_the_tokens_permutes_what_is_theirs(device, head, chunk_size, random):
    hidden, weight, bias, targets, options = head
    order = list(range(len(targets)))
    random.shuffle(order)
    options = dict(options, reduction="sum")
    loss, *stats, grad_hidden, grad_weight = linear_outcome(
        device, hidden, weight, None, targets, options, chunk_size=chunk_size
    )
    moved, *moved_stats, moved_hidden, moved_weight = linear_outcome(
        device, hidden[order], weight, None, targets[order], options, chunk_size=chunk_size
    )
    torch.testing.assert_close((moved, moved_weight), (loss, grad_weight))
    torch.testing.assert_close(moved_hidden, grad_hidden[order])
    torch.testing.assert_close(moved_stats, [s[order] for s in stats])


@given(heads(), st.integers(1, 5), st.sampled_from([None, True, False]))
@FEWER
def test_leaving_ignored_tokens_out_changes_nothing(device, head, chunk_size, skip_ignored):
    hidden, weight, bias, targets, options = head
    counted = targets != -100
    hidden = hidden.masked_fill(~counted[:, None], torch.nan)
    options = dict(options, reduction="mean", normalizer=3.0)
    cutting = dict(chunk_size=chunk_size, skip_ignored=skip_ignored)
    loss, *_, grad_hidden, grad_weight = linear_outcome(
        device, hidden, weight, None, targets, options, **cutting
    )
    right, *_, of_counted, of_weight = linear_outcome(
        device, hidden[counted], weight, None, targets[counted], options, **cutting
    )
    torch.testing.assert_close((loss, grad_weight), (right, of_weight))
    torch.testing.assert_close(grad_hidden[counted], of_counted)
    assert (grad_hidden[~counted] == 0).all()
