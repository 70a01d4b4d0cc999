"""The pictures of a machine, for a phone: speed-up against vocabulary, memory against tokens.

Each is as narrow as a phone held upright, its lines are named at their ends, and no text is below
`SMALL` points, so that it can be read at half its size too.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import tables
from benchmarks.memory import IN_PLACE, KIND, NAMES, WHOLE_LOGITS
from benchmarks.providers import COMPILED, EAGER, IN_CHUNKS, OURS
from benchmarks.records import Record

WIDTH = 4.5  # inches, as all lengths of the layout
LEFT, TOP, PANEL, GAP = 0.6, 1.2, 2.0, 0.4
SMALL, MIDDLE, LARGE = 10, 11, 13  # points
LINE = 1.2  # of text, in its size
FAINT = "#595959"


class Pen(NamedTuple):
    """How a line is named and drawn; colours that the colour-blind tell apart, dark on white."""

    name: str
    colour: str
    marker: str
    dashes: str | tuple = "-"


SPEED_PENS = {
    EAGER: Pen("eager\nPyTorch", "#b84a00", "o"),
    COMPILED: Pen("compiled\nPyTorch", "#0072b2", "s"),
    "liger": Pen("Liger", "#00735a", "^"),
    "quack": Pen("quack", "#8a3f78", "D"),
}
MEMORY_PENS = {
    EAGER: Pen(NAMES[EAGER], "#b84a00", "o"),
    WHOLE_LOGITS: Pen(NAMES[WHOLE_LOGITS], "#222222", "v"),
    IN_PLACE: Pen(NAMES[IN_PLACE], "#222222", "D"),
    COMPILED: Pen(NAMES[COMPILED], "#0072b2", "s", (0, (3, 2))),  # it may lie on the former
    "liger": Pen(NAMES["liger"], "#00735a", "^"),
    "quack": Pen(NAMES["quack"], "#6b6100", "P"),
    "cut_cross_entropy": Pen(NAMES["cut_cross_entropy"], "#a3174f", "X"),
    OURS: Pen(NAMES[OURS], "#222222", "o"),
    IN_CHUNKS: Pen(NAMES[IN_CHUNKS], "#8a3f78", "s", (0, (3, 2))),
}
DTYPES = ("float32", "bfloat16", "float16")
STYLE = {
    "font.size": SMALL, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e0e0e0",
    "axes.axisbelow": True, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
    "ytick.major.size": 0, "lines.linewidth": 2, "lines.markersize": 5,
    "svg.fonttype": "path",  # a phone has other fonts, of other widths
    "svg.hashsalt": "fused_ce",
}  # fmt: skip


def draw(machines: dict[str, list[Record]], folder: Path) -> list[Path]:
    """Draw what the records allow, as PNG and SVG; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for machine, records in machines.items():
        for name, figure_of in PLOTS.items():
            with rc_context(STYLE):
                figure = figure_of(records)
                for suffix, metadata in (("png", None), ("svg", {"Date": None})) if figure else ():
                    paths.append(folder / f"{machine}-{name}.{suffix}")
                    figure.savefig(paths[-1], dpi=200, metadata=metadata)
    return paths


def speed_up(records: list[Record]) -> Figure | None:
    """The others' time over ours against the vocabulary: a panel a dtype, None without any."""
    panels = {dtype: _by_vocabulary(records, dtype) for dtype in DTYPES}
    panels = {dtype: sizes for dtype, sizes in panels.items() if len(sizes) > 1}
    if not panels:
        return None
    cases = [case for sizes in panels.values() for same in sizes.values() for case in same]
    below, right = 1.35, 0.9
    height = TOP + len(panels) * (PANEL + GAP) - GAP + below
    figure = _figure(
        height,
        "Time for loss and gradient,\nin multiples of ours",
        _where([case[OURS] for case in cases]),
    )
    vocabularies = sorted({size for sizes in panels.values() for size in sizes})
    values = [ratio for case in cases for peer in SPEED_PENS if (ratio := tables.ratio(case, peer))]
    for index, (dtype, sizes) in enumerate(panels.items()):
        bottom = height - TOP - PANEL - index * (PANEL + GAP)
        axis = _axis(figure, bottom, PANEL, right)
        axis.set_title(f"{dtype}: times as long as ours", loc="left", fontsize=MIDDLE)
        axis.set_xscale("log")
        axis.set_xlim(vocabularies[0] / 1.4, vocabularies[-1] * 1.2)
        _ratios(axis, min(values), max(values))
        _vocabularies(axis, vocabularies, named=index == len(panels) - 1)
        _name_ends(axis, [_speed_line(axis, sizes, peer) for peer in SPEED_PENS])
    rows = sorted({same[-1][OURS].n_rows for sizes in panels.values() for same in sizes.values()})
    caption = (
        "Lines: the largest batch measured of each,\n"
        f"{' to '.join(f'{n:,}' for n in dict.fromkeys([rows[0], rows[-1]]))} rows. "
        "Small marks: smaller ones."
    )
    figure.text(0.1 / WIDTH, 0.1 / height, caption, fontsize=SMALL, color=FAINT, va="bottom")
    return figure


