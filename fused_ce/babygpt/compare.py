"""The same run with one loss and with another: do the curves coincide, and what does each cost?"""

import math
import multiprocessing
import sys
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

from fused_ce.babygpt import data as batches
from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.config import CompareConfig, TrainConfig
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.folder import COMPARISON_FILES, OPTIONAL_FILES, RUN_FILES, claim
from fused_ce.babygpt.plots import plot_comparison
from fused_ce.babygpt.record import differences, read_rows, to_json
from fused_ce.babygpt.surroundings import dispensable, prepare_process
from fused_ce.babygpt.train import train


def compare(config: CompareConfig) -> bool:
    """Train once with each loss, print what came of it, and leave it in the folder.

    The folder has a run for each loss, compare.json and compare.png. Each run is a process of its
    own, so that the peak of its memory is its own; the text is encoded before the first.

    Returns:
        Whether the comparison was finished; False means that a run said why it was not.

    Raises:
        UserError: the text cannot be used, or a run was killed.
        KeyboardInterrupt: a run was stopped by Ctrl-C.
    """
    folder = config.folder
    _claim(config)
    batches.load_dataset(config.data, config.tokenizer, config.bpe_vocab_size)
    for loss in config.losses:
        print(f"=== {loss} loss", flush=True)
        if not _train_in_a_process(_run_config(config, loss)):
            return False
    runs: dict[str, dict[str, list[dict]]]
    runs = {loss: _read_run(folder / loss) for loss in config.losses}
    measured = {loss: _measure(run, runs[config.losses[0]]) for loss, run in runs.items()}
    with atomic_file(folder / "compare.json") as file:
        file.write(to_json({"config": _plain(config), "losses": measured}, indent=1))
    print(f"\n{format_table(measured)}")
    with dispensable("compare.png was not drawn"):
        plot_comparison(runs, measured, config, folder / "compare.png")
    files = [name for name in COMPARISON_FILES if (folder / name).exists()]
    print(f"\n{folder}: {', '.join([*files, *(f'{loss}/' for loss in runs)])}")
    return True


def _claim(config: CompareConfig) -> None:
    """Refuse, or make room, before the first run begins rather than after the last."""
    rules = {"overwrite": config.overwrite, "resumable": False}
    replaced = claim(config.folder, COMPARISON_FILES, **rules)
    for loss in config.losses:
        claim(config.folder / loss, (*RUN_FILES, *OPTIONAL_FILES), **rules)
    for path in replaced:
        path.unlink()


def _run_config(config: CompareConfig, loss: str) -> TrainConfig:
    """Return the settings of the run with this loss."""
    settings = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    settings |= {"loss": loss, "out": config.folder / loss, "log_steps": True}
    settings["inplace"] = config.inplace and loss == "fused"  # the others have no such thing
    return TrainConfig(**settings)


def _plain(config: CompareConfig) -> dict[str, Any]:
    """Return the settings that the runs share, as strings and numbers."""
    own = ("loss", "losses", "out", "resume", "overwrite", "log_steps")
    names = [field.name for field in fields(config) if field.name not in own]
    return {name: getattr(config, name) for name in names}


def _train_in_a_process(config: TrainConfig) -> bool:
    """Train, and return whether the run was finished; if not, it has said why."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(config,))
    process.start()
    process.join()
    if process.exitcode == 130:
        raise KeyboardInterrupt
    if process.exitcode is not None and process.exitcode < 0:
        raise UserError(f"the run in {config.folder} was killed by signal {-process.exitcode}")
    return process.exitcode == 0


def _train(config: TrainConfig) -> None:
    try:
        prepare_process()
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
        "largest_step_difference": _largest(differences(run["steps"], reference["steps"], "loss")),
        "largest_difference": _largest(
            differences(run["log"], reference["log"], "train")
            + differences(run["log"], reference["log"], "val")
        ),
    }


def _largest(values: list[float]) -> float:
    """Return the maximum, NaN if one is: Python's own depends on their order."""
    return math.nan if any(map(math.isnan, values)) else max(values)


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
