"""Settings: the model's shape, a training run, and the presets; the flags come from the fields."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fused_ce.babygpt.errors import UserError

LOSSES = ("fused", "linear", "torch", "compiled")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:  # also catches nan
            raise UserError(f"{_flag(name)} must be positive, got {getattr(config, name)}")


def _require_not_negative(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise UserError(f"{_flag(name)} must not be negative, got {getattr(config, name)}")


def _require_text(config: object, *names: str) -> None:
    for name in names:
        try:
            (getattr(config, name) or "").encode()
        except UnicodeEncodeError:  # bytes on the command line that are no characters
            raise UserError(
                f"{_flag(name)} must be UTF-8 text, got {getattr(config, name)!r}"
            ) from None


def _require_folder(config: object, name: str) -> None:
    if getattr(config, name) == "":  # as a Path it would be the current folder
        raise UserError(f"{_flag(name)} must name a folder, got ''")


def _require_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be in [0, 2**63), got {seed}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a BabyGPT; without layers it is an embedding and a linear map, nothing else."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    tie_weights: bool = False

    def __post_init__(self) -> None:
        """Raise UserError where no model has this shape."""
        _require_positive(self, "vocab_size", "block_size", "n_head", "n_embd")
        _require_not_negative(self, "n_layer")
        if self.n_embd % self.n_head:
            raise UserError(
                f"--n-embd must be divisible by --n-head, got {self.n_embd} and {self.n_head}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class TrainConfig:
    """Train a BabyGPT and leave checkpoints, a log, a loss curve and weights in a folder."""

    preset: str = "quick"
    """Where the defaults come from: quick, v1, v12 or gpt2."""
    data: str = "pydocs"
    """pydocs (the standard library's help texts), ci (Song ci), kjv (the King James Bible), or the
    path of a UTF-8 text file; ci:PATH and kjv:PATH name the archive that would be downloaded."""
    tokenizer: Literal["chars", "bpe"] = "chars"
    """chars: a token is a character; bpe: byte-level BPE, which learns from the training split."""
    bpe_vocab_size: int = 4096
    """Tokens that bpe may have; a short text has fewer to learn."""
    loss: Literal["fused", "linear", "torch", "compiled"] = "fused"
    """fused: this project's cross-entropy; linear: the same from the hidden states and the head,
    with a chunk of logits at a time; torch: F.cross_entropy, to compare; compiled: the latter
    through torch.compile."""
    inplace: bool = False
    """The gradient of the fused loss overwrites the logits: less memory."""
    out: Path | None = None
    """The folder of the run; None is runs/PRESET."""
    resume: bool = False
    """Continue the run in --out, bit for bit; a larger --max-steps extends it."""
    overwrite: bool = False
    """Replace the run in --out; without it, a folder that holds a run is refused."""
    max_steps: int = 1500
    """Optimiser steps in all."""
    batch_size: int = 16
    """Windows of text in a micro-batch of one process."""
    grad_accum: int = 1
    """Micro-batches in a step, equal to one large batch."""
    block_size: int = 64
    """Tokens in a window: the longest context that the model sees."""
    n_layer: int = 3
    """Transformer blocks; 0 is an embedding and a linear map, without positions or final norm."""
    n_head: int = 4
    """Attention heads in a block."""
    n_embd: int = 96
    """Width of the embeddings; a multiple of --n-head."""
    dropout: float = 0.0
    """Probability of dropping an activation while training."""
    tie_weights: bool = False
    """Use the token embedding as the last linear map too."""
    min_vocab_size: int = 0
    """Pad the model's vocabulary to this size where the text has fewer tokens."""
    lr: float = 3e-3
    """Largest learning rate, reached after the warm-up."""
    min_lr: float | None = 1e-4
    """Learning rate after the decay; None is --lr, that is, no decay."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises from 0."""
    decay_steps: int | None = 1500
    """Step at which --min-lr is reached, warm-up counted; None is the first --max-steps."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient; inf never clips."""
    eval_interval: int = 250
    """Steps between two evaluations."""
    eval_iters: int = 50
    """Random batches of each split in an evaluation."""
    checkpoint_interval: int = 500
    """Steps between two writes of last.pt."""
    log_steps: bool = False
    """Write steps.jsonl too: loss and seconds of every step."""
    tensorboard: bool = False
    """Write what log.jsonl has for TensorBoard too."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of matrix products and logits (autocast); float16 scales its loss. Weights are float32."""
    tf32: bool = False
    """Let float32 matrix products on a GPU round their inputs to TF32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, also on a GPU."""
    fsdp: bool = False
    """Shard the model over the processes of torchrun (FSDP2) instead of copying it (DDP)."""
    vocab_parallel: bool = False
    """Shard the vocabulary, in token embedding and head, over the processes of torchrun, which
    all take the same batch: the curve is that of one process."""
    seed: int = 1337
    """Seed of the weights, the batches and the dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is a GPU."""

    def __post_init__(self) -> None:
        """Raise UserError for a value that no run can have."""
        _require_folder(self, "out")
        if self.resume and self.overwrite:
            raise UserError("--resume continues the run that --overwrite replaces: give one")
        if self.loss not in LOSSES:
            raise UserError(f"--loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.tokenizer not in ("chars", "bpe"):
            raise UserError(f"--tokenizer must be chars or bpe, got {self.tokenizer!r}")
        if self.bpe_vocab_size < 256:
            raise UserError(f"--bpe-vocab-size must be 256 or more, got {self.bpe_vocab_size}")
        if self.inplace and self.loss != "fused":
            raise UserError(f"--inplace needs --loss fused, got {self.loss}")
        if self.fsdp and self.dtype == "float16":
            raise UserError("--fsdp needs --dtype float32 or bfloat16, got float16")
        if self.vocab_parallel:
            self._check_vocab_parallel()
        _require_positive(self, "max_steps", "batch_size", "grad_accum", "lr", "clip")
        _require_positive(self, "eval_interval", "eval_iters", "checkpoint_interval")
        _require_not_negative(self, "warmup_steps", "weight_decay", "min_vocab_size")
        _require_seed(self.seed)
        if not math.isfinite(self.lr):
            raise UserError(f"--lr must be finite, got {self.lr}")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise UserError(f"--min-lr must be in [0, --lr], got {self.min_lr} and --lr {self.lr}")
        if self.decay_steps is not None and self.decay_steps < self.warmup_steps:
            raise UserError(
                f"--decay-steps counts the warm-up: at least {self.warmup_steps} is needed, "
                f"got {self.decay_steps}"
            )
        self.model(vocab_size=1)  # its checks speak of the same flags

    def _check_vocab_parallel(self) -> None:
        if self.fsdp:
            raise UserError("--vocab-parallel and --fsdp shard the model in two ways: give one")
        if self.loss not in ("fused", "linear"):
            raise UserError(f"--vocab-parallel needs --loss fused or linear, got {self.loss}")
        if self.dtype == "float16":
            raise UserError("--vocab-parallel needs --dtype float32 or bfloat16, got float16")

    def model(self, vocab_size: int) -> ModelConfig:
        """Return the shape of the model for a vocabulary of this size, padded if need be."""
        return ModelConfig(
            vocab_size=max(vocab_size, self.min_vocab_size),
            block_size=self.block_size,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            dropout=self.dropout,
            tie_weights=self.tie_weights,
        )

    @property
    def decay_end(self) -> int:
        """The step at which the learning rate is at its smallest."""
        if self.decay_steps is not None:
            return self.decay_steps
        return max(self.max_steps, self.warmup_steps)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.out if self.out is not None else f"runs/{self.preset}")


PRESETS: dict[str, TrainConfig] = {
    # The defaults above: about a minute on two CPU cores.
    "quick": TrainConfig(),
    # A table of character pairs, as BabyGPT began: embedding to linear, 65 V parameters.
    "v1": TrainConfig(
        preset="v1", block_size=8, batch_size=32, n_layer=0, n_head=1, n_embd=32,
        lr=1e-2, min_lr=None, warmup_steps=0, decay_steps=None,
        max_steps=5000, eval_interval=500, eval_iters=200, checkpoint_interval=2500,
    ),
    # What BabyGPT grew into; its size wants a GPU.
    "v12": TrainConfig(
        preset="v12", block_size=256, batch_size=64, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
        lr=3e-4, min_lr=None, warmup_steps=0, decay_steps=None,
        max_steps=5000, eval_interval=50, eval_iters=20, checkpoint_interval=250,
    ),
    # GPT-2 small, 124M parameters; 65,536 tokens a step on one GPU.
    "gpt2": TrainConfig(
        preset="gpt2", block_size=1024, batch_size=16, grad_accum=4,
        n_layer=12, n_head=12, n_embd=768, tie_weights=True,
        tokenizer="bpe", bpe_vocab_size=50_257, min_vocab_size=50_257,
        lr=6e-4, min_lr=6e-5, warmup_steps=500, decay_steps=None, weight_decay=0.1,
        max_steps=10_000, eval_interval=250, eval_iters=20, checkpoint_interval=500,
        dtype="bfloat16",
    ),
}  # fmt: skip


def preset(name: str) -> TrainConfig:
    """Return the preset of this name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """Train with several losses from the same seed; compare curves, step times and memory."""

    losses: tuple[Literal["fused", "linear", "torch", "compiled"], ...] = (
        "fused", "linear", "torch",
    )  # fmt: skip
    """What to compare; the others' curves are compared with the first's."""

    def __post_init__(self) -> None:
        """Raise UserError for a value that no comparison can have."""
        super().__post_init__()
        if self.resume:
            raise UserError("--resume is for train: a comparison begins anew")
        if self.vocab_parallel:
            raise UserError("--vocab-parallel is for train: a comparison runs in one process")
        if self.loss != "fused":
            raise UserError("--loss is for train: a comparison takes --losses")
        if len(self.losses) < 2 or len(set(self.losses)) < len(self.losses):
            raise UserError(f"--losses must be two or more, each once, got {self.losses}")

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        return Path(self.out if self.out is not None else f"runs/compare-{self.preset}")


@dataclass(frozen=True)
class SampleConfig:
    """Continue a prompt with the model of a run."""

    checkpoint: Path
    """The folder of the run: best.pt is read, else last.pt; or a checkpoint itself."""
    prompt: str = ""
    """The text to continue; every character must be in the model's vocabulary."""
    temperature: float = 0.8
    """Divides the logits: small is careful, 1 is as learnt, 0 always takes the most probable."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float | None = None
    """Draw from the fewest tokens that have this probability together."""
    max_new_tokens: int = 500
    """Tokens to add: characters, or pieces of words, as the run was trained."""
    stop: str | None = None
    """End where this text would come, which is not printed; without it, after
    --max-new-tokens."""
    num_samples: int = 1
    """Texts to draw, one after the other; each has the seed after that of the one before."""
    seed: int = 1337
    """Seed of the draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is a GPU."""

    def __post_init__(self) -> None:
        """Raise UserError for a value that no draw can have."""
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None:
            _require_positive(self, "top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be in (0, 1], got {self.top_p}")
        _require_not_negative(self, "max_new_tokens")
        _require_positive(self, "num_samples")
        _require_text(self, "prompt", "stop")
        if self.stop == "":
            raise UserError("--stop must have a character, got ''")
        _require_seed(self.seed)


@dataclass(frozen=True)
class EvalConfig:
    """Measure the model of a run on every token of a text: loss, perplexity, bits per character."""

    checkpoint: Path
    """The folder of the run: best.pt is read, else last.pt; or a checkpoint itself."""
    data: str | None = None
    """pydocs, ci, kjv, ci:PATH, kjv:PATH, or the path of a UTF-8 text file, as for train; None is
    what the run was trained on."""
    split: Literal["train", "val", "all"] | None = None
    """The first 90 %, the rest, or all of the text; None is val for the text that the run was
    trained on, and all for any other."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is a GPU."""
