"""Draws from a model."""

import pytest
import torch

from fused_ce.babygpt import BabyGPT, ModelConfig
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.sample import StopText, choose_token, generate, next_logits

V = 7
LOGITS = torch.log(torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]]))


@pytest.fixture
def model():
    model = BabyGPT(ModelConfig(V, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.5))
    torch.nn.init.normal_(model.head.weight)
    return model


def interrupted(token):
    raise KeyboardInterrupt


def drawn(n=20_000, **settings):
    generator = torch.Generator().manual_seed(0)
    tokens = choose_token(LOGITS.repeat(n, 1), generator=generator, **settings)
    return torch.bincount(tokens[:, 0], minlength=5) / n


def test_greedy_takes_the_most_probable_token_each_time(model):
    start = torch.tensor([[1, 2]])
    idx = generate(model, start, 4, temperature=0)
    model.eval()
    for position in range(2, 6):
        assert idx[0, position] == model(idx[:, :position])[0][0, -1].argmax()


def test_draws_follow_the_seed(model):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, torch.tensor([[1]]), 30, generator=generator).tolist()

    assert draw(1) == draw(1) != draw(2)


def test_draws_have_the_probabilities_of_the_model():
    torch.testing.assert_close(drawn(temperature=1.0), LOGITS[0].exp(), atol=0.02, rtol=0)


def test_temperature_divides_the_logits():
    expected = (LOGITS[0] / 0.5).softmax(0)
    torch.testing.assert_close(drawn(temperature=0.5), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.75}, [1, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),
    ],
    ids=str,
)
def test_only_the_most_probable_tokens_are_drawn(settings, kept):
    expected = torch.zeros(5)
    expected[kept] = LOGITS[0].exp()[kept]
    expected /= expected.sum()
    torch.testing.assert_close(drawn(temperature=1.0, **settings), expected, atol=0.02, rtol=0)


def test_the_model_sees_the_last_block_of_what_came_before(model):
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    idx = generate(model, torch.randint(V, (2, 5)), 10, use_cache=False)
    for length, context in enumerate(seen, start=5):
        assert torch.equal(context, idx[:, max(0, length - 8) : length])
    start = torch.randint(V, (1, 20))
    assert torch.equal(generate(model, start, 3)[:, :20], start)


def test_a_cache_leaves_one_token_a_step_until_the_block_is_full(model):
    lengths = []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    generate(model, torch.randint(V, (2, 5)), 6)
    assert lengths == [5, 1, 1, 1, 8, 8]


@pytest.mark.parametrize("n_layer", [0, 2])
@pytest.mark.parametrize("start", [1, 3, 7, 8, 9, 20])
def test_cached_logits_are_the_uncached_ones_within_the_block_and_beyond(start, n_layer):
    model = BabyGPT(ModelConfig(V, block_size=8, n_layer=n_layer, n_head=2, n_embd=16)).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    idx = torch.randint(V, (2, start + 15))
    cache = model.new_cache()
    for length in range(start, start + 15):
        cached = next_logits(model, idx[:, :length], cache)
        uncached = model(idx[:, max(0, length - 8) : length])[0][:, -1]
        assert (cached - uncached).abs().max() <= 1e-13 * uncached.abs().max()


def test_a_cache_draws_the_same_text(model):
    texts = [
        generate(
            model, torch.tensor([[1], [2]]), 40, temperature=0.7, use_cache=use_cache,
            generator=torch.Generator().manual_seed(3),
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*texts)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_no_gradient_is_kept(model, training):
    model.train(training)
    modes = []
    generate(
        model, torch.tensor([[1]]), 2,
        on_token=lambda token: modes.append((model.training, torch.is_grad_enabled())),
    )  # fmt: skip
    assert modes == [(False, False)] * 2
    assert model.training == training

    with pytest.raises(KeyboardInterrupt):
        generate(model, torch.tensor([[1]]), 2, on_token=interrupted)
    assert model.training == training and torch.is_grad_enabled()


def test_every_new_token_is_announced(model):
    seen = []
    idx = generate(model, torch.tensor([[1], [2]]), 5, on_token=seen.append)
    assert torch.equal(torch.cat(seen, dim=1), idx[:, 1:])


def test_a_text_ends_where_it_is_told_to(model):
    seen = []

    def third(token):
        seen.append(token)
        return len(seen) == 3

    assert generate(model, torch.tensor([[1]]), 10, on_token=third).shape == (1, 4)
    assert len(seen) == 3


def test_logits_that_are_not_finite_are_refused():
    for value in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="not finite"):
            choose_token(torch.tensor([[0.0, value]]), temperature=0)


@pytest.mark.parametrize(
    "pieces, stop, printed",
    [
        (["a", "b", "c"], None, ["a", "b", "c"]),
        (["a", "b", "c"], "b", ["a"]),
        (["ab", "cd", "ef"], "de", ["ab", "c"]),
        (["a", "a", "b"], "ab", ["a"]),
        (["x", "a", "c"], "ab", ["x", "ac"]),
        (["abcab", "d"], "abd", ["abc"]),
        (["a", "b"], "abc", ["ab"]),
        (["a\n", "\nb"], "\n\n", ["a"]),
    ],
    ids=str,
)
def test_text_is_printed_as_soon_as_it_cannot_be_the_stop_text(pieces, stop, printed):
    written = []
    text = StopText(stop, written.append)
    stopped = [text.feed(piece) for piece in pieces][-1]
    text.finish()
    assert [piece for piece in written if piece] == printed
    assert stopped == (stop is not None and stop in "".join(pieces))


def test_a_padded_vocabulary_is_not_drawn_from(model):
    padded = generate(model, torch.tensor([[1]] * 50), 10, temperature=5.0)
    assert padded.max() == V - 1
    drawn = generate(model, torch.tensor([[1]] * 50), 10, temperature=5.0, vocab_size=3)
    assert drawn[:, 1:].unique().tolist() == [0, 1, 2]