def memory(records: list[Record]) -> Figure | None:
    """Peak memory of head and loss against the number of tokens; None without two of these."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        if record.case == KIND and record.peak_bytes and record.provider in MEMORY_PENS:
            form = record.dtype, record.vocab_size, record.hidden_size
            found.setdefault(form, []).append(record)
    shown = max(found.values(), key=len, default=[])
    tokens = sorted({record.n_rows for record in shown})
    if len(tokens) < 2:
        return None
    height, below, first = 5.2, 0.65, shown[0]
    figure = _figure(
        height,
        "Peak memory of head and loss",
        f"from hidden states ({first.hidden_size:,} a token) to their gradient\n"
        f"and the head's; {first.vocab_size:,} classes, {first.dtype}\n{_where(shown)}",
    )
    axis = _axis(figure, below, height - TOP - 0.15 - below, right=1.55)
    axis.set_xlim(0, tokens[-1])
    axis.set_ylim(0, 1.05e-9 * max(record.peak_bytes for record in shown))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} GB" if value else "0")
    axis.set_xticks(tokens, [f"{n:,}" if 4 * n >= tokens[-1] else "" for n in tokens])
    axis.set_xlabel("tokens", fontsize=SMALL)
    lines = []
    for provider, pen in MEMORY_PENS.items():
        points = sorted((r.n_rows, r.peak_bytes / 1e9) for r in shown if r.provider == provider)
        _line(axis, points, pen)
        lines.append((pen, points, f"{pen.name}\n{_size(points[-1][1])}" if points else ""))
    _name_ends(axis, lines)
    return figure


def _by_vocabulary(records: Iterable[Record], dtype: str) -> dict[int, list[tables.Case]]:
    """Gradient in forward by vocabulary, the case with the most rows last."""
    found: dict[int, list[tables.Case]] = {}
    cases = tables.by_case(r for r in records if r.case == "forward_backward" and r.dtype == dtype)
    for case in sorted(cases, key=lambda case: case[OURS].n_rows):
        found.setdefault(case[OURS].vocab_size, []).append(case)
    return dict(sorted(found.items()))


def _where(records: list[Record]) -> str:
    dates = sorted({record.date for record in records})
    first = records[0]
    return f"{first.gpu}\ntorch {first.torch}, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}"


def _figure(height: float, title: str, subtitle: str) -> Figure:
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)  # no global backend, no display
    left, top = 0.1 / WIDTH, 1 - 0.08 / height
    figure.text(left, top, title, fontsize=LARGE, weight="bold", va="top")
    below = ((title.count("\n") + 1) * LINE * LARGE + 3) / 72 / height
    figure.text(left, top - below, subtitle, fontsize=SMALL, color=FAINT, va="top")
    return figure


def _axis(figure: Figure, bottom: float, height: float, right: float) -> Axes:
    """In inches; `right` is left to the names of its lines."""
    whole = figure.get_figheight()
    return figure.add_axes(
        (LEFT / WIDTH, bottom / whole, (WIDTH - LEFT - right) / WIDTH, height / whole)
    )


def _ratios(axis: Axes, least: float, most: float) -> None:
    """Half as long is as far from the line at 1 as twice as long; words above and below all."""
    axis.set_yscale("log", base=2)
    axis.set_ylim(min(0.5, least) / 1.6, max(2.0, most) * 1.6)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.axhspan(axis.get_ylim()[0], 1.0, color="#f0f0f0", linewidth=0)
    axis.axhline(1.0, color=FAINT, linewidth=1.2)
    place = {"transform": axis.transAxes, "fontsize": SMALL, "color": FAINT}
    axis.text(0.02, 0.97, "ours is faster", va="top", **place)
    axis.text(0.98, 0.03, "ours is slower", va="bottom", ha="right", **place)


def _vocabularies(axis: Axes, sizes: list[int], named: bool) -> None:
    """A tick each, and names in rows; sizes that are close leave the name to the first of them."""
    axis.set_xticks(sizes, [""] * len(sizes))
    axis.xaxis.set_minor_locator(NullLocator())
    if not named:
        return
    places = 72 / axis.figure.dpi * axis.transData.transform([(size, 1.0) for size in sizes])[:, 0]
    ends, last = [], 0  # of what stands in each row, in points
    for size, place in zip(sizes, places, strict=True):
        if size <= 1.25 * last:
            continue
        half = 0.33 * SMALL * len(f"{size:,}")  # a digit is 0.64 of the size wide
        row = next((r for r, end in enumerate(ends) if end < place - half), len(ends))
        ends[row : row + 1] = [place + half]
        last = size
        axis.annotate(
            f"{size:,}", (size, 0.0), (0, -6 - row * LINE * SMALL), ha="center", va="top",
            xycoords=axis.get_xaxis_transform(), textcoords="offset points", fontsize=SMALL,
        )  # fmt: skip
    axis.set_xlabel("size of the vocabulary", fontsize=SMALL, labelpad=LINE * SMALL * len(ends))


def _speed_line(axis: Axes, sizes: dict[int, list[tables.Case]], peer: str) -> tuple:
    pen = SPEED_PENS[peer]
    points = []
    for size, cases in sizes.items():
        *smaller, largest = [tables.ratio(case, peer) for case in cases]
        smaller = [value for value in smaller if value]
        axis.plot([size] * len(smaller), smaller, pen.marker, color=pen.colour, ms=3, alpha=0.6)
        if largest:
            points.append((size, largest))
    _line(axis, points, pen)
    return pen, points, pen.name


def _line(axis: Axes, points: list[tuple], pen: Pen) -> None:
    if points:
        line = axis.plot(
            *zip(*points, strict=True), pen.marker, color=pen.colour, linestyle=pen.dashes
        )
        line[0].set_clip_on(False)  # the last mark stands on the edge


def _name_ends(axis: Axes, lines: list[tuple]) -> None:
    """Name lines beside their ends; names that would lie on each other move apart."""
    points = 72 / axis.figure.dpi
    edge = axis.get_window_extent()
    ends = sorted(
        (points * axis.transData.transform(line[-1])[1], name, pen, line[-1])
        for pen, line, name in lines if line
    )  # fmt: skip
    heights = [LINE * SMALL * (name.count("\n") + 1) + 2 for _, name, _, _ in ends]
    middles = spread([end[0] for end in ends], heights, points * edge.y0, points * edge.y1)
    for (_, name, pen, last), middle in zip(ends, middles, strict=True):
        axis.annotate(
            name, last, (points * edge.x1 + 14, middle), textcoords="figure points", va="center",
            fontsize=SMALL, color=pen.colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": pen.colour, "lw": 0.8, "shrinkA": 1,
                        "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(wanted: list[float], heights: list[float], low: float, high: float) -> list[float]:
    """Middles near the wanted ones, in their order, none on another, within bounds if they fit."""
    middles, edge = [], low
    for middle, height in zip(wanted, heights, strict=True):
        middles.append(max(middle, edge + height / 2))
        edge = middles[-1] + height / 2
    edge = max(high, low + sum(heights))
    for index in reversed(range(len(middles))):
        middles[index] = min(middles[index], edge - heights[index] / 2)
        edge = middles[index] - heights[index] / 2
    return middles


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{1e3 * gigabytes:.0f} MB"


PLOTS = {"speed-up": speed_up, "memory": memory}
