"""Models that TRL's trainers train, and a tokenizer for them."""

import transformers
from models import VOCAB_SIZE, tiny
from models import tokens as all_tokens

LARGE = dict(initializer_range=0.2)  # weights of which logits differ


def llama():
    return tiny("llama", **LARGE)


def gemma2(final_logit_softcapping=0.5):
    """It caps its logits, here so low that a second cap would show."""
    return tiny("gemma2", final_logit_softcapping=final_logit_softcapping)


def cohere():
    """It multiplies its logits."""
    return tiny("cohere", **LARGE)


def granite():
    """It divides its logits."""
    return tiny("granite", **LARGE)


def phi():
    """Its head has a bias."""
    return tiny("phi", **LARGE)


def mixtral():
    """It has a loss of its experts besides."""
    return tiny("mixtral", **LARGE)


def tokens(*shape, **options):
    """None of the special ones."""
    return all_tokens(*shape, first=4, **options)


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
