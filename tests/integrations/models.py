"""Tiny random causal language models, and batches of them."""

import torch
import transformers
from oracle import SEED

VOCAB_SIZE = 101
SMALL = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=2, n_positions=32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip

# Class, configuration and what is not the default of it.
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", dict(tie_word_embeddings=True)),
    "mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(head_dim=16)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", dict(head_dim=16)),
    # A cap so low that a second one, or none, would show.
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(
        head_dim=16, final_logit_softcapping=0.5, attn_implementation="eager",
        initializer_range=0.2)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(
        head_dim=16, final_logit_softcapping=0.7, initializer_range=0.2)),
    "cohere": ("CohereForCausalLM", "CohereConfig", dict(logit_scale=0.3)),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", dict(logit_scale=0.3, head_dim=16)),
    "granite": ("GraniteForCausalLM", "GraniteConfig", dict(logits_scaling=3.0)),
    "phi": ("PhiForCausalLM", "PhiConfig", {}),  # its head has a bias
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "falcon": ("FalconForCausalLM", "FalconConfig", {}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(
        num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)),
}  # fmt: skip


def tiny(name="llama", kind=None, seed=0, **further):
    cls, config, options = MODELS[name]
    given = options if options is GPT2 else {**SMALL, **options}
    torch.manual_seed(SEED + seed)
    model = (kind or getattr(transformers, cls))(getattr(transformers, config)(**given | further))
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def tokens(*shape, ignored=0.0, seed=0, first=3):
    generator = torch.Generator().manual_seed(SEED + seed)
    values = torch.randint(first, VOCAB_SIZE, shape, generator=generator)
    return values.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def batch(n=3, length=12, **further):
    labels = tokens(n, length, ignored=0.3, seed=1)
    return dict(input_ids=tokens(n, length), labels=labels) | further


def dataset(n):
    """Sequences of one length, of which very different numbers of tokens are to be learnt."""
    samples = []
    for seed in range(n):
        ids = tokens(12, seed=seed)
        labels = ids.clone()
        labels[: 1 + 5 * seed % 11] = -100
        samples.append(dict(input_ids=ids, labels=labels))
    return samples


def loss_and_gradients(model, **given):
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]


def assert_close(ours, theirs, rounding=1e-6):
    """Relative to the largest element of each tensor, and to a trace of the largest of all."""
    of_all = max(b.abs().max().item() for b in theirs if b is not None)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            atol = 4 * rounding * b.abs().max().item() + 0.01 * rounding * of_all
            torch.testing.assert_close(a, b, rtol=10 * rounding, atol=atol)
