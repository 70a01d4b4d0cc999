"""Every check of arguments and every error; arguments as rows and options; the answer's shape."""

import math
import numbers
import os
from typing import Any, NamedTuple

import torch

from fused_ce.options import LossOptions
from fused_ce.rows import Rows, as_rows
from fused_ce.stats import CrossEntropyStats
from fused_ce.tracing import PLAIN_DISPATCH, as_index, jit_trace_paused

LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGET_DTYPES = (
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
REDUCTIONS = ("mean", "sum", "none")


class Call(NamedTuple):
    """Checked arguments: rows, options, the shape of a loss per target, and the class axis."""

    rows: Rows
    options: LossOptions
    batch_shape: tuple[int, ...]
    dim: int

    def returned(
        self, results: tuple[torch.Tensor, ...]
    ) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]:
        """What the user gets for (loss, losses, lse, entropy, predictions) of rows, or (loss,)."""
        if len(results) == 1 and self.options.reduction != "none":
            return results[0]
        loss, stats = results[0], list(results[1:])  # of `*stats` torch 2.11's Dynamo makes a tuple
        if stats and self.options.reduction == "none":
            stats[0] = loss.clone()  # or what the user does to one in place would change the other
        stats = [of_rows.view(self.batch_shape) for of_rows in stats]
        loss = loss.view(self.batch_shape) if self.options.reduction == "none" else loss
        return (loss, CrossEntropyStats(*stats)) if stats else loss


def prepare(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    sample_weight: torch.Tensor | None,
    dim: int | None,
    options: LossOptions,
) -> Call:
    """Check everything that the host can see without reading a tensor, and make rows of it."""
    if torch.jit.is_tracing():
        return _prepare_for_jit(logits, targets, weight, sample_weight, dim, options)
    _check_tensors(logits, targets, weight, sample_weight)
    check_options(options)
    if logits.dim() == 1 and targets.shape == (1,) and not targets.is_floating_point():
        targets = targets[0]  # torch takes (C,) with (1,) too, and gives a loss of shape ()
        if sample_weight is not None and sample_weight.shape == (1,):
            sample_weight = sample_weight[0]
    dim = class_axis(logits.shape, targets.shape, dim, targets.is_floating_point())
    vocab_size = logits.shape[dim]
    batch_shape = logits.shape[:dim] + logits.shape[dim + 1 :]
    _check_weights(logits, targets, weight, sample_weight, vocab_size, batch_shape)
    if targets.is_floating_point() and options.ignore_index >= 0:
        raise ValueError(
            f"ignore_index needs targets of class indices, got {options.ignore_index} with "
            "probabilities: to leave rows out, give them a sample_weight of 0"
        )
    normalizer = None
    if options.normalizer is not None:
        normalizer, options = _checked_normalizer(options, logits.device)
    if sample_weight is not None:
        sample_weight = sample_weight.flatten()
    rows = Rows(*as_rows(logits, targets, dim), weight, sample_weight, normalizer)
    return Call(rows, _with_plain_numbers(options), batch_shape, dim)


def _prepare_for_jit(logits, targets, weight, sample_weight, dim, options) -> Call:
    """For `torch.jit.trace`, which records operations: rows of later calls, however many.

    The arguments are checked on the values that it traces with, unrecorded. No later value is
    looked at: a target out of range then makes its row NaN.
    """
    with jit_trace_paused():
        checked = prepare(logits, targets, weight, sample_weight, dim, options)
        check_targets_on_host(checked.rows, checked.options, "reference")
        if checked.rows.has_no_classes:
            raise ValueError(f"a trace needs at least one class, got {tuple(logits.shape)}")

    def of_classes(tensor):  # (1, n_rows, V)
        tensor = tensor.movedim(checked.dim, -1)
        return (tensor[None] if tensor.dim() == 1 else tensor.flatten(0, -2))[None]

    probabilities = targets.is_floating_point()
    rows = checked.rows._replace(
        logits=of_classes(logits),
        targets=of_classes(targets) if probabilities else targets.flatten()[None],
        sample_weight=None if sample_weight is None else sample_weight.flatten(),
    )
    if isinstance(options.normalizer, torch.Tensor):
        rows = rows._replace(normalizer=options.normalizer.detach().to(logits.device))
    if isinstance(options.ignore_index, torch.Tensor):
        of_call = options.ignore_index.to(logits.device).flatten()
        options = checked.options._replace(
            ignore_index=of_call  # type: ignore[arg-type]  # as an int it would be a constant
        )
        checked = checked._replace(options=options)
    return checked._replace(rows=rows, batch_shape=logits.select(checked.dim, 0).shape)


