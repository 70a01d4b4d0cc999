"""Records as a table in Markdown: our time, and how many times longer the others take."""

from collections.abc import Iterable

from benchmarks.providers import COMPILED, EAGER, OURS
from benchmarks.records import Record

PEERS = {EAGER: "torch", COMPILED: "compiled", "liger": "Liger", "quack": "quack"}

Case = dict[str, Record]  # the records of one case by provider


def by_case(records: Iterable[Record]) -> list[Case]:
    """Records of the same case together, in the order in which they were measured."""
    cases: dict[tuple, Case] = {}
    for record in records:
        cases.setdefault(record.key, {})[record.provider] = record
    return [case for case in cases.values() if OURS in case]


def ratio(case: Case, peer: str) -> float | None:
    """The peer's time over ours: above 1 we are faster."""
    ours, other = case.get(OURS), case.get(peer)
    if not ours or not other or not ours.ms_median or not other.ms_median:
        return None
    return other.ms_median / ours.ms_median


def memory(case: Case, provider: str) -> float | None:
    """Peak memory beyond the inputs, as a multiple of the logits."""
    record = case.get(provider)
    if record is None or record.peak_bytes is None:
        return None
    element = 4 if record.dtype == "float32" else 2
    return record.peak_bytes / (record.n_rows * record.vocab_size * element)


def peers_in(cases: list[Case]) -> list[str]:
    """Those that have a record at all, in a fixed order."""
    return [peer for peer in PEERS if any(peer in case for case in cases)]


def header(peers: list[str]) -> str:
    """The first two lines."""
    cells = ["case", "dtype", "rows", "vocabulary", "fused_ce ms"]
    cells += [f"time of {PEERS[peer]} ÷ ours" for peer in peers]
    cells += ["GB/s", "of `clone`"]
    cells += ["memory ÷ logits: fused_ce", *(PEERS[peer] for peer in peers)]
    cells += ["error: fused_ce", *(PEERS[peer] for peer in peers)]
    marks = ["---", "---", *["---:"] * (len(cells) - 2)]
    return f"| {' | '.join(cells)} |\n|{'|'.join(marks)}|"


def row(case: Case, peers: list[str]) -> str:
    """One case."""
    ours = case[OURS]
    cells = [ours.case.replace("_", " "), ours.dtype, f"{ours.n_rows:,}", f"{ours.vocab_size:,}"]
    cells += [_number(ours, ours.ms_median, "{:.4f}" if (ours.ms_median or 1) < 0.1 else "{:.2f}")]
    cells += [_number(case.get(peer), ratio(case, peer), "{:.2f}×") for peer in peers]
    cells += [
        _number(ours, ours.gb_per_s, "{:,.0f}"),
        _number(ours, ours.fraction_of_clone, "{:.0%}"),
    ]
    cells += [_number(case.get(name), memory(case, name), "{:.2f}×") for name in [OURS, *peers]]
    errors = [case[name].error if name in case else None for name in [OURS, *peers]]
    cells += [
        _number(case.get(name), error, "{:.0e}")
        for name, error in zip([OURS, *peers], errors, strict=True)
    ]
    return f"| {' | '.join(cells)} |"


def notes(records: Iterable[Record]) -> list[str]:
    """Who is missing, and what failed where."""
    lines = []
    for record in records:
        disturbed = record.provider == OURS and record.n_rows and record.gb_per_s
        if record.note and (record.ms_median is None or disturbed):
            where = "" if record.n_rows is None else (
                f" ({record.case}, {record.n_rows:,} × {record.vocab_size:,} {record.dtype})"
            )  # fmt: skip
            lines.append(f"{record.provider}{where}: {record.note}")
    return lines


def _number(record: Record | None, value: float | None, form: str) -> str:
    """A cell; a provider that was tried and failed is told from one that was not tried."""
    if value is not None:
        return form.format(value)
    return "failed" if record is not None and record.note else ""
