"""Logits that nobody has made yet: what a head returns while a loss is due."""

import contextlib
import functools
import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fused_ce.integrations.head_calls import Function, Origin, Recipe, Step
from fused_ce.tracing import parse_to, saved_tensors_hooks_paused, uncompiled


class DeferredLogits(torch.Tensor):
    """Logits (..., V) as a tensor of which shape, dtype and device are there, and values on demand.

    It remembers what models do to logits before their loss: scales, a cap, float32, rows. Whatever
    else is done to it happens to the real logits, made at that moment, once, with gradients.

    Pending: more can be remembered, and a loss can take it. Made: `_real` holds the logits, which
    answer everything from then on. A result: a Function returned it, so that its gradient has to
    go through that Function; nothing is remembered, and no loss takes it.
    """

    _origin: Origin
    _steps: tuple[Step, ...]  # from the head's output to these logits
    _recipe: Recipe  # the same as options of the loss
    _viewed: "DeferredLogits | None"  # of which it is a view
    _view: Step | None
    _real: torch.Tensor | None
    _node: Any  # its place in the graph, unless a Function has given it another

    # Compilers leave their graph here: traced, what is remembered comes out wrong.
    @staticmethod
    @uncompiled
    def of(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> "DeferredLogits":
        """What `F.linear(hidden, weight, bias)` would return."""
        origin = Origin(hidden, weight, bias)
        return _deferred(origin, (), Recipe(), origin.dtype())

    def is_made(self) -> bool:
        """Whether somebody has looked: then the real ones count, which may have been changed."""
        return self._real is not None or (self._viewed is not None and self._viewed.is_made())

    def is_pending(self) -> bool:
        """Whether more can be remembered.

        Not in the forward of a Function, say, nor of its result, which is not what it seems.
        """
        is_recorded_now = self._origin.is_recorded == torch.is_grad_enabled()
        return is_recorded_now and not self.is_result() and not self.is_made()

    def is_result(self) -> bool:
        """Whether a Function returned it: DDP's, say, or a reentrant checkpoint of the head."""
        return _node(self) is not self._node

    @uncompiled
    def made(self) -> torch.Tensor:
        """The real logits."""
        real = self._real
        if real is None or self.is_result():
            # With gradients if they have some, whatever the one who looks needs.
            is_recorded = self._origin.is_recorded or self.is_result()
            normal = torch.inference_mode(False) if is_recorded else contextlib.nullcontext()
            # A checkpoint counts what is saved, and would find it saved the first time only.
            with normal, torch.set_grad_enabled(is_recorded), saved_tensors_hooks_paused():
                real = self._real = _Look.apply(self) if self.is_result() else self._make()
                self._node = _node(self)
        return real

    def _make(self) -> torch.Tensor:
        if self._viewed is not None and self._view is not None:
            return self._view(self._viewed.made())
        self._origin.check()
        real = self._origin.logits(self._steps)
        for hook in self._origin.outcome.hooks if real.requires_grad else ():
            real.register_hook(hook)
        return real

    @uncompiled
    def for_loss(self) -> tuple[Origin, dict[str, float | None]] | None:
        """A call of a head and options for the loss of it; None: take the real logits."""
        options = self._recipe.options()
        if options is None or self.is_made() or self.is_result():
            return None
        self._origin.check()
        self._origin.outcome.is_taken = True
        return self._origin, options

    @classmethod
    @uncompiled
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Answer what is known, remember what can be, and make the logits for all else."""
        kwargs = kwargs or {}
        # Made ones may have another shape since, or gradients; their place in a dict stays.
        if func in KNOWN and args and (func is T.__hash__ or not args[0].is_made()):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = _remembered(func, args, kwargs)
        if result is not NotImplemented:
            return result
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.made, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    @uncompiled
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        """Below autograd, where collectives and functions of others arrive: the values."""
        args, kwargs = tree_map_only(
            DeferredLogits, lambda logits: logits.made().detach(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


class _Defer(torch.autograd.Function):
    """Their place in the graph, for those who go around `__torch_function__`: other Functions."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, origin, steps, kind):
        """A tensor without values."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.origin, ctx.steps = origin.of(hidden), steps
        ctx.origin.tensors = ()
        return _without_values(*kind)

    @staticmethod
    def backward(ctx, grad):
        """Through the real logits, once more; where no gradient came, none are made."""
        if grad is None:
            return (None,) * 6
        with torch.enable_grad():
            # Gradients end at a view, however else the tensors hang together: tied weights do.
            tensors = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            logits = ctx.origin.logits(ctx.steps, tensors)
        needs = ctx.needs_input_grad[:3]
        wanted = [
            tensor
            for tensor, needed in zip(tensors, needs, strict=True)
            if tensor is not None and needed
        ]
        is_differentiable = torch.is_grad_enabled()
        grads = iter(torch.autograd.grad(logits, wanted, grad, create_graph=is_differentiable))
        return *(next(grads) if needed else None for needed in needs), None, None, None


class _Look(torch.autograd.Function):
    """The real logits where somebody's Function has put deferred ones in the graph."""

    @staticmethod
    def forward(ctx, logits):
        """Their values, with what the Function has changed."""
        ctx.set_materialize_grads(False)
        return logits._make() if logits._real is None else logits._real.detach()

    @staticmethod
    def backward(ctx, grad):
        """On to that Function."""
        return grad


def _deferred(origin, steps, recipe, dtype, base=None, view=None) -> DeferredLogits:
    hidden, weight, _ = origin.tensors
    shape = *hidden.shape[:-1], weight.shape[0]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if base is not None and view is not None:
        # Seen in one class of the base, lest anything have the size of logits.
        of_one_class = *base.shape[:-1], 1
        strides = view(torch.empty_strided(of_one_class, base.stride(), device="meta")).stride()
    kind = shape, strides, dtype, hidden.device
    if origin.is_recorded and torch.is_grad_enabled():
        logits = _Defer.apply(*origin.tensors, origin, steps, kind)
    else:
        logits = _without_values(*kind)
    logits._origin, logits._steps, logits._recipe = origin, steps, recipe
    logits._viewed, logits._view, logits._real = base, view, None
    logits._node = _node(logits)
    return logits


def _node(logits: DeferredLogits) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return logits.grad_fn


def _without_values(shape, strides, dtype, device) -> DeferredLogits:
    return torch.Tensor._make_wrapper_subclass(
        DeferredLogits, shape, strides=strides, dtype=dtype, device=device
    )


# --- what is remembered ---


def _remembered(func, args, kwargs):
    logits = args[0] if args else None
    if func not in REMEMBERED or not isinstance(logits, DeferredLogits):
        return NotImplemented
    remember = REMEMBERED[func]
    if not logits.is_pending():
        if func not in CLONES or logits.is_made() or torch.is_grad_enabled():
            return NotImplemented
        remember = _result
    try:
        _signature(remember).bind(*args, **kwargs)
    except TypeError:  # with out=, say
        return NotImplemented
    return remember(*args, **kwargs)


_signature = functools.cache(inspect.signature)


def _after(logits: DeferredLogits, step: Step, recipe: Recipe, dtype: torch.dtype | None = None):
    """Logits of their own, after one step more."""
    origin = logits._origin.of(logits._origin.tensors[0])
    return _deferred(origin, (*logits._steps, step), recipe, dtype or logits.dtype)


def _scaled(logits, factor, step, recipe):
    is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    if not is_number or not math.isfinite(factor) or factor == 0.0:
        return NotImplemented
    return _after(logits, step, recipe(float(factor)))


def _multiplied(logits, other):
    return _scaled(logits, other, lambda x: x * other, logits._recipe.times)


def _divided(logits, other):
    return _scaled(logits, other, lambda x: x / other, lambda d: logits._recipe.times(1.0 / d))


def _tanh(logits):
    if logits._recipe.is_capped:
        return NotImplemented
    return _after(logits, torch.tanh, logits._recipe._replace(is_capped=True))


def _float(logits, *, memory_format=torch.preserve_format):
    return _to(logits, torch.float32, memory_format=memory_format)


def _to(logits, *args, copy=False, **kwargs):
    try:
        device, dtype, _, memory_format = parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):  # a tensor, whose dtype and device are meant
        return NotImplemented
    is_plain = memory_format in (None, torch.preserve_format) and not copy
    if not is_plain or device not in (None, logits.device):
        return NotImplemented
    if dtype in (None, logits.dtype):
        return logits
    if dtype != torch.float32 or logits.dtype.itemsize > 2:  # what rounds is not remembered
        return NotImplemented
    return _after(logits, torch.Tensor.float, logits._recipe, dtype)


