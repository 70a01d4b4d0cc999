"""Training: a run that can be stopped at any step and continued bit for bit."""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from fused_ce.babygpt import data as batches
from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.checkpoint import config_to_plain, save_checkpoint
from fused_ce.babygpt.config import TrainConfig
from fused_ce.babygpt.data import Dataset
from fused_ce.babygpt.device import peak_memory_bytes
from fused_ce.babygpt.distributed import (
    World,
    averaging,
    distribute,
    full_state,
    is_sharded,
    load_full_state,
    world,
)
from fused_ce.babygpt.errors import CheckpointError, UserError
from fused_ce.babygpt.evaluate import estimate_loss
from fused_ce.babygpt.model import IGNORED, BabyGPT
from fused_ce.babygpt.optimizer import make_optimizer, make_schedule
from fused_ce.babygpt.record import Record, TensorBoard, plot_losses, require_tensorboard
from fused_ce.babygpt.sample import stream

RUN_FILES = ("last.pt", "best.pt", "log.jsonl", "loss.png", "weights.safetensors")
OPTIONAL_FILES = ("steps.jsonl",)
SAMPLE_TOKENS = 300


class Run:
    """Everything that changes from step to step, and so everything a checkpoint has to hold."""

    def __init__(self, config: TrainConfig, dataset: Dataset, world: World):
        """Begin at step 0, with weights drawn from the seed, the same in every process."""
        self.config = config
        self.dataset = dataset
        self.world = world
        torch.manual_seed(config.seed)  # draws the weights, then the dropout
        shape = config.model(dataset.tokenizer.vocab_size)
        self.model = BabyGPT(shape, config.loss, inplace=config.inplace).to(world.device)
        if config.compile:
            _compile(self.model, config)
        self.parallel = distribute(self.model, config, world)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
        if not world.is_main:
            torch.manual_seed(world.seed(config.seed))  # a dropout of its own
        self.batch_generator = torch.Generator().manual_seed(world.seed(config.seed))
        self.step = 0
        self.best_val = math.inf
        self.wants_to_stop = False  # this process, after Ctrl-C
        self.stops = False  # all of them, as they know after the step

    def advance(self) -> Tensor:
        """Take one step and return its loss, of this process's share of the tokens.

        Raises:
            UserError: the gradient is not finite; the weights are still those of the step before.
        """
        config, device = self.config, self.world.device
        micro_batches = [self._draw() for _ in range(config.grad_accum)]
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for _, y in micro_batches:
            counts[0] += (y != IGNORED).sum()
        counts[1].fill_(self.wants_to_stop)
        self.world.sum(counts)
        normalizer = counts[0].clamp(min=1) / self.world.size  # see distributed.py
        losses = []
        self.optimizer.zero_grad()
        for x, y in micro_batches:
            with averaging(self.parallel, now=len(losses) + 1 == config.grad_accum):
                with self.autocast():
                    _, loss = self.parallel(x, y, normalizer=normalizer)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        self._update(loss)
        self.stops = bool(counts[1])
        self.step += 1
        return loss

    def _draw(self) -> tuple[Tensor, Tensor]:
        return batches.get_batch(
            self.dataset.splits["train"],
            self.config.batch_size,
            self.config.block_size,
            generator=self.batch_generator,
            device=self.world.device,
        )

    def _update(self, loss: Tensor) -> None:
        """Clip the gradient and take the optimiser's step; the host waits for the device once."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if is_sharded(self.model):
            norm = norm.full_tensor()
        # Not finite in float16 is a scale too large: the scaler leaves the step out and halves it.
        if not norm.isfinite() and not self.scaler.get_scale() > 1:
            raise UserError(
                f"stopped before step {self.step + 1}: the gradient is not finite (loss "
                f"{loss.item():.4g}); a smaller --lr or a longer warm-up may help"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the model computes in --dtype."""
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=getattr(torch, self.config.dtype))

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, in plain tensors and numbers; all processes call it.

        Of shards, the state of the main process alone is whole.
        """
        model, optimizer = full_state(self.model, self.optimizer)
        on_gpu = self.world.device.type == "cuda"
        generators = {
            "batches": self.batch_generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if on_gpu else None,
        }
        return {
            "config": config_to_plain(self.config),
            "model_config": asdict(self.model.config),
            "vocabulary": self.dataset.tokenizer.vocabulary,
            "corpus_sha256": self.dataset.corpus_sha256,
            "step": self.step,
            "best_val": self.best_val,
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": self.world.gather(generators),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Become the run that a checkpoint describes.

        Raises:
            UserError: the text or the number of processes is not what the run began with.
            CheckpointError: the checkpoint does not fit its own configuration.
        """
        if saved["corpus_sha256"] != self.dataset.corpus_sha256:
            raise UserError(f"the text of --data {self.config.data} is not what the run began with")
        if saved["vocabulary"] != self.dataset.tokenizer.vocabulary:
            raise UserError(
                f"--tokenizer {self.config.tokenizer} has learnt another vocabulary than that of "
                "the run: another version of the tokenizers library?"
            )
        if len(saved["generators"]) != self.world.size:
            raise UserError(
                f"--resume needs {len(saved['generators'])} processes, as the run began with, "
                f"got {self.world.size}"
            )
        try:
            load_full_state(self.model, self.optimizer, saved["model"], saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.scaler.load_state_dict(saved["scaler"])
            generators = saved["generators"][self.world.rank]
            self.batch_generator.set_state(generators["batches"])
            torch.set_rng_state(generators["torch"])
            if generators["cuda"] is not None and self.world.device.type == "cuda":
                torch.cuda.set_rng_state(generators["cuda"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError("the checkpoint does not fit its configuration") from error
        self.step = saved["step"]
        self.best_val = saved["best_val"]


def train(config: TrainConfig, saved: dict[str, Any] | None = None) -> bool:
    """Train until `max_steps` or Ctrl-C, and leave the files of RUN_FILES in the folder.

    Under torchrun every process calls it; the first of them writes and prints.

    Args:
        config: the settings.
        saved: the checkpoint to continue from; None begins anew, in the place of an older run.

    Returns:
        Whether the run was finished; False means that Ctrl-C stopped it and it can be resumed.

    Raises:
        UserError: the text, the device or the checkpoint cannot be used, or the loss diverges.
    """
    if config.tensorboard:
        require_tensorboard()
    with world(config.device) as here, _numerics(config), _explained(config):
        run = Run(config, _load_dataset(config, here), here)
        if saved is not None:
            run.restore(saved)
            if run.step > config.max_steps:
                raise UserError(
                    f"the run is at step {run.step}, beyond --max-steps {config.max_steps}"
                )
        with _interruptible(run):
            return _train(run, is_new=saved is None)


def _train(run: Run, is_new: bool) -> bool:
    """Train and leave the files; return whether the run was finished."""
    folder, logs = run.config.folder, None
    if run.world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder, is_new)
        logs = _open_logs(run.config, None if is_new else run.step)
        _describe(run, folder)
    finished = _loop(run, logs, folder)
    state = _save(run, folder / "last.pt")
    if logs is not None:
        record = logs.record
        if record.rows:
            plot_losses(record.rows, folder / "loss.png")
        if finished:
            _finish(run, record, state, folder)
        else:
            print(f"stopped at step {run.step}; --resume continues from {folder / 'last.pt'}")
    run.world.gather(None)  # torchrun ends the others when one has left
    return finished


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


def _loop(run: Run, logs: _Logs | None, folder: Path) -> bool:
    """Step, evaluate and save until the end (True) or Ctrl-C (False); one process has logs."""
    config = run.config
    recorded = run.world.first(logs is not None and logs.record.has(run.step))
    evaluated = run.step if recorded else None
    seconds, steps = 0.0, 0  # of training alone, since the last evaluation
    tokens_per_step = config.batch_size * config.block_size * config.grad_accum * run.world.size
    with tqdm(
        total=config.max_steps,
        initial=run.step,
        unit=" steps",
        disable=None if run.world.is_main else True,
        file=sys.stderr,
    ) as bar:
        while not run.stops:
            due = run.step % config.eval_interval == 0 or run.step == config.max_steps
            if due and run.step != evaluated:
                row = _evaluate(run, steps * tokens_per_step / seconds if steps else 0.0)
                seconds, steps, evaluated = 0.0, 0, run.step
                if row["val"] < run.best_val:
                    run.best_val = row["val"]
                    _save(run, folder / "best.pt")
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
                _save(run, folder / "last.pt")
    return False


def _save(run: Run, path: Path) -> dict[str, Any]:
    """Write a checkpoint from the main process and return its state; all processes call it."""
    state = run.state()
    if run.world.is_main:
        save_checkpoint(path, state)
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
        "lr": run.schedule.get_last_lr()[0],
        "tokens_per_s": tokens_per_s,
        "peak_memory_bytes": peak_memory_bytes(run.world.device),
    }


def _show(row: dict[str, float], bar: tqdm) -> None:
    speed = f"  {row['tokens_per_s']:,.0f} tokens/s" if row["tokens_per_s"] else ""
    bar.write(
        f"step {row['step']:>{len(str(bar.total))}}  train {row['train']:.4f}  "
        f"val {row['val']:.4f}  lr {row['lr']:.2e}{speed}"
    )
    sys.stdout.flush()  # a pipe too shows the line now


def _load_dataset(config: TrainConfig, here: World) -> Dataset:
    """Encode the text in the first process of each machine, then map it in all."""
    if here.local_rank:
        here.gather(None)
    dataset = batches.load_dataset(config.data, config.tokenizer, config.bpe_vocab_size)
    if not here.local_rank:
        here.gather(None)
    batches.require_windows(dataset.splits, config.block_size, dataset.tokenizer.unit)
    return dataset


def _compile(model: BabyGPT, config: TrainConfig) -> None:
    """Compile in place; around shards block by block, as their hooks cannot be compiled."""
    for module in getattr(model, "blocks", ()) if config.fsdp else (model,):
        module.compile()


@contextmanager
def _numerics(config: TrainConfig) -> Iterator[None]:
    """Set PyTorch's global switches as a run asks for them, and put them back."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def _explained(config: TrainConfig) -> Iterator[None]:
    """Say what a user can do about the errors that PyTorch raises for lack of something."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"the GPU has too little memory for --batch-size {config.batch_size}: a smaller one "
            "with more --grad-accum makes the same step"
        ) from None
    except RuntimeError as error:
        if config.compile and type(error).__module__ == "torch._dynamo.exc":
            raise UserError(f"--compile failed: {str(error).splitlines()[0]}") from error
        raise


