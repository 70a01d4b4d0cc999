"""What PyTorch is doing just now, which only its private interfaces tell: asked for here alone."""

# The stubs of torch._C have only some of it.
# mypy: disable-error-code="attr-defined"
# pyright: reportAttributeAccessIssue=false

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

# That of a tensor class which does not compute by itself.
PLAIN_DISPATCH = torch.Tensor.__torch_dispatch__


AnyFunction = TypeVar("AnyFunction", bound=Callable)


def is_traced(logits: torch.Tensor) -> bool:
    """Whether a compiler or a dispatch mode wants to see one operator, not what it does."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_traceable_subclass(logits)
    )


def is_traceable_subclass(tensor: torch.Tensor) -> bool:
    """Whether it is one of the tensors that compilers compute with, which have no memory."""
    return type(tensor) is not torch.Tensor and type(tensor).__module__.startswith(
        "torch._subclasses."
    )


def is_transformed(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether torch.func or forward-mode AD differentiates, or maps over, one of the tensors."""
    return torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0
        and any(
            tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
            for tensor in tensors
        )
    )


def as_index(value: Any) -> int:
    """`operator.index`, which the compiler of torch 2.11 does not know for tensors."""
    whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
    if whole and value.numel() == 1 and torch.compiler.is_compiling():
        return int(value)
    return operator.index(value)


@contextlib.contextmanager
def jit_trace_paused() -> Iterator[None]:
    """`torch.jit.trace` records nothing in the `with`; shapes and values are plain numbers."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def parse_to(*args: Any, **kwargs: Any) -> tuple:
    """(device, dtype, non_blocking, memory_format) of the arguments of `Tensor.to`."""
    nn: Any = vars(torch._C)["_nn"]
    return nn._parse_to(*args, **kwargs)


@contextlib.contextmanager
def saved_tensors_hooks_paused() -> Iterator[None]:
    """What autograd saves in the `with` is not for the hooks around it."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for such devices; of some, "meta" say, PyTorch raises if asked."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# As torch.compiler.assume_constant_result, which imports all of Dynamo: that of torch 2.11 cannot
# trace the question.
_has_autocast._dynamo_marked_constant = True


def is_batched_or_dual(grad: torch.Tensor | None) -> bool:
    """Whether an upstream gradient is batched (is_grads_batched, vmap) or a dual number."""
    if grad is None:
        return False
    if is_looped_over(grad) or torch._C._functorch.is_functorch_wrapped_tensor(grad):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(grad).tangent is not None


def is_looped_over(grad: torch.Tensor | None) -> bool:
    """Whether it is one of many for `is_grads_batched`, which calls an operator for each."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def saved_tensors_have_hooks() -> bool:
    """Whether somebody wants to see what is saved for backward, a checkpoint say."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def graph_is_kept() -> bool:
    """Whether the running backward was asked to retain its graph; True if PyTorch does not say."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else keeps()


def uncompiled(function: AnyFunction) -> AnyFunction:
    """Break the graph of a compiler at each call, and keep it from all that the call does.

    As torch.compiler.disable, which imports all of Dynamo: here only once somebody else has.
    """
    alone = functools.cache(lambda: torch.compiler.disable(function))

    @functools.wraps(function)
    def called(*args, **kwargs):
        if "torch._dynamo.eval_frame" in sys.modules:
            return alone()(*args, **kwargs)
        return function(*args, **kwargs)

    vars(called)["_torchdynamo_disable"] = True  # what it sets, for the caller's graph
    same: Any = called
    return same