def _contiguous(logits, *, memory_format=torch.contiguous_format):
    if memory_format != torch.contiguous_format:
        return NotImplemented
    if logits.is_contiguous():
        return logits
    return _after(logits, torch.Tensor.contiguous, logits._recipe)


def _clone(logits, *, memory_format=torch.preserve_format):
    if memory_format != torch.preserve_format or not logits.is_contiguous():
        return NotImplemented
    return _after(logits, torch.clone, logits._recipe)


def _result(logits, *, memory_format=torch.preserve_format):
    """A copy in the forward of a Function, which autograd is about to give its place."""
    copy = _clone(logits, memory_format=memory_format)
    if copy is not NotImplemented:
        copy._origin.is_recorded = False
    return copy


def _seen_as(logits, view: Step, is_copy: bool):
    """Some rows, or other axes before the last: a view, or logits of their own."""
    origin = logits._origin.of(view(logits._origin.tensors[0]))
    if is_copy:
        return _deferred(origin, logits._steps, logits._recipe, logits.dtype)
    return _deferred(origin, logits._steps, logits._recipe, logits.dtype, logits, view)


def _indexed(logits, index):
    index = index if isinstance(index, tuple) else (index,)
    if not all(map(_is_index, index)) or not _keeps_classes(index, logits.dim()):
        return NotImplemented
    is_copy = any(isinstance(part, torch.Tensor) for part in index)
    return _seen_as(logits, lambda tensor: tensor[index], is_copy)


