"""Seen as torch's own functions are: modes, proxies and subclasses get one call to look at."""

from collections.abc import Callable, Sequence

import torch
from torch.overrides import handle_torch_function


def overridden(
    function: Callable[..., object], relevant: Sequence[object], *args: object, **kwargs: object
) -> object:
    """What `__torch_function__` of a mode or of one of the `relevant` arguments makes of a call.

    Raises:
        TypeError: nobody computes it.
    """
    if kwargs["return_stats"] and not torch._C._is_torch_function_mode_enabled():
        # Tensor's own way with results, which makes a named tuple from one iterable.
        kinds = {type(value) for value in relevant if isinstance(value, torch.Tensor)} - {
            torch.Tensor
        }
        if len(kinds) == 1 and _is_plain(*kinds):
            with torch._C.DisableTorchFunctionSubclass():
                loss, stats = function(*args, **kwargs)
            (kind,) = kinds
            return loss.as_subclass(kind), type(stats)(*(stat.as_subclass(kind) for stat in stats))
    return handle_torch_function(function, relevant, *args, **kwargs)


def _is_plain(kind: type) -> bool:
    """Whether a subclass leaves `__torch_function__` to Tensor."""
    plain = torch.Tensor.__torch_function__.__func__
    return getattr(kind.__torch_function__, "__func__", None) is plain
