"""transformers: the loss of a causal language model, set for one model object and taken back."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from fused_ce.cross_entropy import fused_cross_entropy
from fused_ce.integrations.causal_lm import causal_lm, unwrapped
from fused_ce.integrations.deferred import DeferredLogits
from fused_ce.integrations.heads import check_head, fuse, unfuse
from fused_ce.linear_arguments import check_cutting
from fused_ce.linear_cross_entropy import fused_linear_cross_entropy
from fused_ce.stats import CrossEntropyStats

Model = TypeVar("Model", bound=nn.Module)
CURRENT = "_loss_function"  # what the property PreTrainedModel.loss_function reads, if it is there
BEFORE = "_loss_before_fused_ce"  # what was there: (), or a tuple of it alone
SETTINGS = "_settings_of_fused_ce"  # the options of patch
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
    loss, _ = _loss(
        NO_SETTINGS, logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels
    )
    return loss


class Settings(NamedTuple):
    """The options of `patch`."""

    fuse_head: bool = False
    logits_dtype: torch.dtype | None = None
    skip_ignored: bool | None = None
    return_stats: bool = False


NO_SETTINGS = Settings()


class CausalLMLoss:
    """`causal_lm_loss` with options of `patch`, and what it has told last."""

    def __init__(self, settings: Settings):
        """Nothing told yet."""
        self.settings = settings
        self.stats: CrossEntropyStats | None = None

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int | None,
        num_items_in_batch: float | torch.Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """As `causal_lm_loss`; the stats are kept."""
        loss, self.stats = _loss(
            self.settings, logits, labels, vocab_size, num_items_in_batch, ignore_index,
            shift_labels,
        )  # fmt: skip
        return loss

    def __getstate__(self) -> dict[str, object]:
        """A copy or a pickle has computed nothing yet; a part of a graph could not be copied."""
        return {**vars(self), "stats": None}


def patch(
    model: Model,
    *,
    fuse_head: bool = False,
    logits_dtype: torch.dtype | None = None,
    skip_ignored: bool | None = None,
    return_stats: bool = False,
) -> Model:
    """Let this one model compute its loss by `causal_lm_loss`, and no other model.

    With `fuse_head=True` it does so from hidden states, by `fused_linear_cross_entropy`: a forward
    with labels makes no logits, but `DeferredLogits`. Scales, a cap and slices of the token axis
    that a model gives to its logits become options of the loss; whoever looks at them otherwise,
    model or user, has them made then, with gradients, and the loss is that of those.

    A copy or a pickle of the patched model is patched as well; what `from_pretrained` loads is not.
    Patching again sets other options. The first forward with labels that computes its loss
    elsewhere, as TRL's trainers let models do, warns: the patch has no effect there.

    Args:
        model: a causal language model of transformers whose forward calls `self.loss_function`; in
            `torch.compile`, `PeftModel`, `DataParallel`, `DistributedDataParallel` or the like too.
        fuse_head: make no logits for the loss. The model's output embedding has to be an nn.Linear,
            whole when the model computes its loss. A compiled model makes its logits.
        logits_dtype: as in `fused_linear_cross_entropy`; torch.float32 keeps what a head of 16 bits
            would round.
        skip_ignored: as there: True leaves ignored labels out of the matrix products, on a GPU for
            a synchronisation.
        return_stats: leave the `CrossEntropyStats` of the last loss in `model.loss_stats`, (B, T),
            of which entry t tells of the label after token t; gradients flow through them.

    Returns:
        The same object.

    Raises:
        TypeError: the model has another loss, or computes it elsewhere, or has a head that cannot
            be fused; or an option has a wrong type.
        ValueError: an option that needs `fuse_head=True` was given without it.
    """
    settings = Settings(fuse_head, logits_dtype, skip_ignored, return_stats)
    _check(settings)
    inner = causal_lm(model)
    if _is_patched(inner):
        if vars(inner)[SETTINGS] == settings:
            return model
        unpatch(inner)
    if fuse_head:
        check_head(inner)
    attributes = vars(inner)  # assigning raises where an nn.Module has been assigned before
    before = (attributes[CURRENT],) if CURRENT in attributes else ()
    has_options = settings._replace(fuse_head=False) != NO_SETTINGS
    loss = CausalLMLoss(settings) if has_options else causal_lm_loss
    attributes.update({CURRENT: loss, BEFORE: before, SETTINGS: settings})
    if inner.loss_function is not loss:
        unpatch(inner)
        raise TypeError(
            f"need a model with the loss_function of PreTrainedModel, got {type(inner).__name__}, "
            "which has its own"
        )
    if fuse_head or return_stats:
        fuse(inner, defers=fuse_head)
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
    inner = unwrapped(model)
    attributes = vars(inner)
    was_patched = _is_patched(inner)  # or somebody has set another loss since: that one stays
    before = attributes.pop(BEFORE, ())
    if attributes.pop(SETTINGS, None) is not None:
        unfuse(inner)
    for hook in attributes.pop(HOOKS, ()):
        hook.remove()
    if was_patched:
        if before:
            attributes[CURRENT] = before[0]
        else:
            del attributes[CURRENT]
    return model


@contextlib.contextmanager
def patched(
    model: Model,
    *,
    fuse_head: bool = False,
    logits_dtype: torch.dtype | None = None,
    skip_ignored: bool | None = None,
    return_stats: bool = False,
) -> Iterator[Model]:
    """`patch` for the length of a `with`; a model that was patched before it still is afterwards.

    Args:
        model: what `patch` takes, and so are the options.

    Raises:
        TypeError, ValueError: as `patch`.
    """
    inner = unwrapped(model)
    before = vars(inner)[SETTINGS] if _is_patched(inner) else None
    patch(
        model, fuse_head=fuse_head, logits_dtype=logits_dtype, skip_ignored=skip_ignored,
        return_stats=return_stats,
    )  # fmt: skip
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            patch(model, **before._asdict())


def _loss(
    settings: Settings,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None,
    num_items_in_batch: float | torch.Tensor | None,
    ignore_index: int,
    shift_labels: torch.Tensor | None,
) -> tuple[torch.Tensor, CrossEntropyStats | None]:
    """The loss of logits (B, T, V), made or deferred, and with return_stats its stats (B, T)."""
    count_call()
    if shift_labels is None:
        if labels is None:
            raise ValueError("a loss needs labels or shift_labels, got None for both")
        # shifted logits would mean a gradient of the slice, one more buffer of their size
        labels = labels.long()  # of which any holds ignore_index
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
    options: dict[str, Any] = dict(
        ignore_index=ignore_index,
        normalizer=_normalizer(num_items_in_batch, logits.device),
        return_stats=settings.return_stats,
    )
    head = logits.for_loss() if isinstance(logits, DeferredLogits) else None
    if head is None:
        found = fused_cross_entropy(logits, targets, dim=-1, **options)
    else:
        origin, of_logits = head
        options |= of_logits
        hidden, weight, bias = origin.tensors
        is_recorded = origin.is_recorded and torch.is_grad_enabled()
        with origin.surroundings(), torch.set_grad_enabled(is_recorded):
            found = fused_linear_cross_entropy(
                hidden, weight, targets, linear_bias=bias, logits_dtype=settings.logits_dtype,
                skip_ignored=settings.skip_ignored, **options,
            )  # fmt: skip
    return found if settings.return_stats else (found, None)


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


def count_call() -> None:
    """Let the hooks of a forward know that a loss of ours was called in it."""
    if not torch.compiler.is_compiling():
        _calls.count = getattr(_calls, "count", 0) + 1


def _check(settings: Settings) -> None:
    for name in ("fuse_head", "return_stats"):
        if not isinstance(getattr(settings, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(settings, name)!r}")
    check_cutting(settings.skip_ignored, None)
    if settings.logits_dtype is not None and not isinstance(settings.logits_dtype, torch.dtype):
        raise TypeError(
            f"logits_dtype must be a torch.dtype or None, got {settings.logits_dtype!r}"
        )
    for name in ("logits_dtype", "skip_ignored"):
        if getattr(settings, name) is not None and not settings.fuse_head:
            raise ValueError(f"{name} is for a loss without logits: it needs fuse_head=True")


def _before_forward(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Note how often the loss has been called in this thread."""
    if torch.compiler.is_compiling():
        return
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
        "say, computes the loss itself, and patch has no effect there; for a trainer of TRL there "
        "is fused_ce.integrations.trl.patch",
        stacklevel=2,
    )


def _is_patched(inner: nn.Module) -> bool:
    current = vars(inner).get(CURRENT)
    is_ours = current is causal_lm_loss or isinstance(current, CausalLMLoss)
    return BEFORE in vars(inner) and is_ours
