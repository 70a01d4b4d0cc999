"""Causal language models of a thousand parameters, their tokens, and a tokenizer."""

import torch
import transformers
from oracle import SEED

VOCAB_SIZE = 101
SMALL = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip


def small(kind, **options):
    """A random model of an architecture: "Llama", say."""
    torch.manual_seed(SEED)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **options)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def llama():
    return small("Llama")


def gemma2(final_logit_softcapping=0.5):
    """It caps its logits, here so low that a second cap would show."""
    return small(
        "Gemma2", head_dim=16, final_logit_softcapping=final_logit_softcapping,
        attn_implementation="eager",
    )  # fmt: skip


def cohere():
    """It multiplies its logits."""
    return small("Cohere", logit_scale=0.3)


def granite():
    """It divides its logits."""
    return small("Granite", logits_scaling=1.7)


def phi():
    """Its head has a bias."""
    model = small("Phi")
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def mixtral():
    """It has a loss of its experts besides."""
    return small("Mixtral", num_local_experts=3, output_router_logits=True)


def tokens(*shape, ignored=0.0, seed=0):
    generator = torch.Generator().manual_seed(SEED + seed)
    values = torch.randint(4, VOCAB_SIZE, shape, generator=generator)
    return values.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def tokenizer():
    """Of a word per token: w4, w5, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), VOCAB_SIZE)]
    by_word = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    of_words = Tokenizer(by_word)
    of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=of_words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>",
    )  # fmt: skip


def text(n_words, seed):
    return " ".join(f"w{word}" for word in tokens(n_words, seed=seed).tolist())
