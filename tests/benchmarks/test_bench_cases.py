"""Cases and inputs: the bytes are counted right, and the logits are what the case says."""

import pytest
import torch

from benchmarks.cases import CPU_CASES, DTYPES, GPU_CASES, KINDS, TINY_CASES, TINY_LINEAR, Case
from benchmarks.inputs import IGNORE_INDEX, Inputs, LinearInputs
from benchmarks.providers import Provider

READER = Provider(lambda case: None, kinds=KINDS)
WRITER = Provider(lambda case: None, kinds=KINDS, overwrites=lambda case: True)


@pytest.mark.parametrize(
    ("kind", "times"),
    [("forward", 1), ("forward_backward", 2), ("separate_backward", 3), ("in_place", 2)],
)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_are_counted_by_kind_and_dtype(kind, times, dtype, size):
    assert Case(kind, 10, 100, dtype).bytes_moved == times * 10 * 100 * size
    assert Case(kind, 10, 100, dtype, sliced=True).bytes_moved == times * 10 * 100 * size


def test_ignored_rows_are_written_and_not_read():
    assert Case("forward", 10, 100, "float32", ignored=0.3).bytes_moved == 7 * 400
    assert Case("forward_backward", 10, 100, "float32", ignored=0.3).bytes_moved == 17 * 400
    assert Case("separate_backward", 10, 100, "float32", ignored=0.3).bytes_moved == 24 * 400


@pytest.mark.parametrize("cases", [GPU_CASES, CPU_CASES], ids=["gpu", "cpu"])
def test_every_vocabulary_dtype_kind_and_form_is_there_once(cases):
    vocabularies = {65, 6148, 32000, 50257, 128256, 151936, 256000}
    assert vocabularies <= {case.vocab_size for case in cases}
    assert set(DTYPES) == {case.dtype for case in cases}
    assert set(KINDS) == {case.kind for case in cases}
    assert {True, False} == {case.sliced for case in cases}
    assert {0.0, 0.3} <= {case.ignored for case in cases}
    assert all((case.hidden_size is not None) == (case.kind == "linear") for case in cases)
    assert len(set(cases)) == len(cases)


def test_names_differ_where_cases_differ():
    for cases in (GPU_CASES, CPU_CASES, TINY_CASES, TINY_LINEAR):
        assert len({case.label for case in cases}) == len(cases)


def test_sliced_logits_begin_off_16_bytes(cpu):
    logits, _ = Inputs(Case("forward", 6, 100, "float32", sliced=True), cpu).take(READER)
    assert logits.shape == (6, 100) and logits.stride() == (103, 1)
    assert logits.data_ptr() % 16 != 0
    fresh, _ = Inputs(Case("forward", 6, 100, "float32", sliced=True), cpu).take(WRITER)
    assert fresh.stride() == (103, 1) and fresh.data_ptr() % 16 == logits.data_ptr() % 16


def test_ignored_targets_are_that_many(cpu):
    _, targets = Inputs(Case("forward", 10, 100, "float32", ignored=0.3), cpu).take(READER)
    assert int((targets == IGNORE_INDEX).sum()) == 3
    assert int(targets.max()) < 100


def test_hidden_states_and_weight_make_logits_as_a_trained_model_has(cpu):
    case = Case("linear", 300, 200, "float32", ignored=0.3, hidden_size=50)
    hidden, weight, targets = LinearInputs(case, cpu).take(READER)
    assert hidden.shape == (300, 50) and weight.shape == (200, 50) and targets.shape == (300,)
    assert hidden.requires_grad and weight.requires_grad
    assert (hidden @ weight.T).std().item() == pytest.approx(2.0, rel=0.05)
    assert int((targets == IGNORE_INDEX).sum()) == 90
    assert case.bytes_moved is None and case.sizes == (300, 50, 200)


def test_inputs_are_handed_out_in_turn(cpu):
    inputs = Inputs(Case("forward_backward", 4, 10, "float32"), cpu, count=3)
    taken = [inputs.take(READER)[0] for _ in range(4)]
    assert len({logits.data_ptr() for logits in taken}) == 3
    assert taken[0].data_ptr() == taken[3].data_ptr()
    assert not torch.equal(taken[0], taken[1])
    assert all(logits.requires_grad for logits in taken)


def test_what_was_overwritten_is_fresh_again_and_others_never_see_it(cpu):
    inputs = Inputs(Case("in_place", 4, 10, "float32"), cpu, count=2)
    pristine = [logits.clone() for logits in inputs.pristine]
    for call in range(7):
        logits, _ = inputs.take(WRITER)
        assert torch.equal(logits, pristine[call % 2])
        logits.detach().zero_()
    assert all(map(torch.equal, inputs.pristine, pristine))
    assert torch.equal(inputs.take(READER)[0], pristine[1])
