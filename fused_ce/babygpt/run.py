"""A run: everything that changes from step to step, and so everything that a checkpoint holds."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fused_ce.babygpt import data as batches
from fused_ce.babygpt.checkpoint import config_to_plain
from fused_ce.babygpt.config import TrainConfig
from fused_ce.babygpt.data import Dataset
from fused_ce.babygpt.distributed import (
    World,
    averaging,
    clip,
    distribute,
    full_state,
    load_full_state,
)
from fused_ce.babygpt.errors import CheckpointError, UserError
from fused_ce.babygpt.model import IGNORED, BabyGPT
from fused_ce.babygpt.optimizer import make_optimizer, make_schedule


class Run:
    """The model, its optimiser, what is drawn from, and how far it has come."""

    def __init__(self, config: TrainConfig, dataset: Dataset, world: World):
        """Begin at step 0, with weights drawn from the seed, the same in every process."""
        self.config = config
        self.dataset = dataset
        self.world = world
        # Who draws batches and dropout of its own: all processes draw the same for one vocabulary.
        self.drawing = World(device=world.device) if config.vocab_parallel else world
        torch.manual_seed(config.seed)  # draws the weights, then the dropout
        shape = config.model(dataset.tokenizer.vocab_size)
        self.model = BabyGPT(shape, config.loss, inplace=config.inplace).to(world.device)
        if config.compile:
            _compile(self.model, config)
        self.parallel = distribute(self.model, config, world)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
        if not self.drawing.is_main:
            torch.manual_seed(self.drawing.seed(config.seed))  # a dropout of its own
        self.batch_generator = torch.Generator().manual_seed(self.drawing.seed(config.seed))
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
        losses: list[Tensor] = []
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
        norm = clip(self.model, self.config.clip)
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
            "generators": self.drawing.gather(generators),
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
        n_drawing = len(saved["generators"])
        if n_drawing != self.drawing.size:
            if self.config.vocab_parallel:
                raise UserError(
                    f"--vocab-parallel cannot continue a run of {n_drawing} processes that drew "
                    "batches of their own"
                )
            processes = "1 process" if n_drawing == 1 else f"{n_drawing} processes"
            raise UserError(
                f"--resume needs {processes}, as the run began with, got {self.world.size}"
            )
        try:
            load_full_state(self.model, self.optimizer, saved["model"], saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.scaler.load_state_dict(saved["scaler"])
            generators = saved["generators"][self.drawing.rank]
            self.batch_generator.set_state(generators["batches"])
            torch.set_rng_state(generators["torch"])
            if generators["cuda"] is not None and self.world.device.type == "cuda":
                torch.cuda.set_rng_state(generators["cuda"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError("the checkpoint does not fit its configuration") from error
        self.step = saved["step"]
        self.best_val = saved["best_val"]


def _compile(model: BabyGPT, config: TrainConfig) -> None:
    """Compile in place; around shards block by block, as what these exchange cannot be compiled."""
    is_in_parts = config.fsdp or config.vocab_parallel
    for module in getattr(model, "blocks", ()) if is_in_parts else (model,):
        module.compile()