def check_options(options: LossOptions) -> None:
    """Raise TypeError or ValueError for what no logits could make right."""
    if options.reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {options.reduction!r}')
    _check_number("label_smoothing", options.label_smoothing)
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {options.label_smoothing}")
    _check_ignore_index(options.ignore_index)
    for name, value in (("z_loss", options.z_loss), ("logit_scale", options.logit_scale)):
        _check_number(name, value)
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    if options.softcap is not None:
        _check_number("softcap", options.softcap, " or None")
        if not 0.0 < options.softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, got {options.softcap}")
    if options.normalizer is not None:
        _check_normalizer(options.normalizer, options.reduction)
    for name, value in (("inplace", options.inplace), ("return_stats", options.return_stats)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if not (options.grad_in_forward is None or isinstance(options.grad_in_forward, bool)):
        raise TypeError(
            f"grad_in_forward must be None, True or False, got {options.grad_in_forward!r}"
        )


def _check_number(name: str, value: object, or_else: str = "") -> None:
    if type(value) is float:  # as nearly always: the question below takes longer
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        got = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
        hint = "; it gets no gradient: pass .item()" if isinstance(value, torch.Tensor) else ""
        raise TypeError(f"{name} must be a number{or_else}, got {got}{hint}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a number beyond float64") from None


def _check_ignore_index(value: Any) -> None:
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            value = as_index(value)
        except TypeError:  # a tensor of several elements, or a floating one, among others
            got = value if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"ignore_index must be an int, got {got}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {value}")


