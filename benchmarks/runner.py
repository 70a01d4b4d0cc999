"""One case: every provider is checked, measured for memory, and timed beside a ceiling."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks import measure
from benchmarks.accuracy import Errors, Exact, WrongResult
from benchmarks.cases import DTYPES, Case
from benchmarks.inputs import Inputs, LinearInputs, inputs_of
from benchmarks.measure import Work
from benchmarks.products import Products
from benchmarks.providers import Provider, missing, offering
from benchmarks.quiet import DISTURBED, Patience
from benchmarks.records import Record

CLONE, READ, PRODUCTS = "clone", "read", "products"  # the machine's own speed, as more providers
WAITED = "the GPU waits for the host: launches are in the time"


class DeviceLost(Exception):
    """After an illegal access nothing runs on the GPU any more in this process."""


def step(loss_fn: Callable, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One training step's use of a loss: loss and gradients, not accumulated into .grad.

    Of logits and targets, or of hidden states, weight and targets.
    """
    loss = loss_fn(*arguments)
    leaves = arguments[:-1]
    if not leaves[0].requires_grad:
        return (loss,)
    return loss, *torch.autograd.grad(loss, leaves)


def work_of(loss_fn: Callable, provider: Provider, inputs: Inputs | LinearInputs) -> Work:
    """A provider's step on the inputs in turn."""
    return Work(partial(inputs.take, provider), partial(step, loss_fn))


def run_case(
    case: Case,
    device: torch.device,
    seconds: float,
    about: dict[str, str],
    patience: Patience | None = None,
) -> list[Record]:
    """A record for every provider that has a form of this case, and for its ceilings.

    One that raises or computes something else is named in the record's note, and not timed.
    """
    inputs = inputs_of(case, device)
    exact = Exact.of(case, *inputs.first)
    works, notes, errors, peaks = {}, {}, {}, {}
    for name, provider in offering(case, device).items():
        try:
            loss_fn = provider.make(case)
            errors[name] = check(loss_fn, provider, inputs, exact)
            works[name] = work_of(loss_fn, provider, inputs)
            peaks[name] = measure.peak_bytes(works[name], device)
        except Exception as error:
            works.pop(name, None)
            notes[name] = note_of(error, device)
    ceilings = _ceilings(case, inputs)
    works |= ceilings
    disturbed = _time(works, device, seconds, notes, patience or Patience(0.0))

    records = []
    for name in [*offering(case, device), *ceilings]:
        result = {}
        if name in errors:
            result = {"error": errors[name].largest, "loss_error": errors[name].loss}
        if name in works:
            result |= {
                "ms_median": works[name].median,
                "ms_spread": works[name].spread,
                "peak_bytes": peaks.get(name),
                "note": disturbed or (WAITED if works[name].waited > 0.5 else None),
                **_speeds(case, name, works),
            }
            records.append(record_of(case, name, about, **result))
        elif name in notes:
            records.append(record_of(case, name, about, note=notes[name], **result))
    del inputs, exact, works, ceilings
    measure.give_back_memory(device)
    return records


def _speeds(case: Case, name: str, works: dict[str, Work]) -> dict[str, float]:
    """How fast something is, beside the ceiling of its kind."""
    median = works[name].median
    if case.kind == "linear":
        ceiling = works.get(PRODUCTS)
        return {"fraction_of_products": ceiling.median / median} if ceiling else {}
    n_bytes = {CLONE: 2 * case.logits_bytes, READ: case.logits_bytes}.get(name, case.bytes_moved)
    speeds = {"gb_per_s": n_bytes / median / 1e6}
    if CLONE in works:  # reads the logits once, writes the copy once
        clone_speed = 2 * case.logits_bytes / works[CLONE].median
        speeds["fraction_of_clone"] = n_bytes / median / clone_speed
    return speeds


def _time(works, device, seconds, notes, patience) -> str | None:
    """Fill the works with times; those that raise move to the notes. A note if it was disturbed."""

    def once():
        for work in works.values():
            work.milliseconds.clear()
        for name, error in measure.interleave(works, device, seconds).items():
            del works[name]
            notes[name] = note_of(error, device)

    if device.type != "cpu":
        once()
        return None
    share = patience.undisturbed(once)
    return f"other processes used {share:.0%} of the CPU" if share > DISTURBED else None


def check(
    loss_fn: Callable, provider: Provider, inputs: Inputs | LinearInputs, exact: Exact
) -> Errors:
    """The errors of a provider on the first input; raises WrongResult."""
    inputs.rewind()
    return exact.check(*step(loss_fn, *inputs.take(provider)))


def record_of(case: Case, provider: str, about: dict[str, str], **result) -> Record:
    """The record of a case."""
    return Record(
        **about,
        case=case.name,
        n_rows=case.n_rows,
        hidden_size=case.hidden_size,
        vocab_size=case.vocab_size,
        dtype=case.dtype,
        provider=provider,
        **result,
    )


def missing_records(device: torch.device, about: dict[str, str]) -> list[Record]:
    """One for each provider that cannot run here, with the reason."""
    return [
        Record(**about, case="all", n_rows=None, vocab_size=None, dtype=None, provider=name,
               note=f"missing: {reason}")
        for name, reason in missing(device).items()
    ]  # fmt: skip


def note_of(error: Exception, device: torch.device) -> str:
    """The error in a line; raises DeviceLost if the GPU did not survive it."""
    text = str(error) if isinstance(error, WrongResult) else measure.in_a_line(error)
    measure.named(error)
    for attempt in range(2):  # the first may still report the error, of a failed capture say
        try:
            measure.synchronize(device)
            measure.give_back_memory(device)
            return text
        except RuntimeError:
            if attempt:
                raise DeviceLost(text) from None


UNCHANGED = Provider(lambda case: None, kinds=())  # overwrites nothing


def clone_work(inputs: Inputs) -> Work:
    """`clone` of the logits."""
    return Work(partial(inputs.take, UNCHANGED), lambda logits, _: logits.detach().clone())


def _ceilings(case: Case, inputs: Inputs | LinearInputs) -> dict[str, Work]:
    """`clone` of the logits and, beside forward, a reduction that only reads them.

    Of hidden states the bare matrix products.
    """
    if case.kind == "linear":
        return {PRODUCTS: Work(tuple, Products(inputs))}
    works = {CLONE: clone_work(inputs)}
    if case.kind == "forward":
        take, dtype = partial(inputs.take, UNCHANGED), DTYPES["float32"]
        works[READ] = Work(take, lambda x, _: torch.sum(x, dtype=dtype))
    return works
