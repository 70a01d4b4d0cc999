"""The pictures that a run and a comparison leave; no display and no global state of matplotlib's.

They are drawn with the object interface alone, so they are the same in a notebook, in a thread and
where there is no display.
"""

import math
import os
import sys
from pathlib import Path

from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.config import CompareConfig, TrainConfig
from fused_ce.babygpt.corpora import NAMES
from fused_ce.babygpt.folder import MARK
from fused_ce.babygpt.record import differences
from fused_ce.babygpt.tokenizer import TOKENIZERS

SMALLEST_DIFFERENCE = 1e-7  # nats; below it the axis of the differences is linear, so as to show 0


def plot_losses(rows: list[dict], config: TrainConfig, path: Path) -> None:
    """Draw the train and validation losses of the rows as a PNG."""
    figure = _new_figure(7, 4.5)
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    for split in ("train", "val"):
        losses = [row[split] for row in rows]
        axes.plot(steps, losses, marker=".", label=f"{split}, {losses[-1]:.3f} at the end")
    unit = TOKENIZERS[config.tokenizer].unit
    axes.set(title=_title(config), xlabel="step", ylabel=f"loss (nats per {unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_comparison(
    runs: dict[str, dict[str, list[dict]]],
    measured: dict[str, dict[str, float]],
    config: CompareConfig,
    path: Path,
) -> None:
    """Draw the curves, how far they are apart, step times and memory as a PNG."""
    figure = _new_figure(12, 6.5)
    axes = figure.subplot_mosaic(
        [["curves", "time"], ["differences", "memory"]], width_ratios=(2.4, 1)
    )
    figure.suptitle(_title(config))
    _draw_curves(axes["curves"], runs, TOKENIZERS[config.tokenizer].unit)
    _draw_differences(axes["differences"], runs)
    for name, key, size, title in (
        ("time", "step_seconds", 1e-3, "step, median (ms)"),
        ("memory", "peak_memory_bytes", 2**20, "peak memory (MiB)"),
    ):
        values = [of[key] / size for of in measured.values()]
        colours = [f"C{i}" for i in range(len(measured))]
        bars = axes[name].bar(list(measured), values, color=colours)
        axes[name].bar_label(bars, fmt="{:,.0f}" if max(values) >= 1000 else "{:,.1f}")
        axes[name].set_title(title, fontsize="medium")
        axes[name].yaxis.set_major_formatter("{x:,.0f}" if max(values) >= 10 else "{x:g}")
        axes[name].margins(y=0.15)
    _save(figure, path)


def _title(config: TrainConfig) -> str:
    corpus = config.data.partition(":")[0]
    name = corpus if corpus in NAMES else Path(config.data).name
    return f"BabyGPT {config.preset} on {name}".replace("$", r"\$")  # no formula


def _draw_curves(axes, runs: dict[str, dict[str, list[dict]]], unit: str) -> None:
    styles = ("-", "--", "-.", ":")  # curves that coincide show below each other
    for i, (loss, run) in enumerate(runs.items()):
        steps = [row["step"] for row in run["log"]]
        style = {"color": f"C{i}", "linestyle": styles[i], "linewidth": 4.5 - i}
        axes.plot(steps, [row["val"] for row in run["log"]], label=loss, **style)
    axes.set(xlabel="step", ylabel=f"val loss (nats per {unit})")
    _finish(axes)


def _draw_differences(axes, runs: dict[str, dict[str, list[dict]]]) -> None:
    first, *others = runs
    largest = SMALLEST_DIFFERENCE
    for i, loss in enumerate(others, start=1):
        for name, key, label, style in (
            ("steps", "loss", "each step", {"linewidth": 0.7}),
            ("log", "val", "val", {"marker": "o", "linestyle": "none", "clip_on": False}),
        ):
            values = differences(runs[loss][name], runs[first][name], key)
            largest = max(largest, *(value for value in values if math.isfinite(value)), 0.0)
            steps = [row["step"] for row in runs[loss][name]]
            axes.plot(steps, values, color=f"C{i}", label=f"{loss}, {label}", **style)
    _scale_differences(axes, largest)
    axes.set(xlabel="step", ylabel=f"difference from {first} (nats)")
    _finish(axes)


def _scale_differences(axes, largest: float) -> None:
    """From 0 to the power of ten above the largest, every tick with its value."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lowest, top = round(math.log10(SMALLEST_DIFFERENCE)), math.ceil(math.log10(largest) + 1e-9)
    steps = (1, 2, 5) if top - lowest <= 2 else (1,)
    ticks = [step * 10.0**power for power in range(lowest, top) for step in steps]
    axes.set_yscale("symlog", linthresh=SMALLEST_DIFFERENCE)
    axes.set_ylim(0, 10.0**top)
    axes.yaxis.set_major_locator(FixedLocator([0, *ticks, 10.0**top]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value else "0"))


def _finish(axes) -> None:
    """Put the legend beside the curves, not on them."""
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _new_figure(width: float, height: float):
    """Return a figure of these inches.

    Notebooks name their backend in MPLBACKEND for every process that they start; where it cannot
    be loaded, matplotlib does not even import. No backend is needed here.
    """
    try:
        import matplotlib  # noqa: F401
    except ValueError:
        backend = os.environ.pop("MPLBACKEND", None)
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # half of it, which would stay so
        try:
            import matplotlib  # noqa: F401
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": MARK})
