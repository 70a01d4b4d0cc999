"""Training: a run that can be stopped at any step and continued bit for bit."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from fused_ce.babygpt import data as batches
from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.checkpoint import config_to_plain, save_checkpoint
from fused_ce.babygpt.config import TrainConfig
from fused_ce.babygpt.data import Dataset
from fused_ce.babygpt.errors import CheckpointError, UserError
from fused_ce.babygpt.evaluate import estimate_loss
from fused_ce.babygpt.model import BabyGPT
from fused_ce.babygpt.optimizer import make_optimizer, make_schedule
from fused_ce.babygpt.record import Record, plot_losses
from fused_ce.babygpt.sample import stream

RUN_FILES = ("last.pt", "best.pt", "log.jsonl", "loss.png", "weights.safetensors")
SAMPLE_TOKENS = 300


class Run:
    """Everything that changes from step to step, and so everything a checkpoint has to hold."""

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device):
        """Begin at step 0, with weights drawn from the seed."""
        self.config = config
        self.dataset = dataset
        self.device = device
        torch.manual_seed(config.seed)  # draws the weights, then the dropout
        shape = config.model(dataset.tokenizer.vocab_size)
        self.model = BabyGPT(shape, config.loss).to(device)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(self.optimizer, config)
        self.batch_generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.best_val = math.inf

    def advance(self) -> Tensor:
        """Take one step and return its loss.

        Raises:
            UserError: the gradient is not finite; the weights are still those of the step before.
        """
        x, y = batches.get_batch(
            self.dataset.splits["train"],
            self.config.batch_size,
            self.config.block_size,
            generator=self.batch_generator,
            device=self.device,
        )
        _, loss = self.model(x, y)
        self.optimizer.zero_grad()
        loss.backward()
        try:
            torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), self.config.clip, error_if_nonfinite=True
            )
        except RuntimeError:
            raise UserError(
                f"stopped before step {self.step + 1}: the gradient is not finite (loss "
                f"{loss.item():.4g}); a smaller --lr or a longer warm-up may help"
            ) from None
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, in plain tensors and numbers."""
        return {
            "config": config_to_plain(self.config),
            "model_config": asdict(self.model.config),
            "vocabulary": self.dataset.tokenizer.vocabulary,
            "corpus_sha256": self.dataset.corpus_sha256,
            "step": self.step,
            "best_val": self.best_val,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batch_generator": self.batch_generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Become the run that a checkpoint describes.

        Raises:
            UserError: the text is not the one that the run was trained on.
            CheckpointError: the checkpoint does not fit its own configuration.
        """
        if saved["corpus_sha256"] != self.dataset.corpus_sha256:
            raise UserError(f"the text of --data {self.config.data} is not what the run began with")
        if saved["vocabulary"] != self.dataset.tokenizer.vocabulary:
            raise UserError(
                f"--tokenizer {self.config.tokenizer} has learnt another vocabulary than that of "
                f"the run: another version of the tokenizers library?"
            )
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.batch_generator.set_state(saved["batch_generator"])
            torch.set_rng_state(saved["torch_rng"])
            if saved["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda_rng"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError("the checkpoint does not fit its configuration") from error
        self.step = saved["step"]
        self.best_val = saved["best_val"]


def train(config: TrainConfig, saved: dict[str, Any] | None = None) -> bool:
    """Train until `max_steps` or Ctrl-C, and leave the files of RUN_FILES in the folder.

    Args:
        config: the settings.
        saved: the checkpoint to continue from; None begins anew, in the place of an older run.

    Returns:
        Whether the run was finished; False means that Ctrl-C stopped it and it can be resumed.

    Raises:
        UserError: the text, the device or the checkpoint cannot be used, or the loss diverges.
    """
    device = resolve_device(config.device)
    dataset = batches.load_dataset(config.data, config.tokenizer, config.bpe_vocab_size)
    batches.require_windows(dataset.splits, config.block_size, dataset.tokenizer.unit)
    run = Run(config, dataset, device)
    folder = config.folder
    if saved is not None:
        run.restore(saved)
        if run.step > config.max_steps:
            raise UserError(f"the run is at step {run.step}, beyond --max-steps {config.max_steps}")
    folder.mkdir(parents=True, exist_ok=True)
    with _interruptible() as interrupt:
        if saved is None:
            _clear(folder)
        record = Record(folder / "log.jsonl", until_step=None if saved is None else run.step)
        _describe(run, folder)
        finished = _loop(run, record, folder, interrupt)
        save_checkpoint(folder / "last.pt", run.state())
        if record.rows:
            plot_losses(record.rows, folder / "loss.png")
        if not finished:
            print(f"stopped at step {run.step}; --resume continues from {folder / 'last.pt'}")
            return False
        with atomic_file(folder / "weights.safetensors") as file:
            # named_parameters has tied weights once, as safetensors wants them
            file.write(safetensors.torch.save(dict(run.model.named_parameters())))
    _summarise(run, record, folder)
    return True


def _loop(run: Run, record: Record, folder: Path, interrupt: list[bool]) -> bool:
    """Step, evaluate and save until the end (True) or Ctrl-C (False)."""
    config = run.config
    seconds, steps = 0.0, 0  # of training alone, since the last evaluation
    with tqdm(
        total=config.max_steps, initial=run.step, unit=" steps", disable=None, file=sys.stderr
    ) as bar:
        while not interrupt:
            due = run.step % config.eval_interval == 0 or run.step == config.max_steps
            if due and not record.has(run.step):
                tokens = steps * config.batch_size * config.block_size
                row = _evaluate(run, tokens / seconds if steps else 0.0)
                seconds, steps = 0.0, 0
                if row["val"] < run.best_val:
                    run.best_val = row["val"]
                    save_checkpoint(folder / "best.pt", run.state())
                record.append(row)
                speed = f"  {row['tokens_per_s']:,.0f} tokens/s" if row["tokens_per_s"] else ""
                bar.write(
                    f"step {row['step']:>{len(str(config.max_steps))}}  train {row['train']:.4f}  "
                    f"val {row['val']:.4f}  lr {row['lr']:.2e}{speed}"
                )
                sys.stdout.flush()  # a pipe too shows the line now
            if run.step == config.max_steps:
                return True
            start = time.perf_counter()
            loss = run.advance()  # clipping waits for the device: the time is the step's own
            seconds, steps = seconds + time.perf_counter() - start, steps + 1
            bar.update()
            if run.step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if run.step % config.checkpoint_interval == 0:
                save_checkpoint(folder / "last.pt", run.state())
    return False


def _evaluate(run: Run, tokens_per_s: float) -> dict[str, float]:
    """Return a row of the log."""
    config = run.config
    losses = estimate_loss(
        run.model, run.dataset.splits, config.batch_size, config.block_size, config.eval_iters
    )
    return {
        "step": run.step,
        "train": losses["train"],
        "val": losses["val"],
        "lr": run.schedule.get_last_lr()[0],
        "tokens_per_s": tokens_per_s,
        "peak_memory_bytes": _peak_memory_bytes(run.device),
    }


def resolve_device(name: str) -> torch.device:
    """Return the device of "auto", "cpu" or "cuda".

    Raises:
        UserError: there is no GPU that PyTorch can use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that PyTorch can use; there is none")
    return torch.device(name)


def _peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that tensors had on the GPU, or that the process had on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where `sample` and `eval` work all the same

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """Yield a list that Ctrl-C fills, so that a step is never cut in two; a second one stops."""
    interrupt: list[bool] = []

    def handle(signum, frame):
        if interrupt:
            raise KeyboardInterrupt
        interrupt.append(True)
        print("\nCtrl-C: finishing the step and saving (again: stop at once)", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def _clear(folder: Path) -> None:
    """Remove an older run, and what a crash left half-written."""
    if (folder / "last.pt").exists() or (folder / "best.pt").exists():
        print(f"replacing the run in {folder} (--resume would continue it)")
    for path in [*(folder / name for name in RUN_FILES), *folder.glob(".*.tmp")]:
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
    print(f"{config.preset}: {parameters:,} parameters, {config.loss} loss, on {run.device}")
    print(f"{folder}: step {run.step} to {config.max_steps}")
    if run.step == config.max_steps:
        print("nothing is left to train; a larger --max-steps extends the run")


def _summarise(run: Run, record: Record, folder: Path) -> None:
    best = min(record.rows, key=lambda row: row["val"])
    print(f"\nbest val {best['val']:.4f} at step {best['step']}; a sample of the last model:\n")
    stream(
        run.model,
        run.dataset.tokenizer,
        "",
        SAMPLE_TOKENS,
        temperature=0.8,
        seed=run.config.seed,
    )
    print(f"\n{folder}: {', '.join(RUN_FILES)}")
