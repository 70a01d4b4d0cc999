"""Records as tables in Markdown: our time, and how many times longer the others take."""

from collections.abc import Iterable

import torch

from benchmarks.providers import COMPILED, EAGER, IN_CHUNKS, OURS, PROVIDERS
from benchmarks.records import Record

PEERS = {
    EAGER: "torch", COMPILED: "compiled", IN_CHUNKS: "torch in chunks", "liger": "Liger",
    "quack": "quack", "cut_cross_entropy": "CCE",
}  # fmt: skip

# What the README shows, by `Record.key`: where we gain, and where we do not.
HEADLINE = {
    ("forward_backward", 1024, None, 50_257, "float32"): "loss and gradient",
    ("forward_backward", 1024, None, 50_257, "bfloat16"): "loss and gradient",
    ("linear", 4096, 256, 16_000, "float32"): "from hidden states, with both gradients",
    ("linear ignored 70%", 1024, 256, 16_000, "float32"): "the same, 70 % of labels ignored",
    ("forward", 1024, None, 50_257, "float32"): "loss alone",
    ("forward_backward", 1024, None, 65, "float32"): "loss and gradient, few classes",
}

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
    """Peak memory beyond the inputs, as a multiple of the logits.

    From hidden states it is beyond both gradients too, which the caller wants anyway.
    """
    record = case.get(provider)
    if record is None or record.peak_bytes is None:
        return None
    logits = record.n_rows * record.vocab_size
    gradients = (record.n_rows + record.vocab_size) * (record.hidden_size or 0)
    element = 4 if record.dtype == "float32" else 2
    return (record.peak_bytes - gradients * element) / (logits * element)


def peers_in(cases: list[Case]) -> list[str]:
    """Those that have a record at all, in a fixed order."""
    return [peer for peer in PEERS if any(peer in case for case in cases)]


def peers_of(kind: str, device: torch.device) -> list[str]:
    """Those that have a form of this kind and can run here."""
    return [
        name for name in PEERS
        if kind in PROVIDERS[name].kinds and not PROVIDERS[name].missing(device)
    ]  # fmt: skip


def header(peers: list[str]) -> str:
    """The first two lines."""
    cells = ["case", "dtype", "rows", "vocabulary", "fused_ce ms"]
    cells += [f"time of {PEERS[peer]} ÷ ours" for peer in peers]
    cells += ["GB/s", "of `clone`"]
    cells += ["memory ÷ logits: fused_ce", *(PEERS[peer] for peer in peers)]
    cells += ["error: fused_ce", *(PEERS[peer] for peer in peers)]
    return _head(cells)


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
    cells += _errors(case, peers, "error")
    return f"| {' | '.join(cells)} |"


def headline_header() -> str:
    """The first two lines of the README's table."""
    cells = ["", "rows (× hidden) × classes", "ours", "torch ÷ ours", "compiled ÷ ours"]
    return _head([*cells, "memory ÷ logits: ours", "torch", "compiled"])


def headline_row(words: str, case: Case) -> str:
    """One case, in words."""
    ours, peers = case[OURS], (EAGER, COMPILED)
    cells = [words, f"{ours.sizes} {ours.dtype}", _number(ours, ours.ms_median, "{:.3g} ms")]
    cells += [_number(case.get(peer), ratio(case, peer), "{:.2f}") for peer in peers]
    cells += [_number(case.get(name), memory(case, name), "{:.2f}") for name in (OURS, *peers)]
    return f"| {' | '.join(cells)} |"


def linear_header(peers: list[str]) -> str:
    """The first two lines of the table from hidden states."""
    names = ["fused_ce", *(PEERS[peer] for peer in peers)]
    cells = ["case", "dtype", "rows", "hidden", "vocabulary", "fused_ce ms", "±"]
    cells += ["of the products", *(f"time of {name} ÷ ours" for name in names[1:])]
    for what in ("memory ÷ logits", "error of the loss", "of gradients"):
        cells += [f"{what}: {names[0]}", *names[1:]]
    return _head(cells)


def linear_row(case: Case, peers: list[str]) -> str:
    """One case."""
    ours = case[OURS]
    cells = [ours.case, ours.dtype, *(f"{n:,}" for n in (ours.n_rows, ours.hidden_size))]
    cells += [f"{ours.vocab_size:,}", _number(ours, ours.ms_median, "{:.2f}")]
    cells += [_number(ours, ours.ms_spread, "{:.2f}")]
    cells += [_number(ours, ours.fraction_of_products, "{:.0%}")]
    cells += [_number(case.get(peer), ratio(case, peer), "{:.2f}×") for peer in peers]
    cells += [_number(case.get(name), memory(case, name), "{:.2f}×") for name in [OURS, *peers]]
    cells += _errors(case, peers, "loss_error") + _errors(case, peers, "error")
    return f"| {' | '.join(cells)} |"


def notes(records: Iterable[Record]) -> list[str]:
    """Who is missing, and what failed where."""
    lines = []
    for record in records:
        speed = record.gb_per_s or record.fraction_of_products
        disturbed = record.provider == OURS and record.n_rows and speed
        if record.note and (record.ms_median is None or disturbed):
            where = "" if record.n_rows is None else (
                f" ({record.case}, {record.sizes} {record.dtype})"
            )  # fmt: skip
            lines.append(f"{record.provider}{where}: {record.note}")
    return lines


def _head(cells: list[str]) -> str:
    marks = ["---", "---", *["---:"] * (len(cells) - 2)]
    return f"| {' | '.join(cells)} |\n|{'|'.join(marks)}|"


def _errors(case: Case, peers: list[str], field: str) -> list[str]:
    found = {name: case.get(name) for name in [OURS, *peers]}
    return [_number(r, r and getattr(r, field), "{:.0e}") for r in found.values()]


def _number(record: Record | None, value: float | None, form: str) -> str:
    """A cell; a provider that was tried and failed is told from one that was not tried."""
    if value is not None:
        return form.format(value)
    return "failed" if record is not None and record.note else ""
