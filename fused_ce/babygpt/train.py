"""Training: a run that can be stopped at any step and continued bit for bit."""

import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from tqdm import tqdm

from fused_ce.babygpt import data as batches
from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.checkpoint import save_checkpoint
from fused_ce.babygpt.config import TrainConfig
from fused_ce.babygpt.data import Dataset
from fused_ce.babygpt.device import peak_memory_bytes
from fused_ce.babygpt.distributed import World, count_parameters, world
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.evaluate import estimate_loss
from fused_ce.babygpt.folder import (
    CHECKPOINTS,
    MARK,
    OPTIONAL_FILES,
    RUN_FILES,
    claim,
    is_ours,
    refuse_foreign,
    remove_temporary,
    set_aside_foreign,
)
from fused_ce.babygpt.model import BabyGPT
from fused_ce.babygpt.plots import plot_losses
from fused_ce.babygpt.record import Record, TensorBoard, require_tensorboard
from fused_ce.babygpt.run import Run
from fused_ce.babygpt.sample import stream
from fused_ce.babygpt.surroundings import dispensable, explained, interruptible, numerics, say

SAMPLE_TOKENS = 300


def train(config: TrainConfig, saved: dict[str, Any] | None = None) -> bool:
    """Train until `max_steps` or Ctrl-C, and leave the files of RUN_FILES in the folder.

    Under torchrun every process calls it; the first of them writes and prints.

    Args:
        config: the settings.
        saved: the checkpoint to continue from; None begins anew, in the place of an older run.

    Returns:
        Whether the run was finished; False means that Ctrl-C stopped it and it can be resumed.

    Raises:
        UserError: the folder, the text, the device or the checkpoint cannot be used, or the loss
            diverges.
    """
    if config.tensorboard:
        require_tensorboard()
    with world(config.device) as here, numerics(config), explained(config):
        replaced = _claim(config, saved, here)
        run = Run(config, _load_dataset(config, saved, here), here)
        if saved is not None:
            run.restore(saved)
            if run.step > config.max_steps:
                raise UserError(
                    f"the run is at step {run.step}, beyond --max-steps {config.max_steps}"
                )
        logs = None
        if here.is_main:
            _make_room(config.folder, replaced)
            if saved is not None:
                set_aside_foreign(config.folder)
            logs = _open_logs(config, None if saved is None else run.step)
            _describe(run)
        with interruptible(lambda: _ask_to_stop(run)):
            finished = _loop(run, logs)
            state = _save(run, "last.pt")
        if logs is not None:
            _finish(run, logs.record, state, finished)
        here.gather(None)  # torchrun ends the others when one has left
        return finished


def _claim(config: TrainConfig, saved: dict[str, Any] | None, here: World) -> list[Path]:
    """Return the files that a new run replaces; what must not be replaced stops all processes."""
    replaced, refusal = [], None
    if here.is_main:
        files = (*RUN_FILES, *OPTIONAL_FILES)
        try:
            if saved is None:
                replaced = claim(config.folder, files, overwrite=config.overwrite)
            else:  # a damaged checkpoint is set aside by the run that goes on
                others = [config.folder / name for name in files if name not in CHECKPOINTS]
                refuse_foreign(path for path in others if path.exists() and not is_ours(path))
        except UserError as error:
            refusal = str(error)
    refusal = here.first(refusal)
    if refusal is not None:
        raise UserError(refusal)
    return replaced


def _make_room(folder: Path, replaced: list[Path]) -> None:
    """Make the folder, without what a new run replaces and what a crash left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder, (*RUN_FILES, *OPTIONAL_FILES))
    if replaced:
        print(f"replacing the run in {folder}")
    for path in replaced:
        path.unlink(missing_ok=True)


def _ask_to_stop(run: Run) -> bool:
    """Tell the run to stop after its step; return whether it had not been told before."""
    if run.wants_to_stop:
        return False
    run.wants_to_stop = True
    if run.world.is_main:
        say("\nCtrl-C: finishing the step and saving (again: stop at once)")
    return True


class _Logs(NamedTuple):
    """What one process writes: a line per evaluation and, when asked, per step; TensorBoard's."""

    record: Record
    steps: Record | None
    board: TensorBoard | None


def _open_logs(config: TrainConfig, until_step: int | None) -> _Logs:
    """Open the files of a new run (None), or continue those of one that goes on."""
    folder = config.folder
    return _Logs(
        Record(folder / "log.jsonl", until_step),
        Record(folder / "steps.jsonl", until_step) if config.log_steps else None,
        TensorBoard(folder / "tensorboard", until_step) if config.tensorboard else None,
    )


