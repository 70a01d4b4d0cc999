"""Peak memory of head and loss against the number of tokens: `python -m benchmarks.memory`.

Every way begins with hidden states and the weight of the head and ends with both gradients, which
are in its peak; what differs is the logits: whole and copied, whole, or a chunk at a time. No time
is taken: peaks are the same in every run.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.accuracy import Exact
from benchmarks.cases import DTYPES, Case
from benchmarks.inputs import inputs_of
from benchmarks.providers import COMPILED, EAGER, IN_CHUNKS, OURS, Provider, offering
from benchmarks.records import Record, Store, machine
from benchmarks.runner import check, note_of, work_of
from fused_ce import fused_cross_entropy

KIND = "memory"  # of a record
TOKENS = (1024, 2048, 4096, 8192)
WHOLE_LOGITS, IN_PLACE = "fused_ce whole logits", "fused_ce in place"
NAMES = {
    EAGER: "eager PyTorch", WHOLE_LOGITS: "ours, whole logits", IN_PLACE: "ours, in place",
    COMPILED: "compiled PyTorch", "liger": "Liger, in chunks", "quack": "quack, in chunks",
    "cut_cross_entropy": "CCE, in chunks", OURS: "ours, in chunks",
    IN_CHUNKS: "PyTorch, in chunks",
}  # fmt: skip
MB = 1e6


def main(arguments: list[str] | None = None) -> int:
    """Print the peaks and keep the records."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="of results.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    about, store = machine(device), Store(options.out / "results.json")
    print(f"{about['gpu']}, torch {about['torch']}; hidden states to both gradients")
    for n_rows in options.tokens:
        case = Case(
            "linear", n_rows, options.vocab_size, options.dtype, hidden_size=options.hidden_size
        )
        print(case.label)
        for record in peaks(case, device, about):
            store.add(record)
            found = record.note or f"{record.peak_bytes / MB:9,.1f} MB"
            print(f"  {NAMES[record.provider]:20} {found}", flush=True)
        measure.give_back_memory(device)
    print(f"results: {store.path} (`python -m benchmarks.report --add` takes them over)")
    return 0


def peaks(case: Case, device: torch.device, about: dict[str, str]) -> Iterator[Record]:
    """A record for each way that can run here; one that fails or is wrong says so in its note."""
    inputs = inputs_of(case, device)
    exact = Exact.of(case, *inputs.first)
    for name, provider in ways(case, device).items():
        found = {}
        try:
            loss_fn = provider.make(case)
            errors = check(loss_fn, provider, inputs, exact)
            found = {"error": errors.largest, "loss_error": errors.loss}
            found["peak_bytes"] = measure.peak_bytes(work_of(loss_fn, provider, inputs), device)
        except Exception as error:
            found["note"] = note_of(error, device)
        yield Record(
            **about, case=KIND, n_rows=case.n_rows, hidden_size=case.hidden_size,
            vocab_size=case.vocab_size, dtype=case.dtype, provider=name, **found,
        )  # fmt: skip


def ways(case: Case, device: torch.device) -> dict[str, Provider]:
    """The providers from hidden states, and ours behind a head that makes whole logits."""
    ours = {
        name: Provider(lambda case, f=loss_of: functools.partial(_behind_head, f), ("linear",))
        for name, loss_of in (
            (WHOLE_LOGITS, fused_cross_entropy),
            (IN_PLACE, functools.partial(fused_cross_entropy, inplace=True)),
        )
    }
    return offering(case, device) | ours


def _behind_head(loss_of: Callable, hidden, weight, targets) -> torch.Tensor:
    return loss_of(F.linear(hidden, weight), targets)


if __name__ == "__main__":
    sys.exit(main())
