"""A head whose vocabulary lies on two devices, and data on two: a mesh of two dimensions.

    torchrun --nproc-per-node 4 examples/vocab_parallel_fsdp.py

Along "data" FSDP2 shards every parameter and averages gradients; along "vocab" each rank has its
rows of the head, sees the same tokens as its neighbours, and none of them ever holds whole logits.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fused_ce import vocab_parallel_linear_cross_entropy

N_CLASSES, N_FEATURES, N_STEPS, BATCH = 101, 32, 60, 8


class Head(nn.Module):
    """A head's rows of one rank; the loss is made inside, where FSDP has gathered them."""

    def __init__(self, group):
        """Cut from a whole head, which every rank draws alike."""
        super().__init__()
        self.group = group
        rows = torch.tensor_split(torch.randn(N_CLASSES, N_FEATURES) * 0.02, group.size())
        self.weight = nn.Parameter(rows[group.rank()].clone())

    def forward(self, hidden, targets, normalizer):
        """The loss, equal on the ranks of the group."""
        return vocab_parallel_linear_cross_entropy(
            hidden, self.weight, targets, group=self.group, normalizer=normalizer
        )


class Model(nn.Module):
    """The next token from this one; the same body on every rank, and its rows of the head."""

    def __init__(self, group):
        """Of random weights."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Embedding(N_CLASSES, N_FEATURES), nn.Linear(N_FEATURES, N_FEATURES), nn.Tanh()
        )
        self.head = Head(group)

    def forward(self, tokens, targets, normalizer):
        """The loss of these tokens."""
        return self.head(self.body(tokens), targets, normalizer)


def batch_of(step, data):
    """The tokens of a step that are this rank's along "data"; every third is not learnt."""
    rows = torch.tensor_split(torch.arange(BATCH) + step * BATCH, data.size())[
        data.get_local_rank()
    ]
    tokens = (rows[:, None] * 13 + torch.arange(17) * 7) % N_CLASSES
    targets = tokens[:, 1:].clone()
    targets[rows % 3 == 0, :8] = -100
    return tokens[:, :-1], targets


def main():
    """Train, and say what the loss of all tokens was."""
    dist.init_process_group("gloo")
    n_vocab = 2 if dist.get_world_size() > 1 else 1
    shape = dist.get_world_size() // n_vocab, n_vocab
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "vocab"))
    torch.manual_seed(0)  # equal bodies, and the same whole head to cut rows from
    model = Model(mesh["vocab"].get_group())
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(N_STEPS):
        tokens, targets = batch_of(step, mesh["data"])
        n_tokens = (targets != -100).sum()
        dist.all_reduce(n_tokens, group=mesh["data"].get_group())
        # FSDP averages gradients over "data": the sum of the parts is the mean of all tokens.
        loss = model(tokens, targets, normalizer=n_tokens / mesh["data"].size())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / mesh["data"].size()
        dist.all_reduce(total, group=mesh["data"].get_group())
        if step in (0, N_STEPS - 1) and int(os.environ["RANK"]) == 0:
            print(f"step {step}: loss {total.item():.5f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
