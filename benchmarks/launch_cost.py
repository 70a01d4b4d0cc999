"""The whole call of small shapes, launches included: eager, and replayed as a CUDA graph."""

import statistics
from collections.abc import Callable

import torch

from benchmarks.accuracy import Exact
from benchmarks.cases import LAUNCH_CASES, TINY_CASES, Case
from benchmarks.inputs import Inputs
from benchmarks.measure import in_a_line, wall_ms
from benchmarks.providers import Provider, offering
from benchmarks.records import Record
from benchmarks.runner import check, note_of, record_of, step
from benchmarks.session import Session

TURNS, CALLS = 7, 100


def cases(session: Session) -> list[Case]:
    """Small shapes."""
    if session.device.type == "cpu":
        return [case for case in TINY_CASES if case.kind == "forward_backward"][:1]
    return LAUNCH_CASES[::2] if session.quick else LAUNCH_CASES


def run(session: Session, case: Case) -> None:
    """Add a record a provider of "launch eager", and one of "launch graph" where there is a GPU.

    Every call has the same logits, which it finds in cache: what is timed is the call. A provider
    that overwrites them then reads its own gradient, which takes it just as long.
    """
    inputs = Inputs(case, session.device, count=1)
    exact = Exact.of(case, *inputs.first)
    eager, graphs, notes, errors = {}, {}, {}, {}
    for name, provider in offering(case, session.device).items():
        try:
            loss_fn = provider.make(case)
            errors[name] = check(loss_fn, provider, inputs, exact).largest
            eager[name] = _eager(loss_fn, provider, inputs)
            eager[name]()
        except Exception as error:
            eager.pop(name, None)
            notes["launch eager", name] = note_of(error, session.device)
            continue
        if session.device.type == "cuda":
            try:
                never_waits(eager[name])
                graphs[name] = captured(eager[name])
            except Exception as error:
                text = in_a_line(error)
                note_of(error, session.device)
                notes["launch graph", name] = f"cannot be captured: {text}"
    for kind, calls in (("launch eager", eager), ("launch graph", graphs)):
        times = {name: [] for name in calls}
        for _ in range(TURNS):
            for name, call in calls.items():
                times[name].append(wall_ms(call, session.device, CALLS))
        for name, values in times.items():
            first, middle, third = statistics.quantiles(values, n=4)
            result = {"ms_median": middle, "ms_spread": third - first, "error": errors[name]}
            session.add(_record(case, kind, name, session, **result))
    for (kind, name), note in notes.items():
        session.add(_record(case, kind, name, session, note=note))


def never_waits(call: Callable) -> None:
    """Raise where the call waits for the device, which no capture allows.

    Asked beforehand: after a capture that failed, PyTorch's random numbers and its allocator still
    believe in it, for everything that follows in this process.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Callable) -> Callable:
    """The call as a CUDA graph, to be replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch's documentation says: warm up on another stream
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay(written=results):  # holds what the graph writes to: the memory must stay its own
        graph.replay()

    return replay


def _eager(loss_fn: Callable, provider: Provider, inputs: Inputs) -> Callable:
    logits, targets = inputs.take(provider)
    return lambda: step(loss_fn, logits, targets)


def _record(case: Case, kind: str, name: str, session: Session, **result) -> Record:
    base = record_of(case, name, session.about, **result)
    return Record(**{**vars(base), "case": kind})
