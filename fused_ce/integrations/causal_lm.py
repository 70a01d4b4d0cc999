"""Which model of transformers is inside a module, and whether its loss is a language model's."""

import inspect
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside torch.compile, PEFT, data parallelism and the like."""
    inner: Any = model
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


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The model inside, if the loss of its class is that of a causal language model."""
    inner = unwrapped(model)
    name = type(inner).__name__
    if not _forward_reads(type(inner), "loss_function"):
        raise TypeError(
            f"need a model whose forward calls self.loss_function, got {name}, which computes its "
            "loss elsewhere or has none"
        )
    loss = LOSS_MAPPING.get(str(getattr(inner, "loss_type", None)), ForCausalLMLoss)
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
            found = vars(owner).get(method)
            code = getattr(inspect.unwrap(found), "__code__", None) if found is not None else None
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
