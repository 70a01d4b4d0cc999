"""What is right: cross-entropy in extended precision, and torch's own distance from it."""

import numpy as np
import torch
import torch.nn.functional as F

from fused_ce import fused_cross_entropy

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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


def exact(
    logits, targets, weight=None, *,
    upstream, ignore_index=-100, reduction="mean", label_smoothing=0.0,
):  # fmt: skip
    """(loss, gradient) of rows (n, V) and (n,) as np.longdouble, by the documented formula."""
    x, n_classes = extended(logits), logits.shape[1]
    y = targets.long().numpy()
    w = np.ones(n_classes, np.longdouble) if weight is None else extended(weight)
    counts = y != ignore_index
    safe = np.where(counts, y, 0)

    log_p = x - x.max(axis=1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    q = np.zeros_like(x) + np.longdouble(label_smoothing) / n_classes * w
    q[np.arange(len(y)), safe] += (1 - np.longdouble(label_smoothing)) * w[safe]
    q[~counts] = 0
    losses = -(q * np.where(q == 0, 0, log_p)).sum(axis=1)  # 0 * -inf is 0: an unlikely class
    gradient = q.sum(axis=1, keepdims=True) * np.exp(log_p) - q

    divisor = (w[safe] * counts).sum() if reduction == "mean" else np.longdouble(1)
    factor = np.broadcast_to(extended(upstream) / divisor, y.shape)
    loss = losses if reduction == "none" else losses.sum() / divisor
    return loss, gradient * factor[:, None]


def extended(tensor):
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def worst(values, right):
    """The largest distance; NaN where there is one, so that no comparison holds."""
    return np.abs(extended(values) - right).max() if right.size else np.longdouble(0)


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
