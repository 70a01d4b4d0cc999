"""What is right: cross-entropy in extended precision, and torch's own distance from it."""

import os

import numpy as np
import torch
import torch.nn.functional as F

from fused_ce import fused_cross_entropy

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Other numbers for every test at once: what holds must hold for those too.
SEED = 1000 * int(os.environ.get("FUSED_CE_TEST_SEED", "0"))


def generator(seed=0):
    return torch.Generator().manual_seed(SEED + seed)


def random_logits(*shape, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    values = torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale
    return values.to(dtype).to(device)


def random_targets(*shape, classes, device="cpu", seed=1):
    return torch.randint(classes, shape, generator=generator(seed)).to(device)


def random_weight(classes, dtype=torch.float32, device="cpu", seed=2):
    values = torch.rand(classes, generator=generator(seed), dtype=torch.float64) + 0.1
    return values.to(dtype).to(device)


def random_upstream(loss, seed=3):
    """An upstream gradient that no two rows share."""
    values = torch.randn(loss.shape, generator=generator(seed), dtype=torch.float64)
    return values.to(loss.dtype).to(loss.device)


def fused(logits, targets, weight=None, *, upstream=None, **options):
    """(loss, gradient, upstream) of a leaf with the layout of logits."""
    leaf = logits.detach().requires_grad_()
    loss = fused_cross_entropy(leaf, targets, weight, **options)
    upstream = random_upstream(loss) if upstream is None else upstream
    loss.backward(upstream)
    return loss.detach(), leaf.grad, upstream


def by_torch(logits, targets, weight=None, *, upstream, **options):
    """(loss, gradient) by torch, in the dtype of logits."""
    leaf = logits.detach().clone().requires_grad_()
    loss = F.cross_entropy(leaf, targets, weight, **options)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), leaf.grad


def exact(logits, targets, weight=None, *, upstream, **options):
    """(loss, gradient) of rows (n, V) and (n,) as np.longdouble, by the documented formula."""
    right, _ = derived(logits, targets, weight, upstreams={"loss": upstream}, **options)
    return right["loss"], right["grad_logits"]


