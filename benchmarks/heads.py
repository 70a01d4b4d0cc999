"""The heads of other libraries' models beside ours: time and memory of a step, in one process.

    python -m benchmarks.heads trl
    python -m benchmarks.heads transformers

A step is forward and backward of a small model whose vocabulary is large. Both heads are given to
the same model, in turns. Times are those of the processor, not of the clock: what else runs on the
machine is in them as little as can be.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.measure import Work, give_back_memory, peak_bytes

OURS, THEIRS = "fused_ce", "TRL's head"


@dataclass(frozen=True)
class Size:
    """Of the model and of its batch."""

    vocab_size: int = 50_257
    hidden_size: int = 256
    n_sequences: int = 4
    length: int = 512


def small_model(size: Size, dtype: torch.dtype) -> torch.nn.Module:
    """A Llama of one layer, with random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.hidden_size, num_hidden_layers=1,
        intermediate_size=2 * size.hidden_size, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=size.length,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def batch(size: Size, masked: float) -> dict[str, torch.Tensor]:
    """Tokens, of which the first part of each sequence is a prompt that is not learnt."""
    ids = torch.randint(size.vocab_size, (size.n_sequences, size.length))
    labels = ids.clone()
    labels[:, : int(masked * size.length)] = -100
    return dict(input_ids=ids, labels=labels)


# What TRL's trainers ask their heads for, and how much of the batch is masked.
OF_TRL = {
    "SFT": (("log_probs", "entropy", "is_top1"), 0.0),
    "SFT, 70 % of it prompt": (("log_probs", "entropy", "is_top1"), 0.7),
    "DPO": (("log_probs", "entropy", "mean_logits", "is_top1"), 0.3),
    "reference model": (("log_probs",), 0.3),
}


def trl_steps(size: Size, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Work]]]:
    """Each case of `OF_TRL` with both heads."""
    import transformers
    from trl.trainer.utils import add_fused_lm_head

    from fused_ce.integrations.trl import patch, unpatch

    class Trainer(transformers.Trainer):
        def __init__(self, model):
            self.model = model

    for name, (outputs, masked) in OF_TRL.items():
        trainer = Trainer(small_model(size, dtype))
        add_fused_lm_head(trainer.model, outputs=outputs)
        inputs = batch(size, masked)

        def step(trainer=trainer, inputs=inputs, learns=name != "reference model"):
            with torch.set_grad_enabled(learns):
                loss = trainer.model(**inputs, fused_lm_head=True).loss
            if learns:
                loss.backward()

        def with_head(of, trainer=trainer):
            of(trainer)
            trainer.model.zero_grad()
            return ()

        yield (
            name,
            {
                THEIRS: Work(lambda prepare=with_head: prepare(unpatch), step),
                OURS: Work(lambda prepare=with_head: prepare(patch), step),
            },
        )


# How a model of transformers computes its loss, by what is done to it.
OF_TRANSFORMERS = ("the library", "patch(model)", "fuse_head=True", "TRL's head")
MASKED = {"training step": 0.0, "70 % of it prompt": 0.7}


def transformers_steps(size: Size, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Work]]]:
    """The same model with each loss: the library's first, and last the head that TRL gives it."""
    from trl.trainer.utils import add_fused_lm_head

    from fused_ce.integrations.transformers import patch, unpatch

    for name, masked in MASKED.items():
        model, of_trl = small_model(size, dtype), small_model(size, dtype)
        add_fused_lm_head(of_trl)
        inputs = batch(size, masked)

        def step(inputs=inputs, model=model, **further):
            model(**inputs, **further).loss.backward()

        def prepare(change, model=model):
            change(model)
            model.zero_grad()
            return ()

        changes = unpatch, patch, functools.partial(patch, fuse_head=True)
        works = {
            of: Work(functools.partial(prepare, change), step)
            for of, change in zip(OF_TRANSFORMERS, changes, strict=False)
        }
        works[OF_TRANSFORMERS[-1]] = Work(
            functools.partial(prepare, lambda model: model, of_trl),
            functools.partial(step, model=of_trl, fused_lm_head=True),
        )
        yield name, works


STEPS: dict[str, Callable[[Size, torch.dtype], Iterator[tuple[str, dict[str, Work]]]]] = {
    "trl": trl_steps,
    "transformers": transformers_steps,
}


def processor_seconds(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """The median step of each, in turns; all threads together."""
    seconds = {of: [] for of in works}
    for _ in range(rounds):
        for of, work in works.items():
            arguments = work.prepare()
            start = time.process_time()
            work.call(*arguments)
            seconds[of].append(time.process_time() - start)
    return {of: statistics.median(times) for of, times in seconds.items()}


def table(library: str, size: Size, dtypes: list[torch.dtype], rounds: int) -> None:
    """Print a line of Markdown per case, as soon as it is measured: seconds, then megabytes."""
    cpu, header = torch.device("cpu"), False
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for name, works in STEPS[library](size, dtype):
            if not header:
                columns = [f"{of}, {unit}" for unit in ("s", "MB") for of in works]
                print(f"| step | dtype | {' | '.join(columns)} |")
                print("|---|---" + "|---:" * len(columns) + "|", flush=True)
                header = True
            peaks = [peak_bytes(work, cpu) / 1e6 for work in works.values()]
            times = processor_seconds(works, rounds)
            cells = [name, kind, *(f"{times[of]:.2f}" for of in works)]
            print(f"| {' | '.join([*cells, *(f'{peak:,.0f}' for peak in peaks)])} |", flush=True)
            give_back_memory(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each head")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--vocab-size", type=int, default=Size.vocab_size)
    parser.add_argument("--hidden-size", type=int, default=Size.hidden_size)
    parser.add_argument("--n-sequences", type=int, default=Size.n_sequences)
    parser.add_argument("--length", type=int, default=Size.length)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = Size(options.vocab_size, options.hidden_size, options.n_sequences, options.length)
    dtypes = [getattr(torch, name) for name in options.dtypes]
    table(options.library, size, dtypes, options.rounds)


if __name__ == "__main__":
    main()