def _is_index(part) -> bool:
    if isinstance(part, torch.Tensor):
        return part.dim() > 0 and part.dtype in (torch.bool, torch.int32, torch.int64)
    return part is None or part is Ellipsis or type(part) in (int, slice)


def _keeps_classes(index: tuple, n_axes: int) -> bool:
    """Whether the last axis stays the last, and whole."""
    places = [place for place, part in enumerate(index) if part is Ellipsis]
    if places:
        after = index[places[0] + 1 :]
        return not after or _is_whole(after[-1])
    n_indexed = sum(part.dim() if _is_mask(part) else part is not None for part in index)
    return n_indexed < n_axes or (n_indexed == n_axes and _is_whole(index[-1]))


def _is_whole(part) -> bool:
    return isinstance(part, slice) and part == slice(None)


def _is_mask(part) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype == torch.bool


def _reshaped(logits, *shape):
    if len(shape) == 1 and not isinstance(shape[0], int):
        (shape,) = shape
    if isinstance(shape, torch.dtype) or not logits.is_contiguous():
        return NotImplemented
    sizes = list(shape)
    if -1 in sizes:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = logits.numel() // rest if rest > 0 else 0
    if not sizes or sizes[-1] != logits.shape[-1] or math.prod(sizes) != logits.numel():
        return NotImplemented
    rows = sizes[:-1]
    return _seen_as(logits, lambda tensor: tensor.reshape(*rows, tensor.shape[-1]), False)


def _hooked(logits, hook):
    """A hook for the gradient of the logits, which a loss that has taken them does not make."""
    owner = getattr(hook, "func", hook)
    if str(getattr(owner, "__module__", "")).startswith("torch.distributed."):
        logits._origin.outcome.hooks.append(hook)  # FSDP waits for any gradient; the loss has one
        with torch._C.DisableTorchFunctionSubclass():
            return logits.register_hook(hook)
    return _no_gradient(logits)


def _no_gradient(logits):
    if not logits._origin.outcome.is_taken:
        return NotImplemented
    raise RuntimeError(
        "the loss was computed without logits (fuse_head=True), so there is no gradient of them "
        "to look at: unpatch the model for that"
    )


T = torch.Tensor
CLONES = torch.clone, T.clone
REMEMBERED: dict[Function, Function] = {
    **dict.fromkeys((torch.mul, T.mul, T.__mul__, T.__rmul__, torch.multiply, T.multiply),
                    _multiplied),
    **dict.fromkeys((torch.div, T.div, T.__truediv__, torch.true_divide, T.true_divide), _divided),
    **dict.fromkeys(CLONES, _clone),
    **dict.fromkeys((torch.tanh, T.tanh, nn.functional.tanh), _tanh),
    **dict.fromkeys((torch.reshape, T.reshape, T.view), _reshaped),
    T.float: _float, T.to: _to, T.contiguous: _contiguous, T.__getitem__: _indexed,
    T.register_hook: _hooked, T.retain_grad: _no_gradient,
}  # fmt: skip
_ATTRIBUTES = """shape dtype device ndim layout requires_grad is_leaf grad_fn grad is_cuda is_cpu
    is_meta is_mps is_xpu is_sparse is_sparse_csr is_quantized is_nested is_mkldnn itemsize nbytes
    names output_nr _base""".split()
_METHODS = """size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex
    is_signed is_inference element_size get_device __len__ __hash__ dim_order""".split()
# What is known of logits without their values.
KNOWN: set[Function] = {getattr(T, name).__get__ for name in _ATTRIBUTES if hasattr(T, name)}
KNOWN |= {getattr(T, name) for name in _METHODS}
KNOWN |= {torch.numel, torch.is_floating_point, torch.is_complex}
