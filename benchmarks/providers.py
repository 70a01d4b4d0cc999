"""Who is compared: every provider of the loss, and how its documentation says to call it."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.cases import KINDS, Case
from fused_ce import fused_cross_entropy, fused_linear_cross_entropy

OURS, EAGER, COMPILED = "fused_ce", "torch", "torch.compile"
IN_CHUNKS = "torch.linear_cross_entropy"
GRADIENT = ("forward_backward", "separate_backward")


@dataclass(frozen=True)
class Provider:
    """A loss to call as f(logits, targets), the mean over the targets that are not -100.

    For the kind "linear" as f(hidden, weight, targets).
    """

    make: Callable[[Case], Callable]
    kinds: tuple[str, ...]  # those of cases.KINDS that it has a form of
    package: str | None = None  # what has to be installed
    needs_gpu: bool = False
    needs: str | None = None  # of torch.nn, which an older torch has not
    overwrites: Callable[[Case], bool] = lambda case: False  # the logits: it needs them fresh

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.needs_gpu and device.type == "cpu":
            return f"{self.package} needs a GPU"
        if self.needs and not hasattr(torch.nn, self.needs):
            return f"torch {torch.__version__} has no nn.{self.needs}"
        return None


def _ours(case: Case) -> Callable:
    if case.kind == "linear":
        return fused_linear_cross_entropy
    return functools.partial(
        fused_cross_entropy,
        inplace=case.kind == "in_place",
        grad_in_forward=case.kind != "separate_backward",
    )


def _linear_then_loss(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets)


def _eager(case: Case) -> Callable:
    return _linear_then_loss if case.kind == "linear" else F.cross_entropy


@functools.lru_cache(maxsize=1)
def _compiled_for(shape: Case) -> Callable:
    # One shape, one compilation: dynamic shapes, to which torch goes over at the second one it
    # sees, would hurt it.
    torch.compiler.reset()
    return torch.compile(_eager(shape), dynamic=False)


def _in_chunks(case: Case) -> Callable:
    options = torch.nn.LinearCrossEntropyOptions()
    return functools.partial(F.linear_cross_entropy, options=options)


def _liger(case: Case) -> Callable:
    liger = importlib.import_module("liger_kernel.transformers.functional")
    if case.kind == "linear":
        return liger.liger_fused_linear_cross_entropy
    return liger.liger_cross_entropy


def _quack(case: Case) -> Callable:
    if case.kind == "linear":
        return importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    quack = importlib.import_module("quack")
    return functools.partial(quack.cross_entropy, inplace_backward=case.kind == "in_place")


def _cut_cross_entropy(case: Case) -> Callable:
    # Its filter takes small probabilities for 0: of random logits these are nearly all.
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return functools.partial(function, filter_eps=None)


PROVIDERS = {
    OURS: Provider(
        _ours,
        kinds=KINDS,
        overwrites=lambda case: case.kind == "in_place",
    ),
    EAGER: Provider(_eager, kinds=("forward", *GRADIENT, "linear")),
    COMPILED: Provider(
        lambda case: _compiled_for(case.shape), kinds=("forward", *GRADIENT, "linear")
    ),
    IN_CHUNKS: Provider(_in_chunks, kinds=("linear",), needs="LinearCrossEntropyOptions"),
    # Liger has one form: its forward writes the gradient over the logits, if they need one.
    "liger": Provider(
        _liger,
        kinds=KINDS,
        package="liger_kernel",
        needs_gpu=True,
        overwrites=lambda case: case.kind not in ("forward", "linear"),
    ),
    "quack": Provider(
        _quack,
        kinds=KINDS,
        package="quack",
        needs_gpu=True,
        overwrites=lambda case: case.kind == "in_place",
    ),
    "cut_cross_entropy": Provider(
        _cut_cross_entropy, kinds=("linear",), package="cut_cross_entropy", needs_gpu=True
    ),
}


def missing(device: torch.device) -> dict[str, str]:
    """The providers that cannot run here, each with the reason."""
    reasons = {name: provider.missing(device) for name, provider in PROVIDERS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def offering(case: Case, device: torch.device) -> dict[str, Provider]:
    """The providers that can run a case here."""
    return {
        name: provider
        for name, provider in PROVIDERS.items()
        if case.kind in provider.kinds and not provider.missing(device)
    }
