"""The same run with one loss and with another: do the curves coincide, and what does each cost?"""

import json
import multiprocessing
import sys
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.config import CompareConfig, TrainConfig
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.record import read_rows
from fused_ce.babygpt.train import train


def compare(config: CompareConfig) -> bool:
    """Train once with each loss, print what came of it, and leave it in the folder.

    The folder has a run for each loss, compare.json and compare.png. Each run is a process of its
    own, so that the peak of its memory is its own.

    Returns:
        Whether the comparison was finished; False means that a run said why it was not.

    Raises:
        UserError: a run was killed.
        KeyboardInterrupt: a run was stopped by Ctrl-C.
    """
    folder = config.folder
    for loss in config.losses:
        print(f"=== {loss} loss", flush=True)
        if not _train_in_a_process(_run_config(config, loss)):
            return False
    runs = {loss: _read_run(folder / loss) for loss in config.losses}
    summary = {
        "config": _plain(config),
        "losses": {loss: _measure(run, runs[config.losses[0]]) for loss, run in runs.items()},
    }
    with atomic_file(folder / "compare.json") as file:
        file.write(json.dumps(summary, indent=1).encode())
    plot_comparison(runs, summary["losses"], folder / "compare.png")
    print(f"\n{format_table(summary['losses'])}")
    print(f"\n{folder}: compare.json, compare.png, {', '.join(f'{loss}/' for loss in runs)}")
    return True


def _run_config(config: CompareConfig, loss: str) -> TrainConfig:
    """Return the settings of the run with this loss."""
    settings = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    settings |= {"loss": loss, "out": config.folder / loss, "log_steps": True}
    settings["inplace"] = config.inplace and loss == "fused"  # the others have no such thing
    return TrainConfig(**settings)


def _plain(config: CompareConfig) -> dict[str, Any]:
    """Return the settings that the runs share, as strings and numbers."""
    own = ("loss", "losses", "out", "resume", "log_steps")
    names = [field.name for field in fields(config) if field.name not in own]
    return {name: getattr(config, name) for name in names}


def _train_in_a_process(config: TrainConfig) -> bool:
    """Train, and return whether the run was finished; if not, it has said why."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(config,))
    process.start()
    process.join()
    if process.exitcode == 130:
        raise KeyboardInterrupt
    if process.exitcode < 0:
        raise UserError(f"the run in {config.folder} was killed by signal {-process.exitcode}")
    return process.exitcode == 0


def _train(config: TrainConfig) -> None:
    try:
        finished = train(config)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        finished = False
    sys.exit(0 if finished else 130)


def _read_run(folder: Path) -> dict[str, list[dict]]:
    return {name: read_rows(folder / f"{name}.jsonl") for name in ("steps", "log")}


def _measure(run: dict[str, list[dict]], reference: dict[str, list[dict]]) -> dict[str, float]:
    """Return what a run cost, where it ended, and how far its curves are from the reference's."""
    last = run["log"][-1]
    seconds = median(row["seconds"] for row in run["steps"])
    return {
        "step_seconds": seconds,
        "tokens_per_s": median(row["tokens_per_s"] for row in run["log"][1:]),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "train": last["train"],
        "val": last["val"],
        "largest_step_difference": max(differences(run["steps"], reference["steps"], "loss")),
        "largest_difference": max(
            *differences(run["log"], reference["log"], "train"),
            *differences(run["log"], reference["log"], "val"),
        ),
    }


def differences(rows: list[dict], others: list[dict], name: str) -> list[float]:
    """Return how far two curves are apart at each step."""
    return [abs(row[name] - other[name]) for row, other in zip(rows, others, strict=True)]


def format_table(measured: dict[str, dict[str, float]]) -> str:
    """Return a line for each loss, then how each differs from the first."""
    lines = ["loss      step (median)  tokens/s  peak memory    train      val"]
    for loss, of in measured.items():
        lines.append(
            f"{loss:<8}{of['step_seconds'] * 1e3:>12.2f} ms{of['tokens_per_s']:>10,.0f}"
            f"{of['peak_memory_bytes'] / 2**20:>9,.0f} MiB{of['train']:>9.4f}{of['val']:>9.4f}"
        )
    (first, base), *others = measured.items()
    lines.append("")
    for loss, of in others:
        lines.append(
            f"{loss}: {of['step_seconds'] / base['step_seconds']:.2f} times the step of {first}, "
            f"{of['peak_memory_bytes'] / base['peak_memory_bytes']:.2f} times the memory; "
            f"curves within {of['largest_difference']:.1e} of {first}'s at the evaluations, "
            f"{of['largest_step_difference']:.1e} in the steps"
        )
    return "\n".join(lines)


def plot_comparison(
    runs: dict[str, dict[str, list[dict]]], measured: dict[str, dict[str, float]], path: Path
) -> None:
    """Draw the curves, how far they are apart, step times and memory as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplot_mosaic(
        [["curves", "time"], ["differences", "memory"]], width_ratios=(2.2, 1)
    )
    first, *others = runs
    styles = ("-", "--", ":")  # curves that coincide show below each other
    for i, (loss, run) in enumerate(runs.items()):
        steps = [row["step"] for row in run["log"]]
        style = {"color": f"C{i}", "linestyle": styles[i], "linewidth": 4 - 1.2 * i}
        axes["curves"].plot(steps, [row["val"] for row in run["log"]], label=loss, **style)
    axes["curves"].set(xlabel="step", ylabel="val loss (nats per token)")
    axes["curves"].legend()
    for i, loss in enumerate(others, start=1):
        run, reference = runs[loss], runs[first]
        axes["differences"].plot(
            [row["step"] for row in run["steps"]],
            differences(run["steps"], reference["steps"], "loss"),
            color=f"C{i}", linewidth=0.7, label=f"{loss}, loss of each step",
        )  # fmt: skip
        axes["differences"].plot(
            [row["step"] for row in run["log"]],
            differences(run["log"], reference["log"], "val"),
            color=f"C{i}", marker="o", linestyle="none", label=f"{loss}, val",
        )  # fmt: skip
    axes["differences"].set_yscale("symlog", linthresh=1e-7)
    axes["differences"].set_ylim(bottom=0)
    axes["differences"].set(xlabel="step", ylabel=f"difference from {first} (nats)")
    axes["differences"].legend()
    for name, key, unit, title in (
        ("time", "step_seconds", 1e-3, "step, median (ms)"),
        ("memory", "peak_memory_bytes", 2**20, "peak memory (MiB)"),
    ):
        bars = axes[name].bar(
            list(measured),
            [of[key] / unit for of in measured.values()],
            color=[f"C{i}" for i in range(len(measured))],
        )
        axes[name].bar_label(bars, fmt="{:,.1f}")
        axes[name].set_title(title, fontsize="medium")
        axes[name].margins(y=0.15)
    for name in ("curves", "differences"):
        axes[name].grid(alpha=0.3)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)
