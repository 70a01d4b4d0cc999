"""From hidden states: who is compared and with what, what is checked, and what a record says."""

import collections
import dataclasses
import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cpu as cpu_suite
from benchmarks import one, providers, records, report, tables
from benchmarks.accuracy import Exact, WrongResult
from benchmarks.cases import GPU_CASES, TINY_LINEAR, Case
from benchmarks.inputs import inputs_of
from benchmarks.products import Products
from benchmarks.providers import COMPILED, EAGER, IN_CHUNKS, OURS, PROVIDERS, Provider, offering
from benchmarks.records import Record
from benchmarks.runner import PRODUCTS, check, missing_records, run_case, step
from fused_ce import reference_linear_cross_entropy
from fused_ce.cpu import machine

CASE = Case("linear", 600, 65, "float32", hidden_size=8)
IGNORED = dataclasses.replace(CASE, n_rows=1200, ignored=0.7)
NEEDS_CHUNKS = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has no such operator"
)


def eager(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets)


@pytest.fixture
def measured(monkeypatch, cpu, about):
    """The records of a case by provider, ours and the functions given."""

    def records_of(case, **functions):
        few = {OURS: PROVIDERS[OURS]}
        for name, function in functions.items():
            few[name] = Provider(lambda case, f=function: f, kinds=("linear",))
        monkeypatch.setattr(providers, "PROVIDERS", few)
        return {record.provider: record for record in run_case(case, cpu, 0.01, about)}

    return records_of


@pytest.mark.parametrize("case", [CASE, IGNORED], ids=["all-rows", "ignored"])
@pytest.mark.parametrize(
    "name",
    [
        OURS,
        EAGER,
        pytest.param(COMPILED, marks=pytest.mark.slow),
        pytest.param(IN_CHUNKS, marks=NEEDS_CHUNKS),
    ],
)
def test_providers_agree_with_the_reference_in_value_and_gradients(name, case, cpu):
    provider, inputs = PROVIDERS[name], inputs_of(case, cpu)
    assert "linear" in provider.kinds
    found = step(provider.make(case), *inputs.take(provider))
    hidden, weight, targets = inputs.take(provider)
    loss = reference_linear_cross_entropy(hidden, weight, targets)
    exact = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    assert [tensor.shape for tensor in found] == [(), (case.n_rows, 8), (65, 8)]
    for tensor, expected in zip(found, exact, strict=True):
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-6)


def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None):
    return eager(input, weight, target)


def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, ignore_index=-100):
    return eager(x, weight, target)


def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, filter_eps="high"):
    assert filter_eps is None, "the filter leaves gradients out"
    return eager(e, c, targets)


@pytest.mark.parametrize(
    ("name", "modules", "function"),
    [
        (
            "liger",
            ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"),
            liger_fused_linear_cross_entropy,
        ),
        ("quack", ("quack", "quack.linear_cross_entropy"), chunked_linear_cross_entropy),
        ("cut_cross_entropy", ("cut_cross_entropy",), linear_cross_entropy),
    ],
)
def test_peers_are_called_by_their_names_and_signatures(name, modules, function, monkeypatch, cpu):
    """As liger-kernel 0.8.5, quack-kernels 0.6.5 and cut-cross-entropy 25.1.1 have them."""
    for module in modules:
        made = types.ModuleType(module)
        made.__spec__ = importlib.machinery.ModuleSpec(module, None)
        monkeypatch.setitem(sys.modules, module, made)
    setattr(sys.modules[modules[-1]], function.__name__, function)
    provider, inputs = PROVIDERS[name], inputs_of(CASE, cpu)
    assert "linear" in provider.kinds and not provider.overwrites(CASE)
    assert provider.missing(cpu).endswith("needs a GPU")
    assert provider.missing(torch.device("cuda")) is None
    errors = check(provider.make(CASE), provider, inputs, Exact.of(CASE, *inputs.first))
    assert errors.largest < 1e-5


def test_an_older_torch_lacks_one_provider_and_the_rest_goes_on(monkeypatch, cpu, about):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.setattr(
        providers, "PROVIDERS", {n: p for n, p in PROVIDERS.items() if n != COMPILED}
    )
    notes = {record.provider: record.note for record in missing_records(cpu, about)}
    assert notes[IN_CHUNKS].endswith("has no nn.LinearCrossEntropyOptions")
    assert set(offering(CASE, cpu)) == {OURS, EAGER}
    found = {record.provider: record for record in run_case(CASE, cpu, 0.01, about)}
    assert set(found) == {OURS, EAGER, PRODUCTS}