def _check_normalizer(normalizer: float | torch.Tensor, reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(
            f'normalizer replaces what "mean" divides by, got reduction={reduction!r}: '
            'divide that yourself, or pass reduction="mean"'
        )
    if not isinstance(normalizer, torch.Tensor):
        _check_number("normalizer", normalizer, " or a 0-d tensor")
        if not 0.0 < normalizer < math.inf:
            raise ValueError(f"normalizer must be positive and finite, got {normalizer}")
    elif normalizer.dim() != 0:
        raise ValueError(f"normalizer must be a 0-d tensor, got {tuple(normalizer.shape)}")
    elif normalizer.is_complex() or normalizer.dtype == torch.bool:
        raise TypeError(f"normalizer must be a real number, got {normalizer.dtype}")
    elif normalizer.requires_grad and torch.is_grad_enabled():
        raise ValueError("normalizer gets no gradient: pass normalizer.detach()")


def _checked_normalizer(
    options: LossOptions, device: torch.device
) -> tuple[torch.Tensor | None, LossOptions]:
    """The normalizer as a tensor on the device, or None and as a float in the options."""
    normalizer = options.normalizer
    if not isinstance(normalizer, torch.Tensor):
        return None, options
    if normalizer.device == device:
        return normalizer.detach(), options._replace(normalizer=None)
    if normalizer.device.type == "cpu":  # the host has its value already
        number = normalizer.item()
        _check_normalizer(number, options.reduction)
        return None, options._replace(normalizer=number)
    raise ValueError(f"logits on {device} need normalizer there, got {normalizer.device}")


def _with_plain_numbers(options: LossOptions) -> LossOptions:
    """The options without NumPy's numbers, say, which a kernel cannot take."""
    plain = (float, type(None))
    if (
        type(options.label_smoothing) is type(options.z_loss) is type(options.logit_scale) is float
        and type(options.softcap) in plain
        and type(options.normalizer) in plain
        and type(options.ignore_index) is int
    ):  # as nearly always
        return options
    names = ("label_smoothing", "z_loss", "logit_scale", "softcap", "normalizer")
    changed: dict[str, Any] = {
        name: float(value)
        for name in names
        if (value := getattr(options, name)) is not None and type(value) is not float
    }
    if type(options.ignore_index) is not int:
        changed["ignore_index"] = as_index(options.ignore_index)
    return options._replace(**changed)


def class_axis(
    logits_shape: torch.Size,
    targets_shape: torch.Size,
    dim: int | None,
    probabilities: bool = False,
) -> int:
    """The class axis of the logits: `dim` if given, else the one that the targets' shape leaves."""
    if len(logits_shape) == 2 and dim is None and targets_shape == logits_shape[:1]:
        return 1  # as nearly always
    shape, got = tuple(logits_shape), tuple(targets_shape)
    if len(shape) == 0:
        raise ValueError("logits need a class axis, got a 0-d tensor")
    if dim is not None:
        if isinstance(dim, bool) or not hasattr(dim, "__index__"):
            raise TypeError(f"dim must be an int or None, got {dim!r}")
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"dim={dim} is out of range for logits {shape}")
        dim %= len(shape)
    if probabilities:
        if got != shape:
            raise ValueError(f"logits {shape} need probabilities {shape}, got {got}")
        if dim is None and len(shape) > 2:
            raise ValueError(
                f"logits {shape} with probabilities could have their classes on axis 1, as torch "
                "reads them, or on the last axis, as language models do: pass dim=1 or dim=-1"
            )
        return len(shape) - 1 if dim is None else dim
    if dim is not None:
        others = shape[:dim] + shape[dim + 1 :]
        if got != others:
            raise ValueError(f"logits {shape} with dim={dim} need targets {others}, got {got}")
        return dim
    last, second = shape[:-1], shape[:1] + shape[2:]  # what (..., V) and (N, C, d1, ...) leave
    if len(shape) <= 2:
        second = last
    if got == last == second and len(shape) > 2:
        raise ValueError(
            f"logits {shape} with targets {got} could have their classes on axis 1, as torch reads "
            "them, or on the last axis, as language models do: pass dim=1 or dim=-1"
        )
    if got == last:
        return len(shape) - 1
    if got == second:
        return 1
    need = f"{last}" if last == second else f"{last} (classes last) or {second} (classes on axis 1)"
    hint = ""
    if got == shape:
        hint = (
            " of an integer dtype: one-hot targets become class indices by targets.argmax(-1), or "
            "probabilities by targets.float()"
        )
    raise ValueError(f"logits {shape} need targets {need}, got {got}{hint}")


def _check_tensors(logits, targets, weight, sample_weight) -> None:
    for name, value in (("logits", logits), ("targets", targets)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
    if logits.dtype not in LOGITS_DTYPES:
        hint = ""
        if logits.dtype in TARGET_DTYPES and targets.dtype in LOGITS_DTYPES:
            hint = f" with targets of {targets.dtype}: are they exchanged? logits come first"
        raise TypeError(
            f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}{hint}"
        )
    if targets.dtype not in TARGET_DTYPES:
        shape, got = tuple(logits.shape), tuple(targets.shape)
        need = (
            "targets must be class indices of an integer dtype, or probabilities of the logits' "
            f"shape {shape}, got {targets.dtype} {got}"
        )
        if targets.dtype not in LOGITS_DTYPES:
            hint = ": pass targets.float()" if targets.dtype == torch.bool else ""
            raise TypeError(need + hint)
        if targets.shape != logits.shape:
            hint = ": class indices come from targets.long()" if len(got) < len(shape) else ""
            raise ValueError(need + hint)
    if weight is None and sample_weight is None:
        return
    for name, value in (("weight", weight), ("sample_weight", sample_weight)):
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {value.dtype}: pass {name}.float()")