def derived(
    logits, targets, weight=None, *,
    upstreams, ignore_index=-100, reduction="mean", label_smoothing=0.0, sample_weight=None,
    normalizer=None, z_loss=0.0, logit_scale=1.0, softcap=None,
):  # fmt: skip
    """(values, sizes) of rows (n, V) as np.longdouble, derived by hand from the documented formula.

    Keys of values: loss, losses, lse, entropy, predictions, grad_logits, grad_sample_weight and, of
    probabilities, grad_targets. `upstreams` has a gradient for each of the first four that is used.
    `sizes` has for each value the largest sum of the absolute terms that it is the sum of: what
    rounding is relative to.
    """
    z, n_classes = extended(logits), logits.shape[1]
    v = np.ones(len(z), np.longdouble) if sample_weight is None else extended(sample_weight)
    w = np.ones(n_classes, np.longdouble) if weight is None else extended(weight)
    s = np.longdouble(label_smoothing)

    x, slope = z * np.longdouble(logit_scale), np.longdouble(logit_scale)
    if softcap is not None:
        cap = np.longdouble(softcap)
        with np.errstate(over="ignore"):
            slope = slope / np.cosh(x / cap) ** 2
        x = cap * np.tanh(x / cap)
    largest = x.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(x - largest).sum(axis=1, keepdims=True))
    log_p = x - largest - log_sum
    p, lse = np.exp(log_p), (largest + log_sum)[:, 0]
    surprise = np.where(p == 0, 0, -log_p)  # 0 * inf is 0: a class that cannot be
    entropy = (p * surprise).sum(axis=1)

    if targets.is_floating_point():
        counts, class_weight = np.ones(len(z), bool), np.ones(len(z), np.longdouble)
        q = w * ((1 - s) * extended(targets) + s / n_classes)
    else:
        counts = targets.numpy() != ignore_index
        y = np.where(counts, targets.numpy(), 0)
        class_weight = w[y] * counts
        q = np.zeros_like(x) + s / n_classes * w
        q[np.arange(len(y)), y] += (1 - s) * w[y]
    q_terms = q * np.where(q == 0, 0, -log_p)
    unweighted = (q_terms.sum(axis=1) + z_loss * lse**2) * counts
    losses = v * unweighted
    predictions = np.where(counts, x.argmax(axis=1), -1)

    moves = reduction == "mean" and normalizer is None  # sample_weight moves the divisor
    divisor = (v * class_weight).sum() if moves else np.longdouble(normalizer or 1)
    loss = losses if reduction == "none" else losses.sum() / divisor

    ups = {name: extended(upstream) for name, upstream in upstreams.items()}
    none = np.zeros(len(z), np.longdouble)
    of_loss = np.broadcast_to(ups.get("loss", none[:1].sum()) / divisor, none.shape)
    of_losses = (of_loss + ups.get("losses", none)) * counts
    of_lse, of_entropy = ups.get("lse", none) * counts, ups.get("entropy", none) * counts
    row = (of_losses * v)[:, None]
    of_p = row * (q.sum(axis=1) + 2 * z_loss * lse)[:, None] + of_lse[:, None]
    of_entropy = of_entropy[:, None] * (surprise - entropy[:, None])
    values = dict(
        loss=loss, losses=losses, lse=lse * counts, entropy=entropy * counts,
        predictions=predictions,
        grad_logits=((of_p + of_entropy) * p - row * q) * slope,
        grad_sample_weight=of_losses * unweighted - moves * of_loss * loss * class_weight,
    )  # fmt: skip
    if targets.is_floating_point():
        values["grad_targets"] = -row * (1 - s) * w * log_p

    # A logit that is scaled or capped is rounded: that is an error relative to the logit.
    rounded = 0 if softcap is None and logit_scale == 1 else np.abs(x).max(initial=0)
    by_row = np.abs(q_terms).sum(axis=1) + np.abs(q).sum(axis=1) * rounded
    by_row = by_row + np.abs(z_loss) * (lse**2 + 2 * np.abs(lse) * rounded)
    of_p = np.abs(row) * (np.abs(q).sum(axis=1) + 2 * np.abs(z_loss * lse))[:, None]
    of_p = of_p + np.abs(ups.get("lse", none))[:, None]
    sizes = dict(
        loss=np.abs(v * by_row * counts).sum() / np.abs(divisor),
        losses=np.abs(v) * by_row * counts,
        lse=np.abs(largest) + log_sum + rounded,
        entropy=entropy + log_sum[:, 0] + rounded,
        # The slope of a cap is 1 - tanh**2, in torch too: its rounding is relative to 1.
        grad_logits=((of_p + np.abs(of_entropy)) * p * (1 + rounded) + np.abs(row * q))
        * np.abs(logit_scale),
        grad_sample_weight=np.abs(of_losses) * by_row
        + moves * np.abs(of_loss * class_weight) * np.abs(v * by_row).sum() / np.abs(divisor),
        grad_targets=np.abs(row * (1 - s) * w) * (np.abs(log_p) + rounded),
    )  # fmt: skip
    if reduction == "none":
        sizes["loss"] = sizes["losses"]
    return values, {name: np.max(size, initial=0) for name, size in sizes.items()}


def extended(tensor):
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def worst(values, right):
    """The largest distance; NaN where there is one, so that no comparison holds."""
    return np.abs(extended(values) - right).max() if right.size else np.longdouble(0)


def assert_as_near(ours, theirs, right):
    """`ours` is as near to `right`, in float64, as `theirs`; NaN and infinities are the same."""
    finite = right.isfinite()
    torch.testing.assert_close(ours[~finite].to(right.dtype), right[~finite], equal_nan=True)
    right = right[finite].cpu().numpy()
    error, torch_error = worst(ours[finite], right), worst(theirs[finite], right)
    slack = 4 * torch.finfo(ours.dtype).eps * np.abs(right).max(initial=0)
    assert error <= torch_error + slack, f"{error} > {torch_error} + {slack}"


def assert_as_exact_as_torch(
    logits, targets, weight=None, *, dim=-1, upstream=None, ulps_of_one=0, **options
):
    """Loss and gradient of a random upstream are as near to the exact ones as torch's own.

    Torch gets the logits in float32 (float64) and its gradient is rounded once: in half precision
    it rounds in between, and is no measure. `ulps_of_one` more are allowed where a confident row
    leaves 1 - p, and torch's error is a matter of luck.
    """
    loss, gradient, upstream = fused(logits, targets, weight, dim=dim, upstream=upstream, **options)
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    reduction = options.get("reduction", "mean")
    assert loss.dtype == compute
    assert loss.shape == (targets.shape if reduction == "none" else ())
    assert gradient.dtype == logits.dtype
    assert gradient.shape == logits.shape

    axis = -1 if dim is None else dim
    rows = (logits.detach().movedim(axis, -1).reshape(-1, logits.shape[axis])).cpu()
    rows_gradient = gradient.movedim(axis, -1).reshape(rows.shape)
    flat = targets.reshape(-1).long().cpu()
    rows = rows.masked_fill((flat == options.get("ignore_index", -100))[:, None], 0.0)
    weight = None if weight is None else weight.cpu()
    upstream = upstream.reshape(-1).cpu() if reduction == "none" else upstream.cpu()
    kept = {k: options[k] for k in ("ignore_index", "reduction", "label_smoothing") if k in options}
    right_loss, right_gradient = exact(rows, flat, weight, upstream=upstream, **kept)
    torch_loss, torch_gradient = by_torch(
        rows.to(compute), flat, None if weight is None else weight.to(compute),
        upstream=upstream, **kept,
    )  # fmt: skip

    loss_error, torch_error = worst(loss.reshape(-1), right_loss), worst(torch_loss, right_loss)
    slack = 4 * torch.finfo(compute).eps * np.abs(right_loss).max(initial=0)
    slack += ulps_of_one * torch.finfo(compute).eps
    assert loss_error <= torch_error + slack, f"loss: {loss_error} > {torch_error} + {slack}"

    error = worst(rows_gradient, right_gradient)
    torch_error = worst(torch_gradient.to(logits.dtype), right_gradient)
    slack = 4 * torch.finfo(logits.dtype).eps * np.abs(right_gradient).max(initial=0)
    slack += ulps_of_one * torch.finfo(compute).eps * np.abs(extended(upstream)).max(initial=0)
    assert error <= torch_error + slack, f"gradient: {error} > {torch_error} + {slack}"