def products_in(call, monkeypatch):
    """The matrix products of a call: operation, shapes and dtypes, in their order."""
    made = []

    def recorded(name, function):
        def record(*operands, **named):
            *_, a, b = operands
            before = len(made)
            result = function(*operands, **named)
            del made[before:]  # on tensors without data a product may call the other
            made.append((name, tuple(a.shape), tuple(b.shape), a.dtype, b.dtype, result.dtype))
            return result

        return record

    with monkeypatch.context() as patch:
        for name in ("mm", "addmm"):
            patch.setattr(torch, name, recorded(name, getattr(torch, name)))
        patch.setattr(torch.Tensor, "addmm_", recorded("addmm", torch.Tensor.addmm_))
        call()
    return made


def multiplications(products):
    """How many, by the dtype of the operands."""
    counts = collections.Counter()
    for _, (m, k), (_, n), dtype, _, _ in products:
        counts[dtype] += m * k * n
    return counts


@pytest.mark.parametrize("natively", [False, True], ids=["copied", "natively"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_rows", [100, 3000], ids=["one-chunk", "several-chunks"])
@pytest.mark.parametrize("ignored", [0.0, 0.3], ids=["all-rows", "ignored"])
def test_the_ceiling_makes_the_products_of_ours_and_no_other(
    dtype, n_rows, ignored, natively, cpu, monkeypatch
):
    monkeypatch.setattr(machine, "multiplies", lambda dtype: natively)
    case = dataclasses.replace(CASE, dtype=dtype, n_rows=n_rows, ignored=ignored)
    inputs = inputs_of(case, cpu)
    ceiling = Products(inputs)
    made = products_in(ceiling, monkeypatch)
    ours, arguments = PROVIDERS[OURS].make(case), inputs.take(PROVIDERS[OURS])
    made_by_ours = products_in(lambda: step(ours, *arguments), monkeypatch)
    if dtype == "float32":
        assert made_by_ours == made
    else:  # ours may copy blocks of operands to float32 and multiply those
        assert multiplications(made_by_ours) == multiplications(made)
    n_chunks = -(-ceiling.n_rows // ceiling.chunk_size)
    assert len(made) == 3 * n_chunks and (n_chunks > 1) == (n_rows == 3000)


def test_on_a_gpu_the_ceiling_has_aligned_rows_and_sums_16_bits_in_32(monkeypatch):
    """On tensors that hold nothing, of which all but those of a CPU are cut as on a GPU."""
    case = Case("linear", 6000, 200001, "bfloat16", ignored=0.5, hidden_size=8)
    hidden, weight = (
        torch.empty(n, 8, device="meta", dtype=torch.bfloat16) for n in (6000, 200001)
    )
    targets = torch.empty(6000, device="meta", dtype=torch.int64)
    ceiling = Products(types.SimpleNamespace(case=case, first=(hidden, weight, targets)))
    assert ceiling.buffer.stride() == (200064, 1) and ceiling.n_rows == 6000
    half, single = torch.bfloat16, torch.float32
    chunk = [
        ("mm", (2000, 8), (8, 200001), half, half, half),
        ("mm", (2000, 200001), (200001, 8), half, half, half),
        ("mm", (200001, 2000), (2000, 8), half, half, single),
    ]
    later = [*chunk[:2], ("addmm", *chunk[2][1:])]
    assert products_in(ceiling, monkeypatch) == [*chunk, *later, *later]


def test_the_ceiling_computes_all_three_products(cpu):
    inputs = inputs_of(IGNORED, cpu)
    ceiling, (hidden, weight, targets) = Products(inputs), inputs.first
    with FlopCounterMode(display=False) as counter:
        grad_hidden, grad_weight = ceiling()
    n_counted = 1200 - 840
    assert counter.get_total_flops() == 3 * 2 * n_counted * 65 * 8
    counted = hidden[targets != -100]
    logits = counted @ weight.T
    assert torch.allclose(grad_hidden, logits @ weight, rtol=1e-4, atol=1e-4)
    assert torch.allclose(grad_weight, logits.T @ counted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["gradient of hidden", "gradient of weight (targets)", "gradient of weight (others)"]
)
def test_a_wrong_gradient_is_named_by_what_it_is_of(name, dtype, cpu):
    """The loss is right, and the rest of the gradients."""
    case = Case("linear", 40, 500, dtype, hidden_size=8)
    inputs = inputs_of(case, cpu)
    exact = Exact.of(case, *inputs.first)

    def wrong(hidden, weight, targets):
        is_target = F.one_hot(targets, 500).amax(0).bool()
        changed = {
            "gradient of hidden": hidden,
            "gradient of weight (targets)": weight[is_target],
            "gradient of weight (others)": weight[~is_target],
        }[name]
        return eager(hidden, weight, targets) + (changed - changed.detach()).sum()

    with pytest.raises(WrongResult) as error:
        check(wrong, PROVIDERS[EAGER], inputs, exact)
    assert str(error.value).startswith(f"wrong {name}: relative error ")


def test_a_wrong_provider_is_not_timed_and_the_others_are(measured):
    def transposed(hidden, weight, targets):
        return eager(hidden.flip(0), weight, targets)

    found = measured(CASE, wrong=transposed, good=eager)
    assert found["wrong"].ms_median is None and found["wrong"].note.startswith("wrong loss")
    assert found["good"].ms_median > 0 and found["good"].note is None


@pytest.mark.parametrize("case", TINY_LINEAR, ids=lambda case: case.label)
def test_records_hold_what_is_promised(measured, case, tmp_path, about):
    found = measured(case, torch=eager)
    assert set(found) == {OURS, "torch", PRODUCTS}
    products = found[PRODUCTS]
    assert products.fraction_of_products == 1.0 and products.error is None
    for name in (OURS, "torch"):
        record = found[name]
        assert (record.case, record.n_rows, record.hidden_size, record.vocab_size) == (
            case.name, case.n_rows, 8, 65,
        )  # fmt: skip
        assert record.ms_median > 0 and record.ms_spread >= 0 and record.note is None
        assert record.fraction_of_products == pytest.approx(products.ms_median / record.ms_median)
        assert record.gb_per_s is None and record.fraction_of_clone is None
        assert 0 < record.loss_error < 1e-2 and 0 < record.error < 3e-2
    assert tables.memory(found, OURS) < 1.5 < 2 < tables.memory(found, "torch")
    records.write(found.values(), tmp_path / "results.json")
    assert records.read(tmp_path / "results.json") == list(found.values())


def test_records_of_before_are_read(about, tmp_path):
    old = {"case": "forward", "n_rows": 8, "vocab_size": 65, "dtype": "float32", "provider": OURS}
    path = tmp_path / "old.json"
    path.write_text(records.json.dumps([about | old | {"ms_median": 1.0, "error": 1e-7}]))
    (record,) = records.read(path)
    assert record.hidden_size is None and record.loss_error is None and record.sizes == "8 × 65"


@pytest.fixture
def made(about):
    """Records that nobody measured: 1,000 rows of 10 numbers, a vocabulary of 500."""

    def record(provider, ms, copies, **changes):
        n_bytes = 4 * (1000 * 10 + 500 * 10) + int(copies * 4 * 1000 * 500)
        return Record(
            **about, case="linear", n_rows=1000, hidden_size=10, vocab_size=500, dtype="float32",
            provider=provider, ms_median=ms, ms_spread=0.5, fraction_of_products=20.0 / ms,
            peak_bytes=n_bytes, error=1e-6, loss_error=1e-7, **changes,
        )  # fmt: skip

    return [
        record(OURS, 25.0, 0.25, note="other processes used 30% of the CPU"),
        record(EAGER, 50.0, 3),
        record(IN_CHUNKS, 75.0, 0.5),
        record("products", 20.0, 0),
    ]


def test_table_from_hidden_states(made, about):
    other = Record(
        **about, case="forward", n_rows=8, vocab_size=65, dtype="float32", provider=OURS,
        ms_median=1.0, gb_per_s=1.0, fraction_of_clone=0.9,
    )  # fmt: skip
    lines = report.section([other, *made]).splitlines()
    head = next(line for line in lines if "| hidden |" in line)
    row = next(line for line in lines if line.startswith("| linear |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == head.count("|") - 1
    assert cells[1:8] == ["float32", "1,000", "10", "500", "25.00", "0.50", "80%"]
    assert cells[8:10] == ["2.00×", "3.00×"]
    assert cells[10:13] == ["0.25×", "3.00×", "0.50×"]
    assert cells[13:] == 3 * ["1e-07"] + 3 * ["1e-06"]
    assert "| forward | float32 | 8 | 65 |" in "\n".join(lines)
    assert "- fused_ce (linear, 1,000 × 10 × 500 float32): other processes used 30%" in lines[-1]


def test_hidden_size_tells_cases_apart(made):
    wider = [dataclasses.replace(record, hidden_size=20) for record in made]
    assert records.merge(made, wider) == made + wider


def test_one_kind_is_run_alone(uncompiled, tmp_path, capsys):
    arguments = ["--tiny", "--seconds", "0.01", "--kind", "linear", "--out", str(tmp_path)]
    assert cpu_suite.main(arguments) == 0
    text = capsys.readouterr().out
    assert text.count("| hidden |") == 1 and "GB/s" not in text
    assert "| linear | float32 | 600 | 8 | 65 |" in text
    kinds = {record.case.split()[0] for record in records.read(tmp_path / "results.json")}
    assert kinds == {"linear", "all"}


def test_the_heads_of_large_models_are_measured_on_a_gpu():
    sizes = {case.sizes for case in GPU_CASES if case.kind == "linear"}
    assert {(n_rows, 4096, 128256) for n_rows in (4096, 8192, 16384)} < sizes
    assert {(8192, 4096, 151936), (16384, 2048, 248320)} < sizes


def test_one_call_from_hidden_states(capsys):
    assert one.main(["linear", "4", "65", "float32", "--hidden-size", "8", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "fused_ce: linear, 4 x 8 x 65 float32, 1 calls\n"
