"""The command line: train, sample, eval and compare."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

try:
    import tyro
except ModuleNotFoundError as error:
    sys.exit(f"error: BabyGPT needs {error.name}: pip install 'fused_ce[train]'")

from fused_ce.babygpt.checkpoint import config_from_plain, newest_checkpoint
from fused_ce.babygpt.compare import compare
from fused_ce.babygpt.config import CompareConfig, EvalConfig, SampleConfig, TrainConfig, preset
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.evaluate import evaluate
from fused_ce.babygpt.sample import sample
from fused_ce.babygpt.train import train

# What may differ when a run is continued; any other change would make it another run.
CHANGEABLE = {
    "data", "max_steps", "eval_interval", "eval_iters", "checkpoint_interval", "device", "out",
    "resume", "log_steps", "tensorboard",
}  # fmt: skip
# torchrun sets them; the processes of a machine all meet the same mistakes.
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
PATIENCE_S = 10


@dataclass(frozen=True)
class _Start:
    """The flags that say where the defaults of the others come from."""

    preset: str | None = None
    out: Path | None = None
    resume: bool = False


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a model's characters
    try:
        status = _run(args)
        sys.stdout.flush()  # a reader that is gone shows here, not when Python exits
        return status
    except BrokenPipeError:  # whoever reads the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        _report(str(error))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _report(mistake: str) -> None:
    """Print one line for all processes of a machine, where they fail alike.

    When the first has said it and is gone, torchrun ends the others in their sleep.
    """
    if LOCAL_RANK:
        time.sleep(PATIENCE_S)
    process = f"process {RANK}: " if RANK else ""
    print(f"error: {process}{mistake}", file=sys.stderr, flush=True)


def _parse(*args: Any, **kwargs: Any) -> Any:
    """Call tyro; a flag that cannot be read is one line, as every other mistake."""
    kwargs["config"] = (tyro.conf.FlagCreatePairsOff,)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(*args, **kwargs)
    except SystemExit as stop:
        if stop.code:
            # tyro draws a box with a title: what is wrong, a rule, and then advice
            lines = [line.strip("│ ") for line in errors.getvalue().splitlines()]
            rule = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
            _report(" ".join(lines[1:rule]).rstrip(".") + " (see --help)")
        raise


def _run(args: list[str]) -> int:
    defaults, saved, compared = TrainConfig(), None, CompareConfig()
    if args[:1] == ["train"]:
        defaults, saved = _train_defaults(args[1:])
    elif args[:1] == ["compare"]:
        compared = CompareConfig(**vars(preset(_start(args[1:]).preset or "quick")))
    command = _parse(
        Annotated[TrainConfig, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[SampleConfig, tyro.conf.subcommand("sample")]
        | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
        | Annotated[CompareConfig, tyro.conf.subcommand("compare", default=compared)],
        args=args,
        prog="babygpt",
        description="BabyGPT: a small GPT that trains on the project's own cross-entropy.",
    )
    if isinstance(command, SampleConfig):
        sample(command)
    elif isinstance(command, EvalConfig):
        evaluate(command)
    elif isinstance(command, CompareConfig):
        return 0 if compare(command) else 1
    else:
        _refuse_changes(command, defaults, saved)
        return 0 if train(command, saved) else 130
    return 0


def _start(args: list[str]) -> _Start:
    start, _ = _parse(_Start, args=args, return_unknown_args=True, add_help=False)
    return start


def _train_defaults(args: list[str]) -> tuple[TrainConfig, dict[str, Any] | None]:
    """Return the preset's settings, or with --resume those of the run, and its checkpoint."""
    start = _start(args)
    if not start.resume or {"-h", "--help"} & set(args):
        return preset(start.preset or "quick"), None
    folder = start.out or preset(start.preset or "quick").folder
    saved, problems = newest_checkpoint(folder)
    for problem in problems if RANK == 0 else ():
        print(f"warning: {problem}; continuing from step {saved['step']}", file=sys.stderr)
    return config_from_plain(saved["config"], folder), saved


def _refuse_changes(config: TrainConfig, defaults: TrainConfig, saved: dict | None) -> None:
    """Raise UserError if a run would continue with settings that it did not begin with."""
    if saved is None:
        return
    for field in fields(config):
        before, now = getattr(defaults, field.name), getattr(config, field.name)
        if field.name not in CHANGEABLE and before != now:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag} cannot change with --resume: the run has {before}, got {now}")


if __name__ == "__main__":
    sys.exit(main())
