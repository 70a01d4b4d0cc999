"""Tables and plots from the results: `python -m benchmarks.report`.

It reads every JSON of benchmarks/results, prints the tables and draws the plots; `--add
runs/gpu/results.json` takes the records of a run over first, `--pages` puts the tables between the
markers of docs/performance.md, and a few rows of them between those of the README.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import memory, tables
from benchmarks.records import RESULTS, Record, file_name, merge, read, write

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
ROOT = Path(__file__).resolve().parents[1]
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, draw the plots, and do what else was asked."""
    options = _parser().parse_args(arguments)
    for path in options.add:
        print(f"{path} -> {add(path, options.results)}")
    machines = load(options.results)
    if not machines:
        print(f"no results in {options.results}")
        return 1
    print("\n\n".join(section(records) for records in machines.values()))
    if options.pages:
        update(options.readme, machines, headline)
        update(options.performance, machines, lambda records: section(records, brief=True))
    if not options.no_plots:
        from benchmarks import plots  # only they need matplotlib

        for path in plots.draw(machines, options.results / "plots"):
            print(path)
    return 0


def update(page: Path, machines: dict[str, list[Record]], tables_of: Callable) -> None:
    """Put what `tables_of` makes of each machine between the markers of a page."""
    text = "\n\n".join(filter(None, map(tables_of, machines.values())))
    page.write_text(replace_between_markers(page.read_text("utf-8"), text), "utf-8")
    print(f"wrote tables into {page}")


def add(path: Path, results: Path) -> Path:
    """Merge a run's records into the file of its machine; the file."""
    new = read(path)
    if not new:
        raise SystemExit(f"{path} has no records")
    target = results / file_name(new[0].gpu)
    old = read(target) if target.exists() else []
    results.mkdir(parents=True, exist_ok=True)
    write(merge(old, new), target)
    return target


def load(results: Path) -> dict[str, list[Record]]:
    """The records of every machine, by the name of its file."""
    return {path.stem: read(path) for path in sorted(results.glob("*.json"))}


def headline(records: list[Record]) -> str:
    """Six rows of one machine, slower ones among them; nothing where it has not measured them."""
    cases = {(*case[tables.OURS].key,): case for case in tables.by_case(records)}
    rows = [tables.headline_row(words, cases[key]) for key, words in tables.HEADLINE.items()
            if key in cases]  # fmt: skip
    if not rows:
        return ""
    first = records[0]
    where = f"{first.gpu}, torch {first.torch}, {max(record.date for record in records)}"
    return "\n".join([where + ":", "", tables.headline_header(), *rows])


def section(records: list[Record], brief: bool = False) -> str:
    """The tables of one machine; a brief one leaves out what launching costs."""
    first = records[0]
    dates = sorted({record.date for record in records})
    parts = [
        f"**{first.gpu}**, torch {first.torch}, Triton {first.triton}, "
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}"
    ]
    others = ("train", "launch", "clone", "read", "linear", memory.KIND)
    parts += [
        text
        for text in (
            losses_table(
                [r for r in records if r.case.split()[0] not in others], tables.header, tables.row
            ),
            losses_table(
                [r for r in records if r.case.split()[0] == "linear"],
                tables.linear_header,
                tables.linear_row,
            ),
            memory_table(records),
            ceilings_table(records),
            steps_table(records, "train", "training step"),
            "" if brief else steps_table(records, "launch", "call, launches included"),
        )
        if text
    ]
    if named := tables.notes(records):
        parts.append("\n".join(f"- {text}" for text in named))
    return "\n\n".join(parts)


def losses_table(records: Iterable[Record], header: Callable, row: Callable) -> str:
    """A row for each case, with the columns of header and row."""
    cases = tables.by_case(records)
    peers = tables.peers_in(cases)
    return "\n".join([header(peers), *(row(case, peers) for case in cases)]) if cases else ""


def memory_table(records: Iterable[Record]) -> str:
    """Peaks of head and loss in MB, a row for every number of tokens."""
    cases = tables.by_case(record for record in records if record.case == memory.KIND)
    names = [name for name in memory.NAMES if any(name in case for case in cases)]
    cells = ["memory, MB", "dtype", "tokens", "hidden", "vocabulary"]
    cells += [memory.NAMES[name] for name in names]
    lines = [f"| {' | '.join(cells)} |", "|---|---|" + "---:|" * (len(cells) - 2)]
    for case in cases:
        ours = case[tables.OURS]
        sizes = ours.n_rows, ours.hidden_size, ours.vocab_size
        row = ["head and loss", ours.dtype, *(f"{size:,}" for size in sizes)]
        for name in names:
            peak = case[name].peak_bytes if name in case else None
            row.append(f"{peak / memory.MB:,.0f}" if peak else "failed" if name in case else "")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) if cases else ""


def steps_table(records: Iterable[Record], kind: str, what: str) -> str:
    """Training steps or launches: milliseconds of ours, ratios and memory in MiB."""
    cases = tables.by_case(r for r in records if r.case.startswith(kind))
    if not cases:
        return ""
    peers = tables.peers_in(cases)
    names = [tables.OURS, *peers]
    memory = kind == "train"
    cells = [what, "dtype", "rows", "vocabulary", "fused_ce ms"]
    cells += [f"time of {tables.PEERS[peer]} ÷ ours" for peer in peers]
    cells += [f"memory, MiB: {tables.PEERS.get(name, name)}" for name in names if memory]
    lines = [f"| {' | '.join(cells)} |", "|---|---|" + "---:|" * (len(cells) - 2)]
    for case in cases:
        ours = case[tables.OURS]
        row = [ours.case, ours.dtype, f"{ours.n_rows:,}", f"{ours.vocab_size:,}"]
        row += [f"{ours.ms_median:.4f}" if ours.ms_median else "failed"]
        ratios = [tables.ratio(case, peer) for peer in peers]
        row += [f"{value:.2f}×" if value else "failed" for value in ratios]
        peaks = [case[name].peak_bytes if name in case else None for name in names if memory]
        row += [f"{peak / 2**20:,.0f}" if peak is not None else "" for peak in peaks]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def ceilings_table(records: Iterable[Record]) -> str:
    """The machine's own speed."""
    lines = []
    for record in records:
        if record.case in ("clone", "read", "matmul") and record.ms_median:
            speed = f"{record.gb_per_s:,.0f} GB/s" if record.gb_per_s else record.note
            size = f"{record.n_rows:,} × {record.vocab_size:,}"
            lines.append(f"| {record.case} ({record.provider}) | {size} {record.dtype} | {speed} |")
    return "\n".join(["| ceiling | size | speed |", "|---|---|---:|", *lines]) if lines else ""


def replace_between_markers(text: str, tables_text: str) -> str:
    """The text with what is between the markers replaced; the markers stay."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise SystemExit(f"the page needs {BEGIN} and then {END}, once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables_text}\n{END}{rest.split(END)[1]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="results.json of runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="one JSON a machine")
    parser.add_argument("--pages", action="store_true", help="update the tables of both pages")
    parser.add_argument("--readme", type=Path, default=README, help="the page of a few rows")
    parser.add_argument("--performance", type=Path, default=PERFORMANCE, help="that of all")
    parser.add_argument("--no-plots", action="store_true", help="tables alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())
