"""Several processes that train one model: who this one is, and what they do together.

Gradients are averaged over the processes, by DDP as by FSDP2, so a loss has to be divided by the
tokens of all processes over their number. Where the vocabulary lies on them all have the same
tokens, so that this is the number of one of them; see parallel.py.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_ce.babygpt.config import TrainConfig
from fused_ce.babygpt.device import resolve_device
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.model import BabyGPT
from fused_ce.babygpt.parallel import (
    clip_gradients,
    has_sharded_vocabulary,
    load_whole_state,
    shard_vocabulary,
    sharded_parameters,
    whole_state,
)

SEED_STRIDE = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: seeds near each other stay apart


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them; by default it is the only one."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """Return the seed of this process; that of the first is the run's."""
        return (seed + self.rank * SEED_STRIDE) % 2**63

    def sum(self, values: Tensor) -> Tensor:
        """Add the values of all processes, in place; a GPU does not wait."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, by rank; nobody goes on before all are here."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """Return the value of the main process."""
        return self.gather(value)[0]


@contextmanager
def world(device_name: str) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone.

    Raises:
        UserError: there is no such device, or not one for each process, or one of them is gone.
    """
    device = resolve_device(device_name)
    if not dist.is_available() or not (dist.is_initialized() or dist.is_torchelastic_launched()):
        yield World(device=device)
        return
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"--device cuda needs a GPU for each process, got {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    joins = not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, local_rank)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError("another process of the run is gone; it says why") from error
    if joins:  # not after an error: the others may be waiting in a collective
        dist.destroy_process_group()


def distribute(model: BabyGPT, config: TrainConfig, world: World) -> nn.Module:
    """Return the model to call: its backward pass averages the gradients over the processes.

    With --fsdp the parameters of the model itself become shards, with --vocab-parallel those of
    embedding and head.
    """
    if not (dist.is_available() and dist.is_initialized()):
        _refuse_to_shard(config)
    if config.fsdp:
        return _shard(model, config, world)
    if config.vocab_parallel:
        shard_vocabulary(
            model, config.loss, inplace=config.inplace, rank=world.rank, n_processes=world.size
        )
        return model
    if world.size > 1:
        device_ids = [world.device] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
    return model


def _refuse_to_shard(config: TrainConfig) -> None:
    """Raise UserError where one process is asked for what takes several."""
    need = "needs the processes of torchrun --nproc-per-node N"
    if config.fsdp:
        raise UserError(f"--fsdp {need}")
    if config.vocab_parallel:
        hint = "; --no-vocab-parallel goes on without" if config.resume else ""
        raise UserError(f"--vocab-parallel {need}{hint}")


def _shard(model: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.dtype),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does it; the normalizer must stay exact
    )
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether every process has a part of each parameter only."""
    return hasattr(model, "set_requires_gradient_sync")


@contextmanager
def averaging(model: nn.Module, now: bool) -> Iterator[None]:
    """Forward and backward in here average the gradients, or (now=False) add to them locally."""
    if is_sharded(model):
        model.set_requires_gradient_sync(now)  # type: ignore[operator]  # of FSDPModule
    elif not now and isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
        return
    yield


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradient of the whole model, and return the norm that it had."""
    if has_sharded_vocabulary(model):
        return clip_gradients(model, max_norm)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if is_sharded(model):
        norm = norm.full_tensor()  # type: ignore[attr-defined]  # a DTensor has it
    return norm


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers the whole model has."""
    counts: dict[Tensor, int]
    counts = {parameter: parameter.numel() for parameter in model.parameters()}
    if has_sharded_vocabulary(model):
        for part in sharded_parameters(model):
            counts[part] = counts[part] // len(part) * model.config.vocab_size
    return sum(counts.values())


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """Return the states of model and optimiser; of shards, on the main process at least."""
    if has_sharded_vocabulary(model):
        return whole_state(model, optimizer)
    if not is_sharded(model):
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer, options=options)


def load_full_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, model_state: dict, optimizer_state: dict
) -> None:
    """Load what `full_state` returned; every process takes its part."""
    if has_sharded_vocabulary(model):
        load_whole_state(model, optimizer, model_state, optimizer_state)
        return
    if not is_sharded(model):
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=StateDictOptions(full_state_dict=True),
    )
