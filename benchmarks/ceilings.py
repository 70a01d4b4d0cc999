"""The machine's own ceilings: copying, only reading, and a bfloat16 matrix product."""

from dataclasses import dataclass

import torch

from benchmarks.cases import DTYPES, HEADLINE, Case
from benchmarks.inputs import Inputs
from benchmarks.measure import Work, interleave
from benchmarks.providers import Provider
from benchmarks.records import Record
from benchmarks.runner import note_of, record_of
from benchmarks.session import Session

UNCHANGED = Provider(lambda case: None, kinds=())


@dataclass(frozen=True)
class Ceiling:
    """What is measured on logits of one shape, or a product of square matrices."""

    kind: str  # "copy and read" or "matmul"
    n_rows: int
    vocab_size: int
    dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.kind}, {self.n_rows:,} x {self.vocab_size:,} {self.dtype}"


def ceilings(session: Session) -> list[Ceiling]:
    """The sizes of the headline cases, and one product that fills the machine."""
    if session.device.type == "cpu":
        return [Ceiling("copy and read", 16, 1030), Ceiling("matmul", 64, 64)]
    shapes = dict.fromkeys((case.n_rows, case.vocab_size) for case in HEADLINE)
    copies = [Ceiling("copy and read", *shape) for shape in shapes]
    return [Ceiling("matmul", 8192, 8192), *(copies[::2] if session.quick else copies)]


def run(session: Session, ceiling: Ceiling) -> None:
    """Add its records."""
    measure = _matmul if ceiling.kind == "matmul" else _copy_and_read
    session.add(*measure(session, ceiling))


def _copy_and_read(session: Session, ceiling: Ceiling) -> list[Record]:
    case = Case("forward", ceiling.n_rows, ceiling.vocab_size, ceiling.dtype)
    inputs = Inputs(case, session.device)

    def work(call):
        return Work(lambda: inputs.take(UNCHANGED)[:1], call)

    works = {
        ("clone", "torch"): work(torch.clone),
        ("read", "torch.sum"): work(lambda x: torch.sum(x, dtype=torch.float32)),
        ("read", "torch.amax"): work(lambda x: torch.amax(x, dim=1)),
    }
    n_bytes = {
        "clone": 2 * case.logits_bytes,  # read the logits once, write the copy once
        "read": case.logits_bytes,  # read the logits once
    }
    failures = interleave(works, session.device, session.seconds)
    clone_speed = None
    records = []
    for (kind, provider), work in works.items():
        base = record_of(case, provider, session.about)
        if (kind, provider) in failures:
            result = {"note": note_of(failures[kind, provider], session.device)}
        else:
            speed = n_bytes[kind] / work.median / 1e6
            clone_speed = clone_speed or speed
            result = {
                "ms_median": work.median, "ms_spread": work.spread, "gb_per_s": speed,
                "fraction_of_clone": speed / clone_speed,
            }  # fmt: skip
        records.append(Record(**{**vars(base), "case": kind, **result}))
    return records


def _matmul(session: Session, ceiling: Ceiling) -> list[Record]:
    size = ceiling.n_rows, ceiling.vocab_size
    a, b = (torch.randn(size, device=session.device, dtype=DTYPES[ceiling.dtype]) for _ in range(2))
    work = Work(lambda: (a, b), torch.matmul)
    for error in interleave({"matmul": work}, session.device, session.seconds).values():
        raise error
    operations = 2 * ceiling.n_rows**2 * ceiling.vocab_size
    return [
        Record(
            **session.about, case="matmul", n_rows=ceiling.n_rows, vocab_size=ceiling.vocab_size,
            dtype=ceiling.dtype, provider="torch", ms_median=work.median, ms_spread=work.spread,
            note=f"{operations / work.median / 1e9:.1f} TFLOP/s",
        )
    ]  # fmt: skip
