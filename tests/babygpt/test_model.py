"""The model: its size, its shapes, and what each position can see."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fused_ce.babygpt import PRESETS, BabyGPT, ModelConfig
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.model import IGNORED, _compiled_torch_loss, evaluating, torch_loss

V = 11
SHAPE = ModelConfig(vocab_size=V, block_size=8, n_layer=2, n_head=2, n_embd=16)
V1 = PRESETS["v1"].model(V)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("vocab_size", [1, 103, 6148])
def test_v1_has_65_parameters_for_each_token(vocab_size):
    assert parameters(BabyGPT(PRESETS["v1"].model(vocab_size))) == 65 * vocab_size


def test_v12_has_the_parameters_of_its_shape():
    V, T, C, L = 6148, 256, 384, 6
    block = 12 * C * C + 9 * C + 4 * C  # matrices, their biases, two norms
    expected = V * C + T * C + L * block + 2 * C + C * V
    assert parameters(BabyGPT(PRESETS["v12"].model(V))) == expected


def test_tied_weights_are_one_tensor():
    tied = BabyGPT(ModelConfig(V, 8, 2, 2, 16, tie_weights=True))
    assert parameters(tied) == parameters(BabyGPT(SHAPE)) - V * 16
    assert tied.head.weight is tied.token_embedding.weight


@pytest.mark.parametrize("shape", [SHAPE, V1], ids=["transformer", "v1"])
@pytest.mark.parametrize("loss", ["fused", "torch"])
def test_logits_keep_their_shape_and_the_loss_is_their_cross_entropy(shape, loss):
    model = BabyGPT(shape, loss)
    idx, targets = torch.randint(V, (2, 3, 5))
    logits, none = model(idx)
    assert logits.shape == (3, 5, V) and none is None
    logits, value = model(idx, targets)
    assert logits.shape == (3, 5, V)
    torch.testing.assert_close(value, F.cross_entropy(logits.view(-1, V), targets.view(-1)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", [SHAPE, V1], ids=["transformer", "v1"])
def test_the_linear_loss_is_that_of_the_logits_and_the_head_makes_none(shape, tied):
    shape = replace(shape, tie_weights=tied)
    fused, linear = BabyGPT(shape), BabyGPT(shape, "linear")
    linear.load_state_dict(fused.state_dict())
    idx, targets = torch.randint(V, (2, 3, 5))
    targets[0, 1:] = IGNORED
    calls = []
    linear.head.register_forward_hook(lambda *call: calls.append(call))
    for normalizer in (None, torch.tensor(7.0)):
        _, expected = fused(idx, targets, normalizer=normalizer)
        logits, loss = linear(idx, targets, normalizer=normalizer)
        assert logits is None
        torch.testing.assert_close(loss, expected)
        expected.backward()
        loss.backward()
    for (name, parameter), twin in zip(linear.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-4, atol=1e-6, msg=name)
    with evaluating(linear), torch.no_grad():
        logits, loss = linear(idx, targets)
        assert logits is None and not calls
        torch.testing.assert_close(loss, fused(idx, targets)[1])
    logits, none = linear(idx)
    torch.testing.assert_close(logits, fused(idx)[0])
    assert none is None and calls


def test_the_compiled_loss_is_compiled_once_and_when_it_is_needed(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    _compiled_torch_loss.cache_clear()
    model = BabyGPT(SHAPE, "compiled")
    assert not compiled
    idx, targets = torch.randint(V, (2, 3, 5))
    for _ in range(2):
        logits, value = model(idx, targets)
        torch.testing.assert_close(value, torch_loss(logits, targets))
    assert compiled == [torch_loss]
    _compiled_torch_loss.cache_clear()


@pytest.mark.parametrize("loss", ["fused", "linear", "torch"])
def test_loss_takes_the_last_dimension_when_length_and_vocabulary_are_equal(loss):
    model = BabyGPT(ModelConfig(vocab_size=8, block_size=8, n_layer=1, n_head=2, n_embd=16), loss)
    torch.nn.init.normal_(model.head.weight)  # so that a mix-up shows
    idx, targets = torch.randint(8, (2, 4, 8))
    logits, value = model(idx)[0], model(idx, targets)[1]
    torch.testing.assert_close(value, F.cross_entropy(logits.view(-1, 8), targets.view(-1)))


def test_a_later_token_changes_no_earlier_logits():
    model = BabyGPT(SHAPE)
    idx = torch.randint(V, (2, 8))
    changed = idx.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()


def test_the_order_of_earlier_tokens_matters():
    model = BabyGPT(ModelConfig(V, 8, 1, 2, 16))  # a second layer would see it from the mask
    one, other = model(torch.tensor([[1, 2, 3]]))[0], model(torch.tensor([[2, 1, 3]]))[0]
    assert not torch.allclose(one[:, -1], other[:, -1])


@pytest.mark.parametrize("shape", [SHAPE, V1], ids=["transformer", "v1"])
def test_an_untrained_model_knows_nothing(shape):
    idx, targets = torch.randint(V, (2, 64, 8))
    assert BabyGPT(shape)(idx, targets)[1].item() == pytest.approx(math.log(V), abs=0.05)


def test_residual_projections_begin_smaller():
    model = BabyGPT(ModelConfig(V, 8, n_layer=8, n_head=2, n_embd=128))
    block = model.blocks[0]
    assert block.mlp.expansion.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (block.mlp.projection, block.attention.projection):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_dropout_acts_in_training_only():
    model = BabyGPT(ModelConfig(V, 8, 2, 2, 16, dropout=0.5))
    idx = torch.randint(V, (2, 8))
    assert not torch.equal(model(idx)[0], model(idx)[0])
    with evaluating(model):
        assert torch.equal(model(idx)[0], model(idx)[0])
    assert model.training


def test_more_positions_than_the_block_size_are_refused():
    model = BabyGPT(SHAPE)
    with pytest.raises(ValueError, match="at most 8 positions, got 9"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = model.new_cache()
    model(torch.zeros(1, 6, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="at most 8 positions, got 9"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)


@pytest.mark.parametrize(
    "lengths",
    [[8], [1] * 8, [5, 1, 1, 1], [7, 1], [1, 4, 3], [2, 2, 2, 2]],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [SHAPE, V1], ids=["transformer", "v1"])
def test_cached_logits_are_the_uncached_ones(shape, dtype, lengths):
    model = BabyGPT(shape).to(dtype).eval()
    for weight in model.parameters():  # larger than at the start: attention is not uniform
        torch.nn.init.normal_(weight, std=0.3)
    idx = torch.randint(V, (3, 8))
    cache = model.new_cache()
    pieces = [model(piece, cache=cache)[0] for piece in idx.split(lengths, dim=1)]
    tolerance = 64 * torch.finfo(dtype).eps
    expected = model(idx)[0]
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_embd": 15}, "divisible"),
        ({"n_layer": -1}, "--n-layer"),
        ({"dropout": 1.0}, "--dropout"),
        ({"vocab_size": 0}, "--vocab-size"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    shape = {"vocab_size": V, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16} | change
    with pytest.raises(UserError, match=words):
        ModelConfig(**shape)
