"""The loss as `torch.nn` modules."""

from typing import TYPE_CHECKING, Any, Generic, Literal, overload

import torch
from torch import nn
from typing_extensions import TypeVar

from fused_ce.arguments import check_options
from fused_ce.cross_entropy import fused_cross_entropy
from fused_ce.linear_arguments import check_cutting
from fused_ce.linear_cross_entropy import fused_linear_cross_entropy
from fused_ce.options import LossOptions
from fused_ce.stats import CrossEntropyStats

# What a module returns, by the `return_stats` that it was made with.
Returned = TypeVar(
    "Returned",
    bound=torch.Tensor | tuple[torch.Tensor, CrossEntropyStats],
    default=torch.Tensor,
)

OPTIONS = (
    "ignore_index", "reduction", "label_smoothing", "dim", "normalizer", "z_loss", "logit_scale",
    "softcap", "inplace", "grad_in_forward", "return_stats",
)  # fmt: skip

LINEAR_OPTIONS = (
    *(name for name in OPTIONS if name not in ("dim", "inplace")),
    "logits_dtype", "skip_ignored", "chunk_size",
)  # fmt: skip


class FusedCrossEntropyLoss(nn.CrossEntropyLoss, Generic[Returned]):
    """`torch.nn.CrossEntropyLoss` computed by `fused_cross_entropy`.

    Takes that class's arguments, in its order, and those of `fused_cross_entropy` as keywords;
    being a subclass, it stands wherever the original is expected and shares its `state_dict`.
    Called as `module(logits, targets, sample_weight=..., normalizer=...)`, both optional.

    Args:
        weight: (C,), floating, or None; a buffer of the module.
        size_average: deprecated by torch; use `reduction`.
        ignore_index: rows with this target count nothing.
        reduce: deprecated by torch; use `reduction`.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        dim: the class axis of the logits; None lets the shape of the targets decide.
        normalizer: what "mean" divides by instead; `forward` takes one for its call, too.
        z_loss: adds `z_loss * lse**2` to every row that is not ignored.
        logit_scale: multiplies the logits first.
        softcap: then takes `softcap * tanh(logits / softcap)` of them.
        inplace: let the gradient overwrite the storage of the logits.
        grad_in_forward: compute the gradient with the loss; None chooses.
        return_stats: return `(loss, CrossEntropyStats)`.

    Raises:
        TypeError, ValueError: an option is not what `fused_cross_entropy` takes.
    """

    @overload
    def __init__(
        self: "FusedCrossEntropyLoss[torch.Tensor]", weight: torch.Tensor | None = None,
        size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None,
        reduction: str = "mean", label_smoothing: float = 0.0, *, dim: int | None = None,
        normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0,
        logit_scale: float = 1.0, softcap: float | None = None, inplace: bool = False,
        grad_in_forward: bool | None = None, return_stats: Literal[False] = False,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: "FusedCrossEntropyLoss[tuple[torch.Tensor, CrossEntropyStats]]",
        weight: torch.Tensor | None = None, size_average: bool | None = None,
        ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
        label_smoothing: float = 0.0, *, dim: int | None = None,
        normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0,
        logit_scale: float = 1.0, softcap: float | None = None, inplace: bool = False,
        grad_in_forward: bool | None = None, return_stats: Literal[True],
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: "FusedCrossEntropyLoss[torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]]",
        weight: torch.Tensor | None = None, size_average: bool | None = None,
        ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
        label_smoothing: float = 0.0, *, dim: int | None = None,
        normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0,
        logit_scale: float = 1.0, softcap: float | None = None, inplace: bool = False,
        grad_in_forward: bool | None = None, return_stats: bool,
    ) -> None: ...  # fmt: skip
    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dim: int | None = None,
        normalizer: float | torch.Tensor | None = None,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        inplace: bool = False,
        grad_in_forward: bool | None = None,
        return_stats: bool = False,
    ) -> None:
        """Store the options; `forward` reads the attributes, so they may be changed later."""
        if not (weight is None or isinstance(weight, torch.Tensor)):
            hint = ""
            if isinstance(weight, int) and not isinstance(weight, bool):
                hint = f"; ignore_index is a keyword here, as in torch: ignore_index={weight}"
            raise TypeError(f"weight must be a torch.Tensor or None, got {weight!r}{hint}")
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.dim = dim
        self.normalizer = normalizer
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.inplace = inplace
        self.grad_in_forward = grad_in_forward
        self.return_stats = return_stats
        options = self._options()
        del options["dim"]
        check_options(LossOptions(**options))

    if TYPE_CHECKING:  # nn.Module's takes and returns anything

        def __call__(
            self, input: torch.Tensor, target: torch.Tensor, *,
            sample_weight: torch.Tensor | None = None,
            normalizer: float | torch.Tensor | None = None,
        ) -> Returned:  # fmt: skip
            """`forward`, and the hooks of the module."""
            ...

    def forward(  # type: ignore[override]  # where torch's returns a tensor, always
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        *,
        sample_weight: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
    ) -> Returned:
        """The loss of logits and targets; the names are torch's, all else is the function's."""
        options = self._options()
        if normalizer is not None:
            options["normalizer"] = normalizer
        return fused_cross_entropy(
            input, target, self.weight, sample_weight=sample_weight, **options
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` asks for; it cannot compile what calls kernels."""
        raise RuntimeError(
            "torch.jit.script cannot compile FusedCrossEntropyLoss: keep it outside of what is "
            "scripted, or use torch.nn.CrossEntropyLoss; torch.compile and torch.jit.trace take it"
        )

    def extra_repr(self) -> str:
        """What `print(module)` shows between the brackets."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}


class FusedLinearCrossEntropyLoss(nn.Module, Generic[Returned]):
    """`fused_linear_cross_entropy` as a module, which holds the options and the class weights.

    The weight of the head belongs to the model. Arguments are those of the function, as keywords.

    Raises:
        TypeError, ValueError: an option is not what `fused_linear_cross_entropy` takes.
    """

    weight: torch.Tensor | None

    @overload
    def __init__(
        self: "FusedLinearCrossEntropyLoss[torch.Tensor]", *, weight: torch.Tensor | None = None,
        ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
        normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0,
        logit_scale: float = 1.0, softcap: float | None = None, grad_in_forward: bool | None = None,
        return_stats: Literal[False] = False, logits_dtype: torch.dtype | None = None,
        skip_ignored: bool | None = None, chunk_size: int | None = None,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: "FusedLinearCrossEntropyLoss[tuple[torch.Tensor, CrossEntropyStats]]", *,
        weight: torch.Tensor | None = None, ignore_index: int = -100, reduction: str = "mean",
        label_smoothing: float = 0.0, normalizer: float | torch.Tensor | None = None,
        z_loss: float = 0.0, logit_scale: float = 1.0, softcap: float | None = None,
        grad_in_forward: bool | None = None, return_stats: Literal[True],
        logits_dtype: torch.dtype | None = None, skip_ignored: bool | None = None,
        chunk_size: int | None = None,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: "FusedLinearCrossEntropyLoss[torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]]",
        *, weight: torch.Tensor | None = None, ignore_index: int = -100, reduction: str = "mean",
        label_smoothing: float = 0.0, normalizer: float | torch.Tensor | None = None,
        z_loss: float = 0.0, logit_scale: float = 1.0, softcap: float | None = None,
        grad_in_forward: bool | None = None, return_stats: bool,
        logits_dtype: torch.dtype | None = None, skip_ignored: bool | None = None,
        chunk_size: int | None = None,
    ) -> None: ...  # fmt: skip
    def __init__(
        self,
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        normalizer: float | torch.Tensor | None = None,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        grad_in_forward: bool | None = None,
        return_stats: bool = False,
        logits_dtype: torch.dtype | None = None,
        skip_ignored: bool | None = None,
        chunk_size: int | None = None,
    ) -> None:
        """Store the options; `forward` reads the attributes, so they may be changed later."""
        super().__init__()
        if not (weight is None or isinstance(weight, torch.Tensor)):
            raise TypeError(f"weight must be a torch.Tensor or None, got {weight!r}")
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.normalizer = normalizer
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.grad_in_forward = grad_in_forward
        self.return_stats = return_stats
        self.logits_dtype = logits_dtype
        self.skip_ignored = skip_ignored
        self.chunk_size = chunk_size
        of_loss = [name for name in LINEAR_OPTIONS if name in LossOptions._fields]
        check_options(LossOptions(**{name: getattr(self, name) for name in of_loss}))
        check_cutting(skip_ignored, chunk_size)

    if TYPE_CHECKING:  # nn.Module's takes and returns anything

        def __call__(
            self, hidden: torch.Tensor, linear_weight: torch.Tensor, targets: torch.Tensor,
            linear_bias: torch.Tensor | None = None, sample_weight: torch.Tensor | None = None, *,
            normalizer: float | torch.Tensor | None = None,
        ) -> Returned:  # fmt: skip
            """`forward`, and the hooks of the module."""
            ...

    def forward(
        self,
        hidden: torch.Tensor,
        linear_weight: torch.Tensor,
        targets: torch.Tensor,
        linear_bias: torch.Tensor | None = None,
        sample_weight: torch.Tensor | None = None,
        *,
        normalizer: float | torch.Tensor | None = None,
    ) -> Returned:
        """The loss of hidden states and the head that makes logits of them."""
        options = self._options()
        if normalizer is not None:
            options["normalizer"] = normalizer
        return fused_linear_cross_entropy(
            hidden, linear_weight, targets, linear_bias=linear_bias, weight=self.weight,
            sample_weight=sample_weight, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What `print(module)` shows between the brackets."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LINEAR_OPTIONS}
