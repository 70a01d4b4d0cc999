"""Logits and targets of a case: several of them, so that no call finds its own in a cache."""

import functools

import torch

from benchmarks.cases import DTYPES, Case
from benchmarks.providers import Provider

IGNORE_INDEX = -100
CACHES = 4  # the inputs together are this many times the L2 cache
MOST = 1024  # enough for the smallest case: 1,024 x 65 float32 are 273 MB


class Inputs:
    """Distinct inputs of one case, handed out in turn to all providers."""

    def __init__(self, case: Case, device: torch.device, count: int | None = None):
        """Draw them: logits with a standard deviation of 2, as a trained model's."""
        self.case = case
        generator = torch.Generator(device).manual_seed(0)
        count = _how_many(case, device) if count is None else count
        self.pristine = [_logits(case, device, generator) for _ in range(count)]
        self.targets = [_targets(case, device, generator) for _ in range(count)]
        self._fresh: list[torch.Tensor] | None = None
        self._used: set[int] = set()
        self._turn = 0

    def __len__(self) -> int:
        """How many there are."""
        return len(self.pristine)

    @property
    def first(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits and targets that results are checked on."""
        return self.pristine[0], self.targets[0]

    @property
    def needs_grad(self) -> bool:
        """Whether the case has a gradient."""
        return self.case.kind != "forward"

    def rewind(self) -> None:
        """Begin again with the first."""
        self._turn = 0

    def take(self, provider: Provider) -> tuple[torch.Tensor, torch.Tensor]:
        """The next logits and targets; for one that overwrites them a copy, made outside the time.

        All copies are renewed at once, when one is due that was used: the first of them are then
        as far from the cache as other inputs are.
        """
        index, self._turn = self._turn % len(self), self._turn + 1
        logits = self.pristine[index]
        if provider.overwrites(self.case):
            self._fresh = self._fresh or [_like(logits) for logits in self.pristine]
            if not self._used or index in self._used:
                for fresh, pristine in zip(self._fresh, self.pristine, strict=True):
                    fresh.copy_(pristine)
                self._used.clear()
            self._used.add(index)
            logits = self._fresh[index]
        return logits.detach().requires_grad_(self.needs_grad), self.targets[index]


class LinearInputs:
    """Hidden states, the weight of a head and targets: one set, whose weight fills any cache."""

    def __init__(self, case: Case, device: torch.device):
        """Draw them, so that logits have a standard deviation of 2."""
        self.case = case
        generator = torch.Generator(device).manual_seed(0)
        draw = functools.partial(
            torch.randn, generator=generator, device=device, dtype=DTYPES[case.dtype]
        )
        hidden = draw(case.n_rows, case.hidden_size)
        weight = draw(case.vocab_size, case.hidden_size).mul_(2 / case.hidden_size**0.5)
        self.first = hidden, weight, _targets(case, device, generator)

    def rewind(self) -> None:
        """Begin again with the first, which is all."""

    def take(self, provider: Provider) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, weight and targets; no provider overwrites them."""
        hidden, weight, targets = self.first
        return hidden.detach().requires_grad_(), weight.detach().requires_grad_(), targets


def inputs_of(case: Case, device: torch.device, count: int | None = None) -> Inputs | LinearInputs:
    """Those of its kind."""
    return LinearInputs(case, device) if case.kind == "linear" else Inputs(case, device, count)


def _how_many(case: Case, device: torch.device) -> int:
    """One on a CPU: there the logits of a small model are in cache when its loss reads them."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST, max(1, -(-CACHES * cache // case.logits_bytes)))


def _logits(case, device, generator):
    wide = case.vocab_size + (3 if case.sliced else 0)
    logits = torch.randn(
        case.n_rows, wide, generator=generator, device=device, dtype=DTYPES[case.dtype]
    ).mul_(2)
    return logits[:, 1 : 1 + case.vocab_size] if case.sliced else logits


def _targets(case, device, generator):
    targets = torch.randint(case.vocab_size, (case.n_rows,), generator=generator, device=device)
    ignored = torch.randperm(case.n_rows, generator=generator, device=device)[: case.n_ignored]
    return targets.index_fill_(0, ignored, IGNORE_INDEX)


def _like(logits):
    """Uninitialised, with the same strides and the same alignment: of a slice, a slice."""
    if logits.is_contiguous():
        return torch.empty_like(logits)
    skew, row_stride = logits.storage_offset(), logits.stride(0)
    storage = logits.new_empty(skew + logits.shape[0] * row_stride)
    return storage.as_strided(logits.shape, logits.stride(), skew)
