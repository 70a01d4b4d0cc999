"""transformers: a small Llama with random weights, trained by `Trainer` on the fused loss.

`Trainer` counts the labels of all micro-batches of a step and passes them to the loss, which takes
them as its normalizer: nothing is left to multiply.

    python examples/transformers_trainer.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_ce.integrations.transformers import patch

VOCAB_SIZE = 64


def data(n_sequences: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that can be foretold; of each, another part of the labels is to be learnt."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for _ in range(n_sequences):
        start, n_prompt = torch.randint(1, 24, (2,), generator=generator)
        tokens = (start + 3 * torch.arange(32)) % VOCAB_SIZE
        labels = tokens.masked_fill(torch.arange(32) < n_prompt, -100)  # the library shifts them
        sequences.append(dict(input_ids=tokens, labels=labels))
    return sequences


def new_model() -> LlamaForCausalLM:
    """One layer; a model from `from_pretrained` is patched in the same way."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, dataset: list) -> list[float]:
    """An epoch with gradient accumulation; the losses of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=4, gradient_accumulation_steps=4,
            num_train_epochs=1, learning_rate=1e-2, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=dataset)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    torch.manual_seed(0)
    losses = train(patch(new_model()), data(640))
    print(f"{len(losses)} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