def _loop(run: Run, logs: _Logs | None) -> bool:
    """Step, evaluate and save until the end (True) or Ctrl-C (False); one process has logs."""
    config = run.config
    recorded = run.world.first(logs is not None and logs.record.has(run.step))
    evaluated = run.step if recorded else None
    seconds, steps = 0.0, 0  # of training alone, since the last evaluation
    tokens_per_step = config.batch_size * config.block_size * config.grad_accum * run.drawing.size
    with tqdm(
        total=config.max_steps,
        initial=run.step,
        unit=" steps",
        disable=None if run.world.is_main and sys.stderr is not None else True,
        file=sys.stderr,
    ) as bar:
        while not run.stops:
            due = run.step % config.eval_interval == 0 or run.step == config.max_steps
            if due and run.step != evaluated:
                row = _evaluate(run, steps * tokens_per_step / seconds if steps else 0.0)
                seconds, steps, evaluated = 0.0, 0, run.step
                if row["val"] < run.best_val:
                    run.best_val = row["val"]
                    _save(run, "best.pt")
                if logs is not None:
                    logs.record.append(row)
                    if logs.board is not None:
                        logs.board.append(row)
                    _show(row, bar)
            if run.step == config.max_steps:
                return True
            start = time.perf_counter()
            loss = run.advance()
            # clipping waits for the device: the time is the step's own
            elapsed = time.perf_counter() - start
            seconds, steps = seconds + elapsed, steps + 1
            if logs is not None and logs.steps is not None:
                logs.steps.append({"step": run.step, "loss": loss.item(), "seconds": elapsed})
            bar.update()
            if run.step % 10 == 0 and not bar.disable:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if run.step % config.checkpoint_interval == 0:
                _save(run, "last.pt")
    return False


def _save(run: Run, name: str) -> dict[str, Any]:
    """Write a checkpoint from the main process and return its state; all processes call it."""
    state = run.state()
    if run.world.is_main:
        save_checkpoint(run.config.folder / name, state)
    return state


def _evaluate(run: Run, tokens_per_s: float) -> dict[str, float]:
    """Return a row of the log, the same in all processes."""
    config = run.config
    with run.autocast():
        losses = estimate_loss(
            run.model, run.dataset.splits, config.batch_size, config.block_size, config.eval_iters
        )
    losses = run.world.first(losses)  # all measure the same, but two GPUs may round otherwise
    return {
        "step": run.step,
        "train": losses["train"],
        "val": losses["val"],
        "lr": float(run.schedule.get_last_lr()[0]),
        "tokens_per_s": tokens_per_s,
        "peak_memory_bytes": peak_memory_bytes(run.world.device),
    }


def _show(row: dict[str, float], bar: tqdm) -> None:
    speed = f"  {row['tokens_per_s']:,.0f} tokens/s" if row["tokens_per_s"] else ""
    line = (
        f"step {row['step']:>{len(str(bar.total))}}  train {row['train']:.4f}  "
        f"val {row['val']:.4f}  lr {row['lr']:.2e}{speed}"
    )
    with bar.external_write_mode():
        print(line, flush=True)  # a pipe too shows it now


def _load_dataset(config: TrainConfig, saved: dict[str, Any] | None, here: World) -> Dataset:
    """Encode the text in the first process of each machine, then map it in all."""
    if saved is not None and config.data == saved["config"].get("data"):
        batches.require_text_of_run(config.data)
    if here.local_rank:
        here.gather(None)
    dataset = batches.load_dataset(config.data, config.tokenizer, config.bpe_vocab_size)
    if not here.local_rank:
        here.gather(None)
    batches.require_windows(dataset.splits, config.block_size, dataset.tokenizer.unit)
    return dataset


def _describe(run: Run) -> None:
    config = run.config
    sizes = {name: len(tokens) for name, tokens in run.dataset.splits.items()}
    unit = run.dataset.tokenizer.unit
    print(
        f"{config.data}: {sizes['train']:,} {unit}s to train on, {sizes['val']:,} to validate, "
        f"vocabulary {run.dataset.tokenizer.vocab_size:,}"
    )
    where = (
        f"{run.world.size} x {run.world.device.type}" if run.world.size > 1 else run.world.device
    )
    on = "vocabulary over" if config.vocab_parallel else "on"
    print(
        f"{config.preset}: {count_parameters(run.model):,} parameters, {config.loss} loss, "
        f"{on} {where}"
    )
    print(f"{config.folder}: step {run.step} to {config.max_steps}")
    if run.step == config.max_steps:
        print("nothing is left to train; a larger --max-steps extends the run")


def _finish(run: Run, record: Record, state: dict[str, Any], finished: bool) -> None:
    """Write the weights, and show what the run has come to; its checkpoint is saved already."""
    folder = run.config.folder
    model = BabyGPT(run.model.config)  # one that is whole, and neither shared nor compiled
    if finished:
        model.load_state_dict(state["model"])
        # named_parameters has tied weights once, as safetensors wants them
        weights = safetensors.torch.save(dict(model.named_parameters()), {"made_by": MARK})
        with atomic_file(folder / "weights.safetensors") as file:
            file.write(weights)
    if record.rows:
        with dispensable("loss.png was not drawn"):
            plot_losses(record.rows, run.config, folder / "loss.png")
    if not finished:
        print(f"stopped at step {run.step}; --resume continues from {folder / 'last.pt'}")
        return
    with dispensable("no sample was drawn"):
        _show_result(run, record, model)
    print(f"\n{folder}: {', '.join(name for name in RUN_FILES if (folder / name).exists())}")


def _show_result(run: Run, record: Record, model: BabyGPT) -> None:
    best = min(record.rows, key=lambda row: (math.isnan(row["val"]), row["val"]))
    print(f"\nbest val {best['val']:.4f} at step {best['step']}; a sample of the last model:\n")
    stream(
        model.to(run.world.device),
        run.dataset.tokenizer,
        "",
        SAMPLE_TOKENS,
        temperature=0.8,
        seed=run.config.seed,
    )