@contextmanager
def _interruptible(run: Run) -> Iterator[None]:
    """Let Ctrl-C tell the run to stop, so that a step is never cut in two; a second one stops."""

    def handle(signum, frame):
        if run.wants_to_stop:
            raise KeyboardInterrupt
        run.wants_to_stop = True
        if run.world.is_main:
            print("\nCtrl-C: finishing the step and saving (again: stop at once)", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _clear(folder: Path, is_new: bool) -> None:
    """Remove what a crash left half-written and, before a new run, an older one."""
    stale = list(folder.glob(".*.tmp"))
    if is_new:
        stale += [folder / name for name in (*RUN_FILES, *OPTIONAL_FILES)]
        if (folder / "last.pt").exists() or (folder / "best.pt").exists():
            print(f"replacing the run in {folder} (--resume would continue it)")
    for path in stale:
        path.unlink(missing_ok=True)


def _describe(run: Run, folder: Path) -> None:
    config = run.config
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    sizes = {name: len(tokens) for name, tokens in run.dataset.splits.items()}
    unit = run.dataset.tokenizer.unit
    print(
        f"{config.data}: {sizes['train']:,} {unit}s to train on, {sizes['val']:,} to validate, "
        f"vocabulary {run.dataset.tokenizer.vocab_size:,}"
    )
    where = (
        f"{run.world.size} x {run.world.device.type}" if run.world.size > 1 else run.world.device
    )
    print(f"{config.preset}: {parameters:,} parameters, {config.loss} loss, on {where}")
    print(f"{folder}: step {run.step} to {config.max_steps}")
    if run.step == config.max_steps:
        print("nothing is left to train; a larger --max-steps extends the run")


def _finish(run: Run, record: Record, state: dict[str, Any], folder: Path) -> None:
    """Write the weights, and show what the run has come to."""
    model = BabyGPT(run.model.config)  # one that is whole, and neither shared nor compiled
    model.load_state_dict(state["model"])
    with atomic_file(folder / "weights.safetensors") as file:
        # named_parameters has tied weights once, as safetensors wants them
        file.write(safetensors.torch.save(dict(model.named_parameters())))
    best = min(record.rows, key=lambda row: row["val"])
    print(f"\nbest val {best['val']:.4f} at step {best['step']}; a sample of the last model:\n")
    stream(
        model.to(run.world.device),
        run.dataset.tokenizer,
        "",
        SAMPLE_TOKENS,
        temperature=0.8,
        seed=run.config.seed,
    )
    print(f"\n{folder}: {', '.join(RUN_FILES)}")
