"""Launch variants of the kernels, timed for tuning: what kernels/policy.py decides, varied.

A function of the policy is replaced by one that returns the variant, for every vocabulary of the
sweep: a variant is compiled once, and the vocabulary that another was chosen for may like it too.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.accuracy import Exact
from benchmarks.cases import DTYPES, Case
from benchmarks.inputs import Inputs
from benchmarks.measure import Work, give_back_memory, in_a_line, interleave
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.runner import CLONE, check, clone_work, note_of, work_of
from benchmarks.session import Session
from fused_ce import backend
from fused_ce.kernels import policy as launch_policy

VECTOR = 16  # bytes a thread and tile: what a block is of follows from its threads
HELD_REGISTERS = 32 * 1024  # half of a multiprocessor's: a program that holds more spills
TURNS = 3
COMPILE_SECONDS = 60.0  # for all variants of a sweep
SHOWN = 12  # of the fastest variants, in the log; sweep.json has all


@dataclass(frozen=True)
class Sweep:
    """Cases of one dtype, under the variants of one function of the policy."""

    policy: str
    cases: tuple[Case, ...]
    share: float  # of the time, beside the others'

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.policy}: {self.cases[0].name} {self.cases[0].dtype}"

    @property
    def element_size(self) -> int:
        """Of the logits, in bytes."""
        return DTYPES[self.cases[0].dtype].itemsize


def sweeps(session: Session) -> list[Sweep]:
    """The routes of large models, gradient in forward first; then BabyGPT's characters."""
    if session.device.type == "cpu":
        return [Sweep("held_config", (Case("forward_backward", 4, 1100, "float32"),), 1.0)]
    vocabularies = (50257, 128256) if session.quick else (128256, 50257, 256000, 32000)

    def cases(kind):
        return tuple(Case(kind, 8192, vocab_size, "bfloat16") for vocab_size in vocabularies)

    return [
        Sweep("held_config", cases("forward_backward"), 0.55),
        Sweep("stream_config", cases("separate_backward"), 0.2),
        Sweep("stream_config", cases("forward"), 0.15),
        Sweep("small_config", (Case("forward_backward", 65536, 65, "float32"),), 0.1),
    ]