def _check_weights(logits, targets, weight, sample_weight, vocab_size, batch_shape) -> None:
    device = logits.device
    if weight is None and sample_weight is None and targets.device == device:
        return
    if weight is not None and tuple(weight.shape) != (vocab_size,):
        raise ValueError(
            f"{vocab_size} classes need weight ({vocab_size},), got {tuple(weight.shape)}"
        )
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight gets no gradient: pass weight.detach()")
    if sample_weight is not None and sample_weight.shape != batch_shape:
        need, got, hint = tuple(batch_shape), tuple(sample_weight.shape), ""
        if got and got == need[: len(got)]:  # one per sequence, where one per token is needed
            axes = ", ".join([":"] * len(got) + ["None"] * (len(need) - len(got)))
            hint = f"; to repeat them, pass sample_weight[{axes}].expand{need}"
        raise ValueError(
            f"logits {tuple(logits.shape)} need one factor per target, sample_weight {need}, "
            f"got {got}{hint}"
        )
    others = (("targets", targets), ("weight", weight), ("sample_weight", sample_weight))
    for name, tensor in others:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"logits on {device} need {name} there, got {tensor.device}")


def check_memory(rows: Rows) -> None:
    """Raise TypeError for tensors whose elements are not where a plain tensor has them."""
    plain = torch.Tensor, type(None)
    if all([type(tensor) in plain for tensor in rows]):  # in half the time of a generator
        return
    for name, tensor in zip(Rows._fields, rows, strict=True):
        kind = type(tensor)
        if tensor is None or kind is torch.Tensor:
            continue
        if kind.__torch_dispatch__ is not PLAIN_DISPATCH:  # type: ignore[union-attr]  # no None
            raise TypeError(
                f"{name} must be a plain tensor, got a {kind.__name__}, which computes by itself: "
                "pass what it holds (to_local() of a DTensor), or use backend('reference')"
            )


def check_overwritable(logits: torch.Tensor) -> None:
    """Raise ValueError where the operation behind the logits keeps them for its own gradient.

    Autograd would find out in its backward, and could not say which argument to change.
    """
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return
    root = logits if logits._base is None else logits._base
    operation = root.grad_fn
    for name in ("_saved_result", "_saved_output"):
        if operation is not None and getattr(operation, name, None) is not None:
            raise ValueError(
                f"inplace=True would overwrite logits that {operation.name()} keeps for its own "
                "gradient: pass inplace=False, or a clone; a cap by tanh is softcap= here"
            )


def check_targets_on_host(rows: Rows, options: LossOptions, name: str) -> None:
    """`check_in_range` of a call's targets: never on a GPU unless FUSED_CE_DEBUG asks for it.

    The CPU's own implementation looks at them anyway, and has no need of this.
    """
    looks_itself = name == "cpu" and not rows.has_no_classes
    if rows.has_probabilities or looks_itself or torch.jit.is_tracing():
        return
    on_host = name != "triton" and rows.targets.device.type == "cpu"
    if on_host or os.environ.get("FUSED_CE_DEBUG") == "1":
        check_in_range(rows.targets.reshape(-1).long(), rows.logits.shape[2], options.ignore_index)


def check_in_range(targets: torch.Tensor, vocab_size: int, ignore_index: int) -> tuple[int, int]:
    """(lowest, highest) of int64 targets (n_rows,), (0, -1) of none.

    Raises:
        IndexError: with row and value of the first that is no class and not ignored.
    """
    if targets.numel() == 0:
        return 0, -1
    lowest, highest = (int(bound) for bound in torch.aminmax(targets))
    if lowest < 0 or highest >= vocab_size:
        wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(
                f"target {int(targets[row])} of row {row} is out of range: need 0 <= target < "
                f"{vocab_size}, or ignore_index ({ignore_index})"
            )
    return lowest, highest
