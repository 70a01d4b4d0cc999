"""The plots of a machine: bandwidth and memory against the vocabulary, speed-up on each peer."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import tables
from benchmarks.providers import OURS
from benchmarks.records import Record
from benchmarks.runner import CLONE

COLOURS = {
    OURS: "#c1272d", "torch": "#5b6770", "torch.compile": "#1f77b4", "liger": "#2a9d5c",
    "quack": "#8e5ea2", CLONE: "#222222",
}  # fmt: skip
NAMES = {OURS: "fused_ce", **tables.PEERS, CLONE: "clone"}
DTYPES = ("bfloat16", "float32", "float16")
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": "#e3e3e3", "axes.axisbelow": True, "svg.fonttype": "none",
    "svg.hashsalt": "fused_ce", "legend.frameon": False,
}  # fmt: skip


def draw(machines: dict[str, list[Record]], folder: Path) -> list[Path]:
    """Draw what the records allow, as PNG and SVG; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for machine, records in machines.items():
        panels = {dtype: _series(records, dtype) for dtype in DTYPES}
        panels = {dtype: cases for dtype, cases in panels.items() if len(cases) > 1}
        if not panels:
            continue
        for name, paint, unit in PLOTS:
            with rc_context(STYLE):
                figure = _figure(panels, paint, unit, records[0])
                for suffix, metadata in (("png", None), ("svg", {"Date": None})):
                    paths.append(folder / f"{machine}-{name}.{suffix}")
                    figure.savefig(paths[-1], dpi=144, metadata=metadata)
    return paths


def _series(records: list[Record], dtype: str) -> list[tables.Case]:
    """Gradient in forward by vocabulary; of several numbers of rows the largest."""
    cases = tables.by_case(
        r for r in records if r.case == "forward_backward" and r.dtype == dtype and r.n_rows > 64
    )
    largest = {}
    for case in sorted(cases, key=lambda case: case[OURS].n_rows):
        largest[case[OURS].vocab_size] = case
    return [largest[vocab_size] for vocab_size in sorted(largest)]


def _figure(panels, paint, unit, first):
    width = max(len(cases) for cases in panels.values())
    figsize = (1.0 + len(panels) * max(3.6, 0.75 * width), 3.8)
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)  # no global backend, no display
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    handles = {}
    for axis, (dtype, cases) in zip(axes[0], panels.items(), strict=True):
        paint(axis, cases)
        axis.set_title(dtype, loc="left", fontsize=11)
        axis.set_xlabel("vocabulary")
        axis.tick_params(length=0)
        handles |= {h.get_label(): h for h in axis.get_legend_handles_labels()[0]}
        handles |= {label: h for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if axes[0][0].get_yscale() == "linear":
        axes[0][0].set_ylim(bottom=0)  # after all have painted: it ends the scaling of all
    axes[0][0].set_ylabel(unit)
    figure.suptitle(
        f"Loss and gradient on {first.gpu}, torch {first.torch}", fontsize=11, x=0.01, ha="left"
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def _bandwidth(axis, cases):
    """Lines over the vocabulary; the bytes are those that the case has to move at least."""
    for name in NAMES:
        points = [
            (index, case[name].gb_per_s)
            for index, case in enumerate(cases)
            if name in case and case[name].gb_per_s
        ]
        if not points:
            continue
        form = {"linestyle": "--", "linewidth": 1.4} if name == CLONE else {"marker": "o"}
        axis.plot(*zip(*points, strict=True), label=NAMES[name], color=COLOURS[name], **form)
    speeds = [record.gb_per_s for case in cases for record in case.values() if record.gb_per_s]
    if max(speeds) > 8 * min(speeds):  # small logits that stay in a cache would flatten the rest
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:,g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    _vocabularies(axis, cases)


def _memory(axis, cases):
    _bars(axis, cases, [OURS, *tables.peers_in(cases)], tables.memory)


def _speed_up(axis, cases):
    _bars(axis, cases, tables.peers_in(cases), tables.ratio)
    axis.axhline(1.0, color="#222222", linewidth=1.0, linestyle="--")


def _bars(axis, cases, names, value_of):
    """A group of bars a vocabulary, one a provider, its value above it."""
    width = 0.84 / len(names)
    for index, name in enumerate(names):
        at = [i + (index - (len(names) - 1) / 2) * width for i in range(len(cases))]
        values = [value_of(case, name) or 0.0 for case in cases]
        bars = axis.bar(at, values, 0.92 * width, label=NAMES[name], color=COLOURS[name])
        labels = [f"{value:.1f}" if value else "" for value in values]
        axis.bar_label(bars, labels, fontsize=7, padding=1.5)
    _vocabularies(axis, cases)


def _vocabularies(axis, cases):
    labels = [_thousands(case[OURS].vocab_size) for case in cases]
    axis.set_xticks(range(len(cases)), labels)


def _thousands(value: float) -> str:
    return f"{value:,.0f}" if value < 1e4 else f"{value / 1e3:.0f}k"


PLOTS = (
    ("bandwidth", _bandwidth, "GB/s of the bytes that must move"),
    ("memory", _memory, "peak memory beyond the inputs ÷ logits"),
    ("speed-up", _speed_up, "time of the peer ÷ ours"),
)
