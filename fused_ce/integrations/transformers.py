"""transformers: the loss of a causal language model, set for one model object and taken back."""

import contextlib
import inspect
import threading
import warnings
from collections.abc import Iterator
from types import CodeType
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from fused_ce.cross_entropy import fused_cross_entropy

Model = TypeVar("Model", bound=nn.Module)
CURRENT = "_loss_function"  # what the property PreTrainedModel.loss_function reads, if it is there
BEFORE = "_loss_before_fused_ce"  # what was there: (), or a tuple of it alone
HOOKS = "_hooks_of_fused_ce"  # what tells of a forward that asks for another loss
_calls = threading.local()  # of causal_lm_loss in this thread: replicas run in threads of their own


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None,
    num_items_in_batch: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: object,
) -> torch.Tensor:
    """The loss of the next token, as `ForCausalLMLoss` of transformers has it, without its copies.

    Its signature is that of transformers, which calls it from the forward of a model.

    Args:
        logits: (B, T, V); float16, bfloat16, float32 or float64; neither changed nor copied.
        labels: (B, T), any integer dtype and device: the tokens themselves, which are shifted here;
            or None, with `shift_labels`.
        vocab_size: V; None takes the last axis of the logits.
        num_items_in_batch: what the sum is divided by instead of this batch's labels, a number or
            a tensor of one element: the labels of all micro-batches, say, as `Trainer` counts them.
        ignore_index: labels with this value count nothing.
        shift_labels: (B, T), labels that are shifted already; `labels` are not looked at then.
        kwargs: whatever else a model passes on; not looked at, as there.

    Returns:
        The mean in nats, a float32 scalar (float64 for float64 logits, which are rounded there).
        Nothing to learn from is NaN with zero gradient, as there, and 0 of a `num_items_in_batch`
        that is not 0.

    Raises:
        ValueError: there are no labels, or not one for each row of logits.
        TypeError, IndexError: as `fused_cross_entropy`.
    """
    if not torch.compiler.is_compiling():
        _calls.count = getattr(_calls, "count", 0) + 1
    if shift_labels is None:
        if labels is None:
            raise ValueError("a loss needs labels or shift_labels, got None for both")
        # shifted logits would mean a gradient of the slice, one more buffer of their size
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if vocab_size is None:
        vocab_size = logits.shape[-1]
    if shift_labels.numel() * vocab_size != logits.numel():
        raise ValueError(
            f"labels {tuple(shift_labels.shape)} with vocab_size={vocab_size} need a row of "
            f"{vocab_size} logits each, got {tuple(logits.shape)}"
        )
    if logits.shape[-1] != vocab_size:
        logits = logits.view(-1, vocab_size)
    targets = shift_labels.to(logits.device).reshape(logits.shape[:-1])
    return fused_cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        dim=-1,
        normalizer=_normalizer(num_items_in_batch, logits.device),
    )


def patch(model: Model) -> Model:
    """Let this one model compute its loss by `causal_lm_loss`, and no other model.

    A copy or a pickle of the patched model is patched as well; what `from_pretrained` loads is not.
    Patching twice is harmless. The first forward with labels that computes its loss elsewhere, as
    TRL's trainers let models do, warns: the patch has no effect there.

    Args:
        model: a causal language model of transformers whose forward calls `self.loss_function`; in
            `torch.compile`, `PeftModel`, `DataParallel`, `DistributedDataParallel` or the like too.

    Returns:
        The same object.

    Raises:
        TypeError: the model has another loss, or computes it elsewhere.
    """
    inner = _causal_lm(model)
    if _is_patched(inner):
        return model
    attributes = vars(inner)  # assigning raises where an nn.Module has been assigned before
    before = (attributes[CURRENT],) if CURRENT in attributes else ()
    attributes[CURRENT] = causal_lm_loss
    attributes[BEFORE] = before
    if inner.loss_function is not causal_lm_loss:
        unpatch(inner)
        raise TypeError(
            f"need a model with the loss_function of PreTrainedModel, got {type(inner).__name__}, "
            "which has its own"
        )
    attributes[HOOKS] = (
        inner.register_forward_pre_hook(_before_forward, with_kwargs=True),
        inner.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
    )
    return model


def unpatch(model: Model) -> Model:
    """Give the model the loss that it had before `patch`; one that is not patched stays as it is.

    Args:
        model: what `patch` takes.

    Returns:
        The same object.

    Raises:
        TypeError: it is no model of transformers.
    """
    inner = _unwrapped(model)
    attributes = vars(inner)
    was_patched = _is_patched(inner)  # or somebody has set another loss since: that one stays
    before = attributes.pop(BEFORE, ())
    for hook in attributes.pop(HOOKS, ()):
        hook.remove()
    if was_patched:
        if before:
            attributes[CURRENT] = before[0]
        else:
            del attributes[CURRENT]
    return model


