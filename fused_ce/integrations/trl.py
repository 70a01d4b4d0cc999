"""TRL: the head of a trainer's models computed by our linear loss, and taken back."""

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch
import transformers
import trl
from trl.trainer import utils

from fused_ce.integrations.causal_lm import unwrapped
from fused_ce.integrations.transformers import count_call
from fused_ce.linear_chunks import without_autocast
from fused_ce.linear_cross_entropy import fused_linear_cross_entropy
from fused_ce.tracing import is_autocast

if not hasattr(utils, "add_fused_lm_head"):
    raise ImportError(
        f"need trl>=1.15, whose trainers give their models a fused head, got trl {trl.__version__}"
    )

Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # hidden, weight, bias
AnyTrainer = TypeVar("AnyTrainer", bound=transformers.Trainer)
THEIRS = "_ChunkedLogProbFunction"  # the global of TRL by which a fused head names its projection
COMPACT = "_use_triton"  # and by which it asks whether masked positions are left out
ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
)  # fmt: skip
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ROWS_AT_ONCE = 4096  # of a 16-bit head, whose float32 copy is summed
_codes: weakref.WeakKeyDictionary[FunctionType, CodeType] = weakref.WeakKeyDictionary()


class Projection:
    """Hidden states to log-probabilities, called as TRL calls its own: by `apply` alone."""

    def __init__(self, logits_dtype: torch.dtype | None):
        """With the logits of 16-bit operands in another dtype."""
        self.logits_dtype = logits_dtype

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of every row, in float32.

        Gradients flow through the first two. What `outputs` does not name is None.
        """
        if hasattr(weight, "ds_id"):  # of ZeRO-3, which takes it away until backward
            if self.logits_dtype is not None:
                raise TypeError("logits_dtype must be None where ZeRO-3 holds shards of the head")
            return getattr(utils, THEIRS).apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        count_call()
        kind = hidden.device.type
        if is_autocast(kind):
            dtype = torch.get_autocast_dtype(kind)
        else:
            dtype = hidden.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        scale, cap = float(logit_scale) / temperature, None
        if final_logit_softcapping is not None:
            cap = final_logit_softcapping / temperature
        head = hidden, weight, bias
        with without_autocast(hidden.device):
            return self._outputs(head, targets, scale, cap, outputs)

    def _outputs(
        self, head: Head, targets: torch.Tensor, scale: float, cap: float | None,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        needs_stats = any(name in outputs for name in ("entropy", "is_top1", "log_sum_sq_probs"))
        found = self._loss(head, targets, scale, cap, return_stats=needs_stats)
        losses, stats = found
        entropy = log_sum_sq_probs = mean_logits = is_top1 = None
        if "entropy" in outputs:
            entropy = stats.entropy.float()
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                twice = None if cap is None else 2.0 * cap
                _, squares = self._loss(head, targets, 2.0 * scale, twice, return_stats=True)
                log_sum_sq_probs = (squares.lse - 2.0 * stats.lse).float()
            if "mean_logits" in outputs:
                mean_logits = self._mean_logits(head, targets, scale, cap).float()
            if "is_top1" in outputs:  # where the loss is inf or NaN there is no largest logit
                is_top1 = (stats.predictions == targets) & (losses < float("inf"))
        return -losses.float(), entropy, log_sum_sq_probs, mean_logits, is_top1

    def _mean_logits(
        self, head: Head, targets: torch.Tensor, scale: float, cap: float | None
    ) -> torch.Tensor:
        """Over the vocabulary; without a cap that is the logit of the mean row of the weight."""
        if cap is not None:
            smooth = self._loss(head, targets, scale, cap, label_smoothing=1.0, return_stats=True)
            return smooth[1].lse - smooth[0]
        hidden, weight, bias = head
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = sum(rows.sum(0, dtype=dtype) for rows in weight.split(ROWS_AT_ONCE))
        mean = hidden.to(dtype) @ (total / weight.shape[0])
        if bias is not None:
            mean = mean + bias.mean(dtype=dtype)
        return scale * mean

    def _loss(
        self, head: Head, targets: torch.Tensor, scale: float, cap: float | None,
        label_smoothing: float = 0.0, return_stats: bool = False,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """(losses, stats), or (losses, None)."""
        hidden, weight, bias = head
        is_half = hidden.dtype in (torch.float16, torch.bfloat16)
        found = fused_linear_cross_entropy(
            hidden, weight, targets, linear_bias=bias, reduction="none", logit_scale=scale,
            softcap=cap, label_smoothing=label_smoothing, return_stats=return_stats,
            logits_dtype=self.logits_dtype if is_half else None,
        )  # fmt: skip
        return found if isinstance(found, tuple) else (found, None)


def leaves_out(device: torch.device) -> bool:
    """Whether masked positions are left out of the head: where TRL does so, and on a CPU."""
    return device.type == "cpu" or getattr(utils, COMPACT)(device)


# What the names above become in the code of a head. TRL's own code asks for none of these.
NAMES = {None: "_fused_ce_projection", torch.float32: "_fused_ce_projection_float32"}
OF_COMPACT = "_fused_ce_leaves_out"
GLOBALS = {name: Projection(dtype) for dtype, name in NAMES.items()} | {OF_COMPACT: leaves_out}


def patch(trainer: AnyTrainer, logits_dtype: torch.dtype | None = None) -> AnyTrainer:
    """Let the fused heads of this trainer's models compute by `fused_linear_cross_entropy`.

    TRL gives the policy, and the reference model if there is one, a forward of its own. In it the
    projection becomes ours: for these models, whatever wraps them before or after, and for copies
    of them, but for no others. What TRL computes from its outputs stays. Patching twice is
    harmless; the last `logits_dtype` counts. A head that another trainer gives the same model later
    is TRL's again.

    Args:
        trainer: of TRL, one that calls its models with `fused_lm_head=True`: SFT, GRPO, RLOO, DPO,
            KTO and what is derived from them.
        logits_dtype: None, or torch.float32: logits of 16-bit hidden states are summed and kept in
            float32, see `fused_linear_cross_entropy`.

    Returns:
        The same object.

    Raises:
        TypeError: it is no trainer, or its models have no fused head; or `logits_dtype` is neither.
        ImportError: this version of TRL has another head.
    """
    if logits_dtype not in NAMES:
        raise TypeError(f"logits_dtype must be None or torch.float32, got {logits_dtype!r}")
    heads = _heads(trainer)
    for head in heads:
        _check_projection(head)
    for head in heads:
        code = _codes.setdefault(head, head.__code__)
        ours = {THEIRS: NAMES[logits_dtype], COMPACT: OF_COMPACT}
        # Each head is a function of its own, and stays the same object in whatever wraps it.
        head.__globals__.update(GLOBALS)
        head.__code__ = code.replace(co_names=tuple(ours.get(name, name) for name in code.co_names))
    return trainer


def unpatch(trainer: AnyTrainer) -> AnyTrainer:
    """Give the heads back to TRL; a trainer that is not patched stays as it is.

    Args:
        trainer: what `patch` takes.

    Returns:
        The same object.

    Raises:
        TypeError: as `patch`.
    """
    for head in _heads(trainer):
        head.__code__ = _codes.pop(head, head.__code__)
    return trainer


@contextlib.contextmanager
def patched(trainer: AnyTrainer, logits_dtype: torch.dtype | None = None) -> Iterator[AnyTrainer]:
    """`patch` for the length of a `with`; a trainer that was patched before is so afterwards.

    Args:
        trainer: what `patch` takes.
        logits_dtype: as there.

    Raises:
        TypeError, ImportError: as `patch`.
    """
    before = {head: head.__code__ for head in _heads(trainer)}
    patch(trainer, logits_dtype)
    try:
        yield trainer
    finally:
        for head, code in before.items():
            head.__code__ = code


def _heads(trainer: transformers.Trainer) -> list[FunctionType]:
    """The forwards that TRL has made for the models of a trainer."""
    name = type(trainer).__name__
    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"need a trainer of trl>=1.15, got {name}")
    models = trainer.model, getattr(trainer, "ref_model", None)
    heads = []
    for model in models:
        if model is None:
            continue
        inner = unwrapped(model)
        head = _head(inner.forward)
        if head is None:
            raise TypeError(
                f"need a trainer whose models have the fused head of trl>=1.15, got {name} with "
                f"trl {trl.__version__}, whose {type(inner).__name__} has none"
            )
        heads.append(head)
    return heads


def _head(forward: Any) -> FunctionType | None:
    """The function of `add_fused_lm_head` inside the wrappers of a forward."""
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        code = getattr(forward, "__code__", None)
        if code is not None and "fused_lm_head" in code.co_varnames[: _n_arguments(code)]:
            return forward
        forward = getattr(forward, "__wrapped__", None)
    return None


def _n_arguments(code: CodeType) -> int:
    return code.co_argcount + code.co_kwonlyargcount


def _check_projection(head: FunctionType) -> None:
    """Raise for a head whose projection is not called as ours is."""
    is_known = THEIRS in _codes.get(head, head.__code__).co_names
    function = getattr(utils, THEIRS, None)
    if function is not None:  # as in 1.15 without Triton
        module = inspect.getmodule(function)
        arguments = tuple(inspect.signature(function.forward).parameters)[1:]  # not ctx
        is_known &= arguments == ARGUMENTS and getattr(module, "OPTIONAL_OUTPUTS", None) == OUTPUTS
    if not is_known:
        raise ImportError(
            "need a trl whose fused head calls ChunkedLogProbFunction with "
            f"({', '.join(ARGUMENTS)}), as 1.15 and 1.16, got trl {trl.__version__}"
        )
