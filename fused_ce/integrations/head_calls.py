"""A call of a head that has not been made: of what, when, and what was done to its result."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_ce.tracing import is_autocast

Step = Callable[[torch.Tensor], torch.Tensor]
Function = Callable[..., Any]


class Outcome:
    """What became of a call of a head, which all its deferred logits share."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.is_taken = False  # by a loss, which leaves no gradient of logits to look at
        self.hooks: list[Function] = []  # for the gradient of the logits, should it be made


class Origin:
    """A call of a head: hidden (..., H), weight (V, H), bias (V,) or None, and when it was."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        """The call of just now."""
        self.tensors = hidden, weight, bias
        self.versions = [_version(tensor) for tensor in self.tensors]
        self.outcome = Outcome()
        self.is_recorded = torch.is_grad_enabled()
        self.device_type = kind = hidden.device.type
        self.autocast_dtype = torch.get_autocast_dtype(kind) if is_autocast(kind) else None

    def dtype(self) -> torch.dtype:
        """That of the head's output."""
        hidden = self.tensors[0]
        if self.autocast_dtype is None or hidden.dtype == torch.float64:
            return hidden.dtype
        return self.autocast_dtype

    def surroundings(self) -> contextlib.AbstractContextManager:
        """Autocast as it was when the head was called."""
        if not torch.amp.is_autocast_available(self.device_type):
            return contextlib.nullcontext()
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device_type, dtype=self.autocast_dtype, enabled=enabled)

    def logits(self, steps: tuple[Step, ...], tensors: Any = None) -> torch.Tensor:
        """What the head returns of its tensors, or of those, after some steps."""
        hidden, weight, bias = tensors or self.tensors
        with self.surroundings():
            logits = nn.functional.linear(hidden, weight, bias)
        for step in steps:
            logits = step(logits)
        return logits

    def of(self, hidden: torch.Tensor) -> "Origin":
        """The same call for hidden states of it: some rows, or all in another shape."""
        self.check()
        some = object.__new__(Origin)
        vars(some).update(vars(self))
        some.tensors = hidden, *self.tensors[1:]
        some.versions = [_version(hidden), *self.versions[1:]]
        return some

    def check(self) -> None:
        """Raise where the logits that were meant cannot be made any more."""
        names = "hidden states", "head's weight", "head's bias"
        for name, tensor, version in zip(names, self.tensors, self.versions, strict=True):
            if tensor is None:
                continue
            if is_emptied(tensor):
                raise ValueError(
                    f"logits that fuse_head=True has left out need the {name} whole, but it has "
                    "been emptied since, as FSDP and ZeRO-3 do where a module's forward ends: "
                    "shard the head with the root module, or leave fuse_head out"
                )
            if _version(tensor) != version:
                raise RuntimeError(
                    f"logits that fuse_head=True has left out cannot be made any more: the {name} "
                    "changed since, in an optimizer's step say; look at them before, or leave "
                    "fuse_head out"
                )


class Recipe(NamedTuple):
    """`gain * tanh(scale * x)` of the head's output x where it is capped, otherwise `scale * x`."""

    scale: float = 1.0
    is_capped: bool = False
    gain: float = 1.0

    def times(self, factor: float) -> "Recipe":
        """Multiplied by a number."""
        if self.is_capped:
            return self._replace(gain=self.gain * factor)
        return self._replace(scale=self.scale * factor)

    def options(self) -> dict[str, float | None] | None:
        """`logit_scale` and `softcap` of the loss; None where it has none such."""
        scale = self.scale * self.gain
        if not (math.isfinite(scale) and math.isfinite(self.gain) and self.gain > 0.0):
            return None
        return dict(logit_scale=scale, softcap=self.gain if self.is_capped else None)


def _version(tensor: torch.Tensor | None) -> int | None:
    """What changes with each change in place; inference mode does not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def is_emptied(tensor: torch.Tensor) -> bool:
    """Without the memory of its elements, as FSDP leaves parameters, or elements, as ZeRO-3."""
    has_no_memory = tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
    return has_no_memory or tensor.shape == (0,)