@contextlib.contextmanager
def patched(model: Model) -> Iterator[Model]:
    """`patch` for the length of a `with`; a model that was patched before it still is afterwards.

    Args:
        model: what `patch` takes.

    Raises:
        TypeError: as `patch`.
    """
    was_patched = _is_patched(_unwrapped(model))
    patch(model)
    try:
        yield model
    finally:
        if not was_patched:
            unpatch(model)


def _normalizer(
    num_items_in_batch: float | torch.Tensor | None, device: torch.device
) -> float | torch.Tensor | None:
    """`num_items_in_batch` as `fused_cross_entropy` takes it, without a wait for the device."""
    if num_items_in_batch is None:
        return None
    if isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                "num_items_in_batch must be a number or a tensor of one element, got "
                f"{tuple(num_items_in_batch.shape)}"
            )
        num_items_in_batch = num_items_in_batch.detach().reshape(())  # DataParallel: (1, 1)
        if num_items_in_batch.device == device or num_items_in_batch.device.type != "cpu":
            return num_items_in_batch.to(device)
        num_items_in_batch = num_items_in_batch.item()  # on the host, which nobody waits for
    if num_items_in_batch == 0:  # as a number it would be refused
        return torch.zeros((), device=device)
    return num_items_in_batch


def _before_forward(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Note how often the loss has been called in this thread."""
    if not torch.compiler.is_compiling():
        _calls.before = [*getattr(_calls, "before", ()), getattr(_calls, "count", 0)]


def _after_forward(model: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    """Warn once where labels were given and the loss was not called: somebody else computes it."""
    if torch.compiler.is_compiling() or not getattr(_calls, "before", ()):
        return
    *_calls.before, before = _calls.before
    labelled = kwargs.get("labels") is not None and output is not None  # None after an error
    compiled = hasattr(model.forward, "_torchdynamo_orig_callable")
    if not labelled or compiled or getattr(_calls, "count", 0) > before or not _is_patched(model):
        return
    for hook in vars(model).pop(HOOKS, ()):
        hook.remove()
    warnings.warn(
        f"{type(model).__name__} was given labels and did not call the loss that "
        "fused_ce.integrations.transformers.patch has set: whoever drives it, a trainer of TRL "
        "say, computes the loss itself, and patch has no effect there",
        stacklevel=2,
    )


def _is_patched(inner: PreTrainedModel) -> bool:
    return BEFORE in vars(inner) and vars(inner).get(CURRENT) is causal_lm_loss


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside torch.compile, PEFT, data parallelism and the like."""
    inner = model
    while not isinstance(inner, PreTrainedModel):
        outer = inner
        if isinstance(getattr(outer, "_orig_mod", None), nn.Module):  # torch.compile
            inner = outer._orig_mod
        elif callable(getattr(outer, "get_base_model", None)):  # PEFT
            inner = outer.get_base_model()
        elif isinstance(getattr(outer, "module", None), nn.Module):  # data parallelism
            inner = outer.module
        if inner is outer:
            raise TypeError(
                f"need a causal language model of transformers, got {type(model).__name__}"
            )
    return inner


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    """The model inside, if the loss of its class is that of a causal language model."""
    inner = _unwrapped(model)
    name = type(inner).__name__
    if not _forward_reads(type(inner), "loss_function"):
        raise TypeError(
            f"need a model whose forward calls self.loss_function, got {name}, which computes its "
            "loss elsewhere or has none"
        )
    loss = LOSS_MAPPING.get(getattr(inner, "loss_type", None), ForCausalLMLoss)
    if loss not in (ForCausalLMLoss, LOSS_MAPPING["ForCausalLM"]):
        raise TypeError(
            f"need a model whose loss is {ForCausalLMLoss.__name__}, got {name}, whose loss is "
            f"{loss.__name__}"
        )
    return inner


def _forward_reads(cls: type, attribute: str) -> bool:
    """Whether forward names an attribute: itself, in methods that it calls, or by super."""
    pending, seen = ["forward"], set()
    while pending:
        method = pending.pop()
        seen.add(method)
        for owner in cls.__mro__:
            code = getattr(inspect.unwrap(vars(owner).get(method)), "__code__", None)
            if code is None:
                continue
            names = _names(code)
            if attribute in names:
                return True
            pending += names - seen
            if "super" not in names:
                break
    return False


def _names(code: CodeType) -> set[str]:
    """The attributes and globals that a function reads, those of the functions in it included."""
    inside = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inside)