def grid(policy: str, element_size: int) -> Iterator[dict[str, Any]]:
    """The fields of every variant that makes sense."""
    if policy == "small_config":
        for block_rows, num_warps in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
            yield {"block_rows": block_rows, "num_warps": num_warps}
        return
    holds = policy == "held_config"
    for threads, unroll, held, evict in itertools.product(
        (256, 512, 1024) if holds else (128, 256, 512, 1024),
        (1, 2, 4, 8),
        (2, 4, 8, 16) if holds else (0,),
        ("evict_last", "evict_first", "") if holds else ("evict_last",),
    ):
        if holds and (unroll > held or threads * held * VECTOR // 4 > HELD_REGISTERS):
            continue
        yield {
            "block_v": threads * VECTOR // element_size, "unroll": unroll,
            "num_warps": threads // 32, "held": held, "evict": evict,
        }  # fmt: skip


def variants(chosen: list, fields: Iterator[dict[str, Any]]) -> list:
    """The configurations that were chosen, then those of the grid, the least different first.

    So that a sweep that is cut short has tried what is near. Threads and block count as one.
    """
    tried = [dataclasses.replace(chosen[0], **changes) for changes in fields]

    def difference(config):
        return min(len(changed(config, other)) for other in chosen)

    return list(dict.fromkeys([*chosen, *sorted(tried, key=difference)]))


def changed(config, other) -> set[str]:
    """The fields in which two configurations differ, without the block that follows from warps."""
    fields = {field.name for field in dataclasses.fields(config)}
    differ = {name for name in fields if getattr(config, name) != getattr(other, name)}
    return differ - {"block_v"} if "num_warps" in differ else differ


@dataclass
class Bench:
    """What a case needs to try a variant: inputs, the right result, and the ceiling."""

    case: Case
    inputs: Inputs
    exact: Exact
    chosen: Any = None  # the configuration that the policy returns
    clone_ms: float = 0.0

    @classmethod
    def of(cls, case: Case, device: torch.device) -> "Bench":
        """Draw the inputs and compute the result."""
        inputs = Inputs(case, device)
        return cls(case, inputs, Exact.of(case, *inputs.first))

    def work(self) -> Work:
        """Our step on the inputs in turn."""
        provider = PROVIDERS[OURS]
        return work_of(provider.make(self.case), provider, self.inputs)

    def check(self) -> float:
        """The error of our step; raises WrongResult."""
        provider = PROVIDERS[OURS]
        return check(provider.make(self.case), provider, self.inputs, self.exact).largest


def run(
    session: Session, sweep: Sweep, fields: Callable[[str, int], Iterator[dict]] = grid
) -> None:
    """Time every variant until the part's time is up; sweep.json is written as they come."""
    waiting = sweeps(session)
    waiting = waiting[waiting.index(sweep) :]
    end = time.monotonic() + session.seconds_left * sweep.share / sum(s.share for s in waiting)
    benches = [Bench.of(case, session.device) for case in sweep.cases]
    results = []
    with _kernels(session.device):
        for bench in benches:
            bench.chosen = _chosen(sweep.policy, bench)
            bench.clone_ms = _clone_ms(bench, session)
        configs = variants([b.chosen for b in benches], fields(sweep.policy, sweep.element_size))
        _compile_ahead(session, sweep, configs)
        for index, config in enumerate(configs):
            if time.monotonic() >= end:
                left = len(configs) - index
                session.left_out.append(f"sweep: {left} variants of {sweep.label}")
                break
            with _returning(sweep.policy, config):
                for bench in benches:
                    results.append(_measured(sweep, bench, config, session))
            _append(session, results[-len(benches) :])
    for bench in benches:
        session.say(f" {bench.case.label}, clone {bench.clone_ms:.4f} ms")
        session.say(table([r for r in results if r["vocab_size"] == bench.case.vocab_size]))
    del benches
    give_back_memory(session.device)


def table(results: list[dict]) -> str:
    """The variants, the fastest first, the failed last."""
    timed = sorted((r for r in results if "ms" in r), key=lambda r: r["ms"])
    failed = [r for r in results if "ms" not in r]
    rows = []
    for r in timed[:SHOWN] + [r for r in timed[SHOWN:] if r["chosen"]]:
        part = f"{r['fraction_of_clone']:6.1%} of clone"
        rows.append(f"  {r['ms']:9.4f} ms ±{r['spread']:.4f}  {part}  {_words(r)}")
    return "\n".join(rows + [f"     failed: {_words(r)}: {r['error']}" for r in failed])


def _words(result: dict) -> str:
    words = ", ".join(f"{k}={v}" for k, v in result["config"].items())
    return words + "  <- as it is" * result["chosen"]


def _kernels(device: torch.device):
    """On a CPU the kernels run in Triton's interpreter, if that is how they were imported."""
    return backend("triton" if device.type == "cpu" else "auto")


def _chosen(policy: str, bench: Bench):
    """What the policy returns for the case: asked by watching a call, whatever its arguments."""
    seen, asked = [], getattr(launch_policy, policy)

    def watch(*args, **kwargs):
        seen.append(asked(*args, **kwargs))
        return seen[-1]

    with mock.patch.object(launch_policy, policy, watch):
        work = bench.work()
        work.call(*work.prepare())
    if not seen:
        raise LookupError(f"{policy} was not asked for {bench.case.label}")
    return seen[0]


def _compile_ahead(session: Session, sweep: Sweep, configs: list) -> None:
    """Into Triton's cache, on all cores: a variant takes one of them a second or two.

    The processes have no GPU, see codegen.py. What does not compile there fails when it is timed.
    """
    if session.device.type != "cuda":
        return
    target = "sm_{}{}".format(*torch.cuda.get_device_capability(session.device))
    start = time.monotonic()
    compile_one = functools.partial(compile_variant, target, sweep.policy, sweep.cases[0])
    try:
        with multiprocessing.get_context("spawn").Pool(min(12, os.cpu_count() or 1)) as pool:
            found = pool.map_async(compile_one, configs, chunksize=1).get(timeout=COMPILE_SECONDS)
        text = f"{sum(found)} of {len(configs)} variants compiled"
    except Exception as error:
        text = f"variants are compiled as they are timed: {in_a_line(error)}"
    session.say(f"  {text}, {time.monotonic() - start:.0f} s")


def compile_variant(target: str, policy: str, case: Case, config) -> bool:
    """Compile what the launchers launch with this configuration; whether it worked."""
    from benchmarks import codegen

    try:
        codegen.compile_for(target)
        with _returning(policy, config):
            codegen.launched(codegen.launches(codegen.Case(case.vocab_size, case.dtype)))
        return True
    except Exception:
        return False


def _clone_ms(bench: Bench, session: Session) -> float:
    work = clone_work(bench.inputs)
    for error in interleave({CLONE: work}, session.device, session.seconds / 5, TURNS).values():
        raise error
    return work.median


@contextlib.contextmanager
def _returning(policy: str, config) -> Iterator[None]:
    with mock.patch.object(launch_policy, policy, lambda *args, **kwargs: config):
        yield


def _measured(sweep: Sweep, bench: Bench, config, session: Session) -> dict:
    """The time of a variant, checked like any provider; or the error that it has."""
    case = bench.case
    result = {
        "policy": sweep.policy, "case": case.name, "n_rows": case.n_rows,
        "vocab_size": case.vocab_size, "dtype": case.dtype,
        "config": dataclasses.asdict(config), "chosen": config == bench.chosen,
    }  # fmt: skip
    try:
        error = bench.check()
        work = bench.work()
        failures = interleave({OURS: work}, session.device, session.seconds / 10, TURNS)
        if failures:
            raise failures[OURS]
        n_bytes, speed = case.bytes_moved, 2 * case.logits_bytes / bench.clone_ms
        return result | {
            "ms": work.median, "spread": work.spread, "error_of_result": error,
            "gb_per_s": n_bytes / work.median / 1e6,
            "fraction_of_clone": n_bytes / work.median / speed,
        }  # fmt: skip
    except Exception as error:
        return result | {"error": note_of(error, session.device)}


def _append(session: Session, results: list[dict]) -> None:
    """Rewrite sweep.json whole; the sweeps of a run share it."""
    path = session.out / "sweep.json"
    before = json.loads(path.read_text()) if path.exists() else []
    temporary = path.with_name(f".{path.name}.tmp")
    lines = ",\n".join(" " + json.dumps(result) for result in [*before, *results])
    temporary.write_text(f"[\n{lines}\n]\n")
    os.replace(temporary, path)
