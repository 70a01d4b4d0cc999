"""Checks of hidden states, the weight of a head and its bias; both as autocast would have them."""

import contextlib
from typing import NamedTuple

import torch

from fused_ce.arguments import LOGITS_DTYPES, TARGET_DTYPES
from fused_ce.tracing import PLAIN_DISPATCH, is_autocast, jit_trace_paused

HALF = (torch.float16, torch.bfloat16)


class Head(NamedTuple):
    """Hidden states, and what makes logits of them."""

    hidden: torch.Tensor  # (..., H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    logits_dtype: torch.dtype

    def stand_in(self) -> torch.Tensor:
        """A tensor of the logits' shape that takes no memory: what is asked of it is its shape."""
        shape = *self.hidden.shape[:-1], self.weight.shape[0]
        return self.hidden.detach().new_zeros((), dtype=self.logits_dtype).expand(shape)


def prepare_head(
    hidden: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    targets: torch.Tensor,
    logits_dtype: torch.dtype | None,
    is_shard: bool = False,
) -> Head:
    """Check what the host can see; cast to the dtype of autocast, where it is on.

    A shard of a head may have no rows.
    """
    # A jit trace would record what is asked of shapes.
    with jit_trace_paused() if torch.jit.is_tracing() else contextlib.nullcontext():
        _check_tensors(hidden, linear_weight, linear_bias, targets)
        _check_shapes(hidden, linear_weight, linear_bias, targets, is_shard)
    kind = hidden.device.type
    if is_autocast(kind):
        hidden, linear_weight, linear_bias = (  # type: ignore[assignment]  # None stays None
            tensor
            if tensor is None or tensor.dtype == torch.float64
            else tensor.to(torch.get_autocast_dtype(kind))
            for tensor in (hidden, linear_weight, linear_bias)
        )
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"hidden of {hidden.dtype} needs {name} of it, got {tensor.dtype}")
    allowed = [hidden.dtype, *([torch.float32] if hidden.dtype in HALF else [])]
    if logits_dtype is not None and logits_dtype not in allowed:
        need = " or ".join(map(str, allowed))
        raise TypeError(
            f"logits_dtype must be None, {need} for hidden of {hidden.dtype}, got {logits_dtype!r}"
        )
    return Head(hidden, linear_weight, linear_bias, logits_dtype or hidden.dtype)


def check_cutting(skip_ignored: object, chunk_size: object) -> None:
    """Raise for what does not say how rows are cut into chunks."""
    if not (skip_ignored is None or isinstance(skip_ignored, bool)):
        raise TypeError(f"skip_ignored must be None, True or False, got {skip_ignored!r}")
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be an int or None, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def check_whole(head: Head) -> None:
    """Raise TypeError for tensors that are not in the memory of this process as plain ones are."""
    for name, tensor in (
        ("hidden", head.hidden), ("linear_weight", head.weight), ("linear_bias", head.bias),
    ):  # fmt: skip
        if tensor is None:
            continue
        kind = type(tensor)
        # Its stub says that it is a method.
        if kind.__torch_dispatch__ is PLAIN_DISPATCH:  # pyright: ignore[reportAttributeAccessIssue]
            continue
        raise TypeError(
            f"{name} must be a plain tensor, got a {kind.__name__}, which computes by itself: pass "
            "what it holds (full_tensor() of a DTensor), call the loss where the weight is whole "
            "(inside the forward of an FSDP module, or under unshard()), or use "
            "backend('reference')"
        )


def _check_tensors(hidden, linear_weight, linear_bias, targets) -> None:
    named = (("hidden", hidden), ("linear_weight", linear_weight), ("linear_bias", linear_bias))
    for name, value in named:
        if value is None and name == "linear_bias":
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
        if value.dtype not in LOGITS_DTYPES:
            hint = ""
            if name == "linear_weight" and value.dtype in TARGET_DTYPES:
                hint = ": are linear_weight and targets exchanged? targets come third"
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}{hint}"
            )
        if value.device != hidden.device:
            raise ValueError(f"hidden on {hidden.device} needs {name} there, got {value.device}")
    if not isinstance(targets, torch.Tensor):
        raise TypeError(f"targets must be a torch.Tensor, got {type(targets).__name__}")


def _check_shapes(hidden, linear_weight, linear_bias, targets, is_shard) -> None:
    if hidden.dim() == 0:
        raise ValueError("hidden needs (..., H), got a 0-d tensor")
    n_features, got = hidden.shape[-1], tuple(linear_weight.shape)
    no_rows = is_shard and got[:1] == (0,)
    if linear_weight.numel() == 0 and n_features > 0 and not no_rows:
        raise ValueError(
            f"linear_weight must hold (V, {n_features}), got an empty {got}: where its shards are "
            "gathered for a module only, as ZeRO-3 and FSDP do, call the loss inside its forward"
        )
    if len(got) != 2 or got[1] != n_features or got[0] == 0 and not no_rows:
        hint = ""
        if len(got) == 2 and got[0] == n_features:
            hint = ": pass its transpose, as nn.Linear holds it"
        raise ValueError(
            f"hidden {tuple(hidden.shape)} needs linear_weight (V, {n_features}), got {got}{hint}"
        )
    if linear_bias is not None and tuple(linear_bias.shape) != got[:1]:
        raise ValueError(
            f"linear_weight {got} needs linear_bias ({got[0]},), got {tuple(linear_bias.shape)}"
        )
    batch = tuple(hidden.shape[:-1])
    need = (*batch, got[0]) if targets.is_floating_point() else batch
    if tuple(targets.shape) != need:
        kind = "probabilities" if targets.is_floating_point() else "targets"
        raise ValueError(
            f"hidden {tuple(hidden.shape)} with linear_weight {got} needs {kind} {need}, "
            f"got {tuple(targets.shape)}"
        )
