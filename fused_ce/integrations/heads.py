"""Heads that defer their logits while a loss is due, and the models that say when it is."""

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_ce.arguments import LOGITS_DTYPES
from fused_ce.integrations.deferred import DeferredLogits
from fused_ce.integrations.head_calls import is_emptied
from fused_ce.tracing import is_autocast, is_transformed

_here = threading.local()  # replicas of DataParallel run in threads of their own
PLAIN = (torch.Tensor, nn.Parameter)


@contextlib.contextmanager
def loss_due(is_due: bool) -> Iterator[None]:
    """In this thread heads defer their logits, or do not."""
    before = getattr(_here, "is_due", False)
    _here.is_due = is_due
    try:
        yield
    finally:
        _here.is_due = before


class DeferringLinear(nn.Linear):
    """nn.Linear, but for what it returns while a loss is due: `DeferredLogits`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) to logits (..., V), made or deferred."""
        if torch.compiler.is_compiling() or not getattr(_here, "is_due", False):
            return super().forward(hidden)
        weight, bias = self.weight, self.bias
        # What FSDP has derived of this class holds the weight for this call only.
        if type(self) is not DeferringLinear or not _can_be_deferred(hidden, weight, bias):
            return super().forward(hidden)
        _that_deferred.add(self)
        return DeferredLogits.of(hidden, weight, bias)

    def _get_name(self) -> str:
        return "Linear"  # in what print(model) shows


_that_deferred: weakref.WeakSet[DeferringLinear] = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Let the versions of heads tell of the step: fused optimizers leave them as they were."""
    if torch.compiler.is_compiling() or not _that_deferred:
        return
    stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    weights = [weight for head in list(_that_deferred) for weight in head.parameters(recurse=False)]
    torch.autograd.graph.increment_version([weight for weight in weights if id(weight) in stepped])


register_optimizer_step_post_hook(_after_step)


def check_head(model: Any) -> None:
    """Raise TypeError where logits cannot be deferred; warn where they are made all the same."""
    head, name = model.get_output_embeddings(), type(model).__name__
    if head is None:
        raise TypeError(
            f"fuse_head=True needs a model with an output embedding, got {name}, of which "
            "get_output_embeddings() is None"
        )
    layers = _layers(head)
    if not layers or not all(type(layer) in (nn.Linear, DeferringLinear) for layer in layers):
        raise TypeError(
            f"fuse_head=True needs an output embedding that is an nn.Linear, got "
            f"{type(head).__name__} in {name}: leave fuse_head out"
        )
    reason = None
    if isinstance(getattr(head, "base_layer", None), nn.Module):
        reason = f"is a {type(head).__module__}.{type(head).__name__}, which adds to its logits"
    elif any("forward" in vars(layer) for layer in layers):
        reason = "has a forward of its own, which device maps give it say"
    if reason is not None:
        warnings.warn(
            f"the output embedding of {name} {reason}: they are made, as without fuse_head",
            stacklevel=3,
        )


def _layers(head: Any) -> list[Any]:
    """What computes logits in an output embedding: itself, or what PEFT has put into a module.

    LoRA adds to its output, which makes the real logits; a copy that is trained instead defers.
    """
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
        modules = head.original_module, *head.modules_to_save.values()
        return [layer for module in modules for layer in _layers(module)]
    while isinstance(getattr(head, "base_layer", None), nn.Module):
        head = head.base_layer
    return [] if head is None else [head]


def _can_be_deferred(hidden, weight, bias) -> bool:
    """Whether they are plain tensors of which F.linear would make logits."""
    tensors = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    if not all(type(tensor) in PLAIN for tensor in tensors) or is_transformed(tensors):
        return False  # DTensors, quantised weights, torch.func: they know what to do
    if is_emptied(weight):
        raise ValueError(
            f"fuse_head=True needs the head's weight whole, got {tuple(weight.shape)} without "
            "memory: shard it with the root module, so that it is gathered for all of the forward, "
            "or leave fuse_head out"
        )
    if torch.jit.is_tracing() or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[-1]:
        return False
    allowed = LOGITS_DTYPES if is_autocast(hidden.device.type) else (hidden.dtype,)
    return hidden.dtype in LOGITS_DTYPES and all(
        tensor.dtype in allowed and tensor.device == hidden.device for tensor in tensors
    )


# --- models ---

FUSES = "_fuses_its_head"  # in a model's attributes: its head defers


def fuse(model: Any, defers: bool) -> None:
    """Give the model its `fusing_class`; its head defers, or not."""
    vars(model)[FUSES] = defers
    if defers:
        _let_defer(model)
    cls: Any = type(model)
    if not hasattr(cls, "is_fusing_class_of"):
        model.__class__ = fusing_class(cls)


def _let_defer(model: Any) -> None:
    for layer in _layers(model.get_output_embeddings()):
        if type(layer) is nn.Linear:
            layer.__class__ = DeferringLinear


def unfuse(model: Any) -> None:
    """The model and its head as they were; a class that FSDP has made of ours stays, and rests."""
    vars(model).pop(FUSES, None)
    cls = vars(type(model)).get("is_fusing_class_of")
    if cls is not None:
        model.__class__ = cls
    plain: Any = nn.Linear
    for layer in _layers(model.get_output_embeddings()):
        if type(layer) is DeferringLinear:
            layer.__class__ = plain


@contextlib.contextmanager
def forward_of(model: Any, args: tuple, kwargs: dict) -> Iterator[None]:
    """While the forward of such a model runs, a loss is due if it was given labels."""
    if torch.compiler.is_compiling() or not vars(model).get(FUSES):
        yield
        return
    cls: Any = type(model)
    given = {**dict(zip(_names_of_arguments(cls), args, strict=False)), **kwargs}
    is_due = given.get("labels") is not None
    if is_due:
        _let_defer(model)  # at each forward: its head may be another than it was
    with loss_due(is_due):
        yield


@functools.cache
def fusing_class(cls: Any) -> Any:
    """A class that is `cls`, but for what is known of its forward and of its last loss.

    A hook would not see the calls of `model.forward` that PEFT makes, nor the end of one that was
    interrupted; `forward` would not see those of an object whose forward has been replaced.
    """
    same: Any  # it, once it is made

    def __call__(self, *args, **kwargs):
        with forward_of(self, args, kwargs):
            return super(same, self).__call__(*args, **kwargs)

    def forward(self, *args, **kwargs):
        with forward_of(self, args, kwargs):
            return super(same, self).forward(*args, **kwargs)

    # Not by functools.wraps: Accelerate unwraps a forward for as long as it has a __wrapped__.
    vars(forward)["__signature__"] = inspect.signature(cls.forward)
    forward.__doc__, forward.__qualname__ = cls.forward.__doc__, cls.forward.__qualname__

    def __reduce_ex__(self, protocol):
        _, _, *state = super(same, self).__reduce_ex__(protocol)
        return _new, (cls,), *state  # the name in the module is that of `cls`

    def loss_stats(self):
        return getattr(vars(self).get("_loss_function"), "stats", None)

    names = dict(
        __call__=__call__, forward=forward, __reduce_ex__=__reduce_ex__,
        loss_stats=property(loss_stats), __module__=cls.__module__,
        __qualname__=cls.__qualname__, __doc__=cls.__doc__, is_fusing_class_of=cls,
    )  # fmt: skip
    same = type(cls.__name__, (cls,), names)
    return same


def _new(cls: Any) -> nn.Module:
    same = fusing_class(cls)
    return same.__new__(same)


@functools.cache
def _names_of_arguments(cls: Any) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]
