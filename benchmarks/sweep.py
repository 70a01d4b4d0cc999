"""Launch variants of the kernels, timed for tuning: what kernels/launch.py decides, varied."""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from benchmarks.accuracy import Exact
from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.measure import give_back_memory, interleave
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.runner import check, note_of, work_of
from benchmarks.session import Session
from fused_ce import backend

# What to try, by the function of kernels/launch.py and the field of what it returns. A field that
# the dataclass does not have (yet, or any more) is reported and left out.
GRIDS = {
    "stream_config": {
        "num_warps": (4, 8, 16, 32),
        "block_v": (1024, 2048, 4096, 8192),
        "unroll": (1, 2, 4, 8),
        "held_tiles": (0, 1, 2, 4, 8),
        "reverse": (False, True),
        "evict": (False, True),
    },
    "small_config": {"num_warps": (1, 2, 4, 8), "block_rows": (1, 2, 4, 8, 16)},
}
TURNS = 3


@dataclass(frozen=True)
class Sweep:
    """One case under the variants of one policy function."""

    policy: str
    case: Case

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.policy}: {self.case.label}"


def sweeps(session: Session) -> list[Sweep]:
    """The two vocabularies of large models, all routes; then BabyGPT's characters."""
    if session.device.type == "cpu":
        return [Sweep("stream_config", Case("forward_backward", 4, 1100, "float32"))]
    vocabularies = (50257,) if session.quick else (128256, 50257)
    kinds = ("forward_backward",) if session.quick else ("forward_backward", "forward")
    stream = [
        Sweep("stream_config", Case(kind, 8192, vocab_size, "bfloat16"))
        for kind in kinds
        for vocab_size in vocabularies
    ]
    return [*stream, Sweep("small_config", Case("forward_backward", 65536, 65, "float32"))]


def variants(config, grid: dict[str, tuple]) -> tuple[list[dict], list[str]]:
    """Changes to a configuration, the fewest first, and the fields of the grid that it lacks.

    So that a sweep that is cut short has tried every field alone before it combines them.
    """
    known = {field.name for field in dataclasses.fields(config)}
    unknown = [name for name in grid if name not in known]
    values = {name: grid[name] for name in grid if name in known}
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in _product(values)]
    now = dataclasses.asdict(config)
    changes = [{k: v for k, v in c.items() if v != now[k]} for c in combinations]
    # the configuration's own value need not be in the grid: then "unchanged" is one more
    alone = [{name: value} for name in values for value in values[name] if value != now[name]]
    distinct = {json.dumps(change, sort_keys=True): change for change in [{}, *alone, *changes]}
    return sorted(distinct.values(), key=len), unknown


def run(session: Session, sweep: Sweep, grids: dict[str, dict[str, tuple]] = GRIDS) -> None:
    """Time every variant until the part's time is up; sweep.json is written as they come."""
    from fused_ce.kernels import launch

    inputs = Inputs(sweep.case, session.device)
    exact = Exact.of(sweep.case, inputs.pristine[0], inputs.targets[0])
    with _kernels(session.device):
        default = _default(launch, sweep, inputs)
        changes, unknown = variants(default, grids[sweep.policy])
        for name in unknown:
            session.say(f"  {type(default).__name__} has no field {name}: not varied")
        results = []
        waiting = sweeps(session)
        share = session.seconds_left / (len(waiting) - waiting.index(sweep))
        end = time.monotonic() + share
        for index, change in enumerate(changes):
            if time.monotonic() >= end:
                left = len(changes) - index
                session.left_out.append(f"sweep: {left} variants of {sweep.label}")
                break
            config = dataclasses.asdict(dataclasses.replace(default, **change))
            result = {"label": sweep.label, "change": change, "config": config}
            results.append(result | _measured(launch, sweep, change, inputs, exact, session))
            _append(session, results[-1])
    session.say(table(results))
    del inputs, exact
    give_back_memory(session.device)


def table(results: list[dict]) -> str:
    """The variants, the fastest first, the failed last."""
    timed = sorted((r for r in results if "ms" in r), key=lambda r: r["ms"])
    failed = [r for r in results if "ms" not in r]
    rows = [f"  {r['ms']:9.4f} ms ±{r['spread']:.4f}  {_words(r)}" for r in timed]
    return "\n".join(rows + [f"     failed: {_words(r)}: {r['error']}" for r in failed])


def _product(values: dict[str, tuple]) -> Iterator[tuple]:
    return itertools.product(*values.values())


def _words(result: dict) -> str:
    change = result["change"]
    return ", ".join(f"{k}={v}" for k, v in change.items()) if change else "as it is"


def _kernels(device: torch.device):
    """On a CPU the kernels run in Triton's interpreter, if that is how they were imported."""
    return backend("triton" if device.type == "cpu" else "auto")


def _default(launch, sweep: Sweep, inputs: Inputs):
    """What the policy returns for the case: asked by watching a call, whatever its arguments."""
    seen = []

    def watch(*args, **kwargs):
        seen.append(policy(*args, **kwargs))
        return seen[-1]

    policy = getattr(launch, sweep.policy)
    provider = PROVIDERS[OURS]
    with mock.patch.object(launch, sweep.policy, watch):
        work = work_of(provider.make(sweep.case), provider, inputs)
        work.call(*work.prepare())
    if not seen:
        raise LookupError(f"{sweep.policy} was not asked for {sweep.case.label}")
    return seen[0]


def _measured(launch, sweep, change, inputs, exact, session) -> dict:
    """The time of a variant, checked like any provider; or the error that it has."""
    policy = getattr(launch, sweep.policy)

    def varied(*args, **kwargs):
        return dataclasses.replace(policy(*args, **kwargs), **change)

    provider = PROVIDERS[OURS]
    with mock.patch.object(launch, sweep.policy, varied):
        try:
            loss_fn = provider.make(sweep.case)
            error = check(loss_fn, provider, inputs, exact)
            work = work_of(loss_fn, provider, inputs)
            seconds = session.seconds / 5
            failures = interleave({OURS: work}, session.device, seconds, TURNS)
            if failures:
                raise failures[OURS]
            return {"ms": work.median, "spread": work.spread, "gradient_error": error}
        except Exception as error:
            return {"error": note_of(error, session.device)}


def _append(session: Session, result: dict) -> None:
    """Rewrite sweep.json whole; the sweeps of a run share it."""
    path = session.out / "sweep.json"
    results = json.loads(path.read_text()) if path.exists() else []
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps([*results, result], indent=1) + "\n")
    os.replace(temporary, path)