GRADIENTS = ("logits", "targets", "sample_weight")
STATS = ("losses", "lse", "entropy")


def computed(
    logits, targets, weight=None, *,
    sample_weight=None, needs=GRADIENTS, through=("loss", *STATS), **options,
):  # fmt: skip
    """(values, upstreams) of fused_cross_entropy, keyed as those of `derived`.

    Differentiated from random upstream gradients of the outputs named in `through`, as far as the
    call returns them, to the inputs named in `needs`, as far as they can have a gradient.
    """
    inputs = dict(logits=logits, targets=targets, sample_weight=sample_weight)
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in inputs.items()
        if name in needs and tensor is not None and tensor.is_floating_point()
    }
    inputs.update(leaves)
    result = fused_cross_entropy(
        inputs["logits"], inputs["targets"], weight, sample_weight=inputs["sample_weight"],
        **options,
    )  # fmt: skip
    loss, stats = result if options.get("return_stats") else (result, None)
    values = dict(loss=loss) if stats is None else dict(loss=loss, **stats._asdict())
    used = [name for name in through if name in values]
    upstreams = {name: random_upstream(values[name], seed=3 + len(name)) for name in used}
    gradients = torch.autograd.grad(
        [values[name] for name in used], list(leaves.values()), list(upstreams.values())
    )
    values = {name: value.detach() for name, value in values.items()}
    values.update({f"grad_{n}": gradient for n, gradient in zip(leaves, gradients, strict=True)})
    return values, upstreams


