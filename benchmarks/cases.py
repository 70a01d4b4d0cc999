"""What is measured: the cases, and the bytes that each has to move at least."""

from dataclasses import dataclass, replace

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# forward            the loss alone, of logits that need no gradient
# forward_backward   loss and gradient; ours makes the gradient in forward
# separate_backward  loss and gradient; ours reads the logits again in backward
# in_place           loss and gradient, which may overwrite the logits
# linear             hidden states and the weight of the head: loss and both gradients
KINDS = ("forward", "forward_backward", "separate_backward", "in_place", "linear")


@dataclass(frozen=True)
class Case:
    """One measurement of every provider: the mean loss of logits (n_rows, vocab_size).

    Those of "linear" are hidden (n_rows, hidden_size) @ weight (vocab_size, hidden_size).T.
    """

    kind: str
    n_rows: int
    vocab_size: int
    dtype: str
    sliced: bool = False  # a slice of wider logits: no row begins on a 16-byte boundary
    ignored: float = 0.0  # the fraction of rows whose target is ignore_index
    hidden_size: int | None = None  # of "linear"

    @property
    def name(self) -> str:
        """What the field `case` of a record says."""
        sliced = " sliced" if self.sliced else ""
        return self.kind + sliced + (f" ignored {self.ignored:.0%}" if self.ignored else "")

    @property
    def label(self) -> str:
        """The case in words, for a log."""
        return f"{self.name}, {' x '.join(f'{size:,}' for size in self.sizes)} {self.dtype}"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows, of "linear" the size of hidden states, and vocabulary."""
        if self.hidden_size is None:
            return self.n_rows, self.vocab_size
        return self.n_rows, self.hidden_size, self.vocab_size

    @property
    def shape(self) -> "Case":
        """The same for all kinds with the same logits: inputs and compiled functions are shared."""
        return self if self.kind == "linear" else replace(self, kind="forward_backward")

    @property
    def n_ignored(self) -> int:
        """How many rows are ignored."""
        return round(self.ignored * self.n_rows)

    @property
    def logits_bytes(self) -> int:
        """The size of the logits, without what a slice leaves out."""
        return self.n_rows * self.vocab_size * DTYPES[self.dtype].itemsize

    @property
    def bytes_moved(self) -> int | None:
        """What cannot be avoided, and so is counted for every provider, whatever it moves.

        The few bytes a row of targets and losses are left out. None for "linear", whose limit is
        that of matrix products.
        """
        row = self.vocab_size * DTYPES[self.dtype].itemsize
        read = (self.n_rows - self.n_ignored) * row  # an ignored row need not be read,
        write = self.n_rows * row  # but its gradient is zeros that have to be written
        return {
            "forward": read,  # read the logits once
            "forward_backward": read + write,  # read the logits once, write the gradient once
            "separate_backward": 2 * read + write,  # once more in backward, write the gradient
            "in_place": read + write,  # read the logits once, write the gradient over them
        }.get(self.kind)


def _kinds(shapes, kinds, dtype, **changes) -> list[Case]:
    """Shape by shape, so that its kinds share inputs and compiled functions."""
    return [Case(kind, *shape, dtype, **changes) for shape in shapes for kind in kinds]


def _linear(sizes, dtype, **changes) -> list[Case]:
    """Of (rows, hidden size, vocabulary)."""
    return [
        Case("linear", n_rows, vocab_size, dtype, hidden_size=hidden_size, **changes)
        for n_rows, hidden_size, vocab_size in sizes
    ]


LOSS_AND_GRADIENT = ("forward_backward", "forward", "separate_backward")
LANGUAGE_MODELS = [(8192, 32000), (8192, 50257), (8192, 128256), (8192, 256000)]
BABYGPT = [(1024, 65), (8192, 65), (65536, 65), (16384, 6148)]

# A run that is cut short keeps what comes first: the headline, then something of everything.
HEADLINE = _kinds(LANGUAGE_MODELS, LOSS_AND_GRADIENT, "bfloat16")
FURTHER = [
    *_kinds(LANGUAGE_MODELS[2:3], ("forward_backward", "forward"), "float32"),
    *_kinds([(64, 256000)], ("forward_backward", "forward"), "bfloat16"),
    *_kinds(BABYGPT[2:], ("forward_backward", "forward"), "float32"),
    *_kinds([(8192, 50257)], LOSS_AND_GRADIENT, "bfloat16", sliced=True),
    *_kinds(LANGUAGE_MODELS[::2], ("in_place",), "bfloat16"),
    *_kinds(BABYGPT[:2], ("forward_backward", "forward"), "float32"),
    *_kinds([(1, 256000)], ("forward_backward", "forward"), "bfloat16"),
    *_kinds([LANGUAGE_MODELS[1], LANGUAGE_MODELS[3], LANGUAGE_MODELS[0]],
            ("forward_backward", "forward"), "float32"),
    *_kinds(BABYGPT[2:], ("forward_backward",), "bfloat16"),
    *_kinds([(8192, 128256)], ("forward_backward",), "bfloat16", ignored=0.3),
    *_kinds([(8192, 6148), (8192, 151936)], ("forward_backward",), "bfloat16"),
    *_kinds([(8192, 50257)], ("separate_backward", "forward_backward"), "float16"),
    *_kinds([(8192, 50257)], ("forward_backward",), "float32", sliced=True),
    *_kinds([(8192, 128256)], ("in_place",), "float32"),
]  # fmt: skip
# The third for its memory: logits of 8 GB.
LINEAR = _linear(
    [
        (8192, 4096, 128256), (4096, 4096, 128256), (16384, 2048, 248320), (8192, 4096, 151936),
        (16384, 4096, 128256),
    ],
    "bfloat16",
)  # fmt: skip
GPU_CASES = HEADLINE + LINEAR + FURTHER

# BabyGPT's sizes, then a small and a usual batch of a language model.
CPU_SHAPES = [
    (1024, 65), (8192, 65), (65536, 65), (512, 6148), (8192, 6148), (512, 32000), (2048, 32000),
    (1024, 50257), (512, 128256),
]  # fmt: skip
CPU_CASES = [
    *_kinds(CPU_SHAPES, ("forward_backward",), "float32"),
    *_kinds(CPU_SHAPES, ("forward_backward",), "bfloat16"),
    *_kinds([(1024, 50257)], ("forward_backward",), "float16"),
    *_kinds([(1024, 50257)], ("forward", "separate_backward", "in_place"), "float32"),
    *_kinds([(1024, 50257)], ("forward_backward",), "float32", sliced=True),
    *_kinds([(1024, 50257)], ("forward_backward",), "float32", ignored=0.3),
    *_kinds([(64, 151936), (64, 256000)], ("forward_backward",), "float32"),
    *_linear([(1024, 256, 16000)], "float32"),
    *_linear([(1024, 256, 16000)], "float32", ignored=0.7),
    *_linear([(1024, 256, 16000)], "bfloat16"),
    *_linear([(4096, 256, 16000)], "float32"),  # for its memory: more of the logits is spared
    *_linear([(1024, 768, 16000), (1024, 256, 50257)], "float32"),
]

# To try the suite where it would take hours: every kind and form once.
TINY_CASES = [
    *_kinds([(16, 65)], KINDS[:4], "float32"),
    *_kinds([(16, 1030)], ("forward_backward",), "bfloat16", sliced=True, ignored=0.3),
]
TINY_LINEAR = [
    *_linear([(600, 8, 65)], "float32"),
    *_linear([(2048, 8, 65)], "bfloat16", ignored=0.7),
]

# What a call costs beside its kernels shows where they take microseconds.
LAUNCH_CASES = _kinds(
    [(256, 65), (1024, 65), (64, 6148), (1024, 6148), (8, 50257)], ("forward_backward",), "float32"
)
