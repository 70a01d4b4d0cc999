"""BabyGPT's training step, end to end, with each loss: time and peak memory."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.measure import Work, give_back_memory, interleave, peak_bytes
from benchmarks.providers import COMPILED, EAGER, OURS
from benchmarks.records import Record
from benchmarks.runner import note_of
from benchmarks.session import Session
from fused_ce.babygpt.config import PRESETS, ModelConfig, TrainConfig
from fused_ce.babygpt.model import BabyGPT, fused_loss, torch_loss
from fused_ce.babygpt.optimizer import make_optimizer

LOSS_TOLERANCE = 0.02  # nats at the first step, where every loss has the same weights and tokens


@dataclass(frozen=True)
class Training:
    """A model, a batch, and the dtype of its matrix products."""

    name: str
    model: ModelConfig
    batch_size: int
    dtype: str  # bfloat16 is autocast

    @property
    def label(self) -> str:
        """In words."""
        return f"train {self.name}, V = {self.model.vocab_size:,}, {self.dtype}"

    @property
    def n_rows(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.model.block_size


V12 = PRESETS["v12"]
GPT2 = ModelConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
TINY = ModelConfig(vocab_size=65, block_size=8, n_layer=1, n_head=2, n_embd=16)


def trainings(session: Session) -> list[Training]:
    """v12 as it is trained, and GPT-2's smallest model as it is usually trained."""
    if session.device.type == "cpu":
        return [
            Training("tiny", TINY, 2, "float32"),
            Training("tiny", replace(TINY, vocab_size=100), 2, "bfloat16"),
        ]
    v12 = Training("v12", V12.model(6148), V12.batch_size, "float32")
    return [v12, Training("gpt2", GPT2, 16, "bfloat16")]


# `F.cross_entropy` under autocast computes in float32: torch copies bfloat16 logits for it.
LOSSES: dict[str, Callable[[], Callable]] = {
    OURS: lambda: fused_loss,
    EAGER: lambda: torch_loss,
    COMPILED: lambda: _compiled(),
}


def run(session: Session, training: Training) -> None:
    """Add a record a loss: milliseconds a step, and peak memory beyond weights and optimiser."""
    device = session.device
    works, peaks, notes, losses = {}, {}, {}, {}
    for name, make in LOSSES.items():
        try:
            works[name] = _work(training, make(), device)
            losses[name] = float(works[name].call(*works[name].prepare()))
            works[name].call(*works[name].prepare())  # makes the optimiser's state
            peaks[name] = peak_bytes(works[name], device)
        except Exception as error:
            works.pop(name, None)
            notes[name] = note_of(error, device)
    for name, error in interleave(works, device, 4 * session.seconds).items():
        del works[name]
        notes[name] = note_of(error, device)
    for name in LOSSES:
        result = {"note": notes.get(name)}
        if name in works:
            rate = f"{1e3 / works[name].median:.2f} steps/s, first loss {losses[name]:.4f}"
            if abs(losses[name] - losses.get(EAGER, losses[name])) > LOSS_TOLERANCE:
                rate = f"wrong loss: {losses[name]:.4f} instead of {losses[EAGER]:.4f}"
            result = {
                "ms_median": works[name].median, "ms_spread": works[name].spread,
                "peak_bytes": peaks[name], "note": rate,
            }  # fmt: skip
        session.add(
            Record(
                **session.about, case=f"train {training.name}", n_rows=training.n_rows,
                vocab_size=training.model.vocab_size, dtype=training.dtype, provider=name, **result,
            )
        )  # fmt: skip
    del works
    give_back_memory(device)


def _compiled() -> Callable:
    torch.compiler.reset()
    return torch.compile(torch_loss, dynamic=False)


def _work(training: Training, loss_fn: Callable, device: torch.device) -> Work:
    """Steps on random tokens, which exist before the time begins."""
    torch.manual_seed(0)
    model = BabyGPT(training.model).to(device)
    model.loss = loss_fn
    optimizer = make_optimizer(model, TrainConfig())
    shape = (8, training.batch_size, training.model.block_size + 1)
    tokens = torch.randint(training.model.vocab_size, shape, device=device)
    turn = iter(range(1 << 62))

    def batch():
        windows = tokens[next(turn) % len(tokens)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def step(x, y):
        with _autocast(training, device):
            _, loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Work(batch, step)


def _autocast(training: Training, device: torch.device):
    if training.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