def composed(
    logits, targets, weight=None, *,
    upstreams, ignore_index=-100, reduction="mean", label_smoothing=0.0, sample_weight=None,
    normalizer=None, z_loss=0.0, logit_scale=1.0, softcap=None,
):  # fmt: skip
    """The values of `derived` in the dtype of the rows, as a user of torch would write it."""
    leaf = logits.detach().clone().requires_grad_()
    v = torch.ones_like(logits[:, 0]) if sample_weight is None else sample_weight.clone()
    y = targets.detach().clone()
    leaves = [leaf, v.requires_grad_(), *([y.requires_grad_()] if y.is_floating_point() else [])]
    x = leaf * logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    lse, log_p = x.logsumexp(dim=1), x.log_softmax(dim=1)
    losses = F.cross_entropy(
        x, y, weight, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    class_weight = counts = torch.ones_like(lse)
    if not y.is_floating_point():
        counts = (y != ignore_index).to(lse.dtype)
        safe = torch.where(y != ignore_index, y, 0)
        class_weight = counts if weight is None else counts * weight[safe]
    losses = v * (losses + z_loss * lse**2 * counts)
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / ((v * class_weight).sum() if normalizer is None else normalizer)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=1) * counts
    values = dict(loss=loss, losses=losses, lse=lse * counts, entropy=entropy)
    gradients = torch.autograd.grad(
        [values[name] for name in upstreams], leaves, list(upstreams.values()),
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    names = ("grad_logits", "grad_sample_weight", "grad_targets")[: len(leaves)]
    return values | dict(zip(names, gradients, strict=True))


def assert_all_as_exact_as_torch(
    logits, targets, weight=None, *, dim=-1, sample_weight=None, ulps_of_one=2, **call
):
    """Every value and every gradient is as near to the exact one as torch's own.

    As `assert_as_exact_as_torch`, for all options, the stats, and the gradients of `needs` through
    the outputs of `through` (see `computed`).
    """
    axis = -1 if dim is None else dim
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows, soft = _rows(logits, axis), targets.is_floating_point()
    flat = _rows(targets, axis) if soft else targets.detach().reshape(-1).long().cpu()
    if not soft:
        rows = rows.masked_fill((flat == call.get("ignore_index", -100))[:, None], 0.0)
    batch_shape = logits.movedim(axis, -1).shape[:-1]
    values, ups = computed(logits, targets, weight, dim=dim, sample_weight=sample_weight, **call)
    _assert_kinds(values, batch_shape, logits, targets, sample_weight, compute, call)

    of_torch = {k: call[k] for k in call if k not in NOT_OF_TORCH}
    if isinstance(call.get("normalizer"), torch.Tensor):
        of_torch["normalizer"] = call["normalizer"].item()
    scalar = call.get("reduction", "mean") != "none"
    of_torch["upstreams"] = {
        name: up.cpu() if name == "loss" and scalar else up.reshape(-1).cpu()
        for name, up in ups.items()
    }
    v = None if sample_weight is None else sample_weight.detach().reshape(-1).cpu()
    w = None if weight is None else weight.cpu()
    rights, sizes = derived(rows, flat, w, sample_weight=v, **of_torch)
    theirs = composed(
        rows.to(compute), flat.to(compute) if soft else flat, None if w is None else w.to(compute),
        sample_weight=None if v is None else v.to(compute), **of_torch,
    )  # fmt: skip
    for name, value in values.items():
        if name == "predictions":
            _assert_predictions(value.reshape(-1).cpu().numpy(), rights[name], rows, of_torch)
            continue
        value = _rows(value, axis) if name in ("grad_logits", "grad_targets") else value
        right, own = rights[name], theirs[name].to(value.dtype)
        eps = torch.finfo(value.dtype).eps
        slack = 4 * eps * np.abs(right).max(initial=0)
        slack += (4 + ulps_of_one) * torch.finfo(compute).eps * sizes[name]
        error, torch_error = worst(value.reshape(right.shape), right), worst(own, right)
        assert error <= torch_error + slack, f"{name}: {error} > {torch_error} + {slack}"


def _assert_kinds(values, batch_shape, logits, targets, sample_weight, compute, call):
    """Shapes and dtypes of all that a call returned."""
    scalar = call.get("reduction", "mean") != "none"
    inputs = dict(logits=logits, targets=targets, sample_weight=sample_weight)
    for name, value in values.items():
        of = inputs.get(name.removeprefix("grad_"))
        shape = batch_shape if of is None else of.shape
        dtype = torch.int64 if name == "predictions" else compute if of is None else of.dtype
        assert value.shape == (() if name == "loss" and scalar else shape), name
        assert value.dtype == dtype, name
    if call.get("return_stats"):
        assert {*STATS, "predictions"} < set(values)


def _assert_predictions(predictions, right, rows, options):
    """The first of the largest logits; of capped ones, any that rounding cannot tell from it."""
    counts = right >= 0
    if options.get("softcap") is None:
        assert np.array_equal(predictions, right)
        return
    assert (predictions[~counts] == -1).all()
    cap = options["softcap"]
    x = cap * np.tanh(extended(rows) * options.get("logit_scale", 1.0) / cap)
    got, best = (
        np.take_along_axis(x, i[:, None] * counts[:, None], 1) for i in (predictions, right)
    )
    assert (best - got <= 4e-7 * cap)[counts].all()


NOT_OF_TORCH = ("inplace", "grad_in_forward", "return_stats", "needs", "through")


def _rows(tensor, axis):
    """A copy of the rows (n, V) on the CPU: a gradient in place may overwrite the original."""
    return tensor.detach().movedim(axis, -1).reshape(-1, tensor.shape[axis]).cpu().clone()


def inside(values, fill, *, strides=None, offset=0, padding=2048):
    """(values, storage): the same numbers inside a larger storage filled with `fill`.

    strides are in elements; None lays the values out densely. Guard bands of `padding` elements, as
    wide as a tile, lie before and after; those between rows are whatever the strides leave.
    """
    shape = values.shape
    strides = values.contiguous().stride() if strides is None else strides
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    storage = torch.full(
        (2 * padding + offset + extent,), fill, dtype=values.dtype, device=values.device
    )
    view = storage.as_strided(shape, strides, padding + offset)
    view.copy_(values)
    return view, storage


def untouched(storage, view, fill):
    """Whether every element of storage outside view still holds `fill`."""
    mask = torch.ones(storage.shape, dtype=torch.bool, device=storage.device)
    mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    outside = storage[mask]
    return bool((outside.isnan() if fill != fill else outside == fill).all())
