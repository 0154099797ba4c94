"""Multi-layer tables in your own model and training loop: a two-tower recommender, from planning to serving.

    torchrun --nproc-per-node 2 docs/own_model.py

The script uses only the package `mlet_dist.embeddings` of mlet_dist. Comments that begin with MLET mark what differs
from plain TorchRec.
"""

import argparse
import os
import tempfile

import torch
import torchrec
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagCollectionSharder,
    MultiLayerEmbeddingBagConfig,
    multi_layer_planner,
)

USERS, ITEMS, HISTORY, DIM, HIDDEN_DIM = 5_000, 2_000, 8, 16, 64

# MLET: hidden_dim is the width k of W1; everything else is TorchRec's EmbeddingBagConfig.
TABLES = [
    MultiLayerEmbeddingBagConfig(
        name="user_table", num_embeddings=USERS, embedding_dim=DIM, hidden_dim=HIDDEN_DIM, feature_names=["user"]
    ),
    MultiLayerEmbeddingBagConfig(
        name="item_table",
        num_embeddings=ITEMS,
        embedding_dim=DIM,
        hidden_dim=HIDDEN_DIM,
        feature_names=["item", "history"],
    ),
]


class TwoTower(nn.Module):
    """Predicts whether a user takes an item; works with any collection for the features user, item and history."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.user_tower = nn.Sequential(nn.Linear(2 * DIM, 32), nn.ReLU(), nn.Linear(32, DIM))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Return logits ``(B,)``."""
        vectors = self.embeddings(features)
        user = self.user_tower(torch.cat([vectors["user"], vectors["history"]], dim=1))
        return (user * vectors["item"]).sum(dim=1)


def make_batch(size: int, seed: int) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """Draw a batch and its labels: users of 10 kinds take items of their own kind, with up to HISTORY earlier ones."""
    draw = torch.Generator().manual_seed(seed)
    user = torch.randint(0, USERS, (size,), generator=draw)
    taken = torch.rand(size, generator=draw) < 0.5
    kind = torch.where(taken, user, user + torch.randint(1, 10, (size,), generator=draw)) % 10
    item = torch.randint(0, ITEMS // 10, (size,), generator=draw) * 10 + kind
    lengths = torch.randint(0, HISTORY + 1, (size,), generator=draw)
    kinds = torch.repeat_interleave(user % 10, lengths)
    history = torch.randint(0, ITEMS // 10, (int(lengths.sum()),), generator=draw) * 10 + kinds
    one = torch.ones(size, dtype=torch.int64)
    features = KeyedJaggedTensor(
        ["user", "item", "history"], torch.cat([user, item, history]), lengths=torch.cat([one, one, lengths])
    )
    return features, taken.float()


def shard(model: TwoTower, device: torch.device, rows_rate: float, local_batch_size: int) -> DistributedModelParallel:
    """Fuse the rows' optimizer into backward, plan, and shard the model."""
    rows = model.embeddings.embedding_bags.parameters()
    apply_optimizer_in_backward(RowWiseAdagrad, rows, {"lr": rows_rate, "eps": 1e-8})
    # MLET: the sharder. It chooses each table's exchange by the expected number of ids per batch.
    sharder = MultiLayerEmbeddingBagCollectionSharder(
        pooling_factors={"item_table": (1 + HISTORY / 2) / 2}, local_batch_size=local_batch_size
    )
    topology = Topology(world_size=dist.get_world_size(), compute_device=device.type)
    # MLET: TorchRec's planner with estimates that take W2 into account.
    planner = multi_layer_planner(model.embeddings.embedding_bag_configs(), topology, sharder)
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])
    if dist.get_rank() == 0:
        for table, (exchange, reason) in sharder.chosen.items():
            print(f"{table}: {exchange}; {reason}")
    return sharded


def build_optimizer(model: DistributedModelParallel, rows_rate: float, rate: float) -> CombinedOptimizer:
    """Combine the fused optimizer with torch's for all other parameters: the towers, W2, and data_parallel tables."""
    rest = dict(in_backward_optimizer_filter(model.named_parameters()))
    rows = {name: parameter for name, parameter in rest.items() if ".embedding_bags." in name}
    # MLET: W2 is an ordinary parameter, `….projections.<table>.weight`; it may have its own learning rate.
    others = {name: parameter for name, parameter in rest.items() if name not in rows}
    optimizers = [
        model.fused_optimizer,
        KeyedOptimizerWrapper(others, lambda parameters: torch.optim.Adagrad(parameters, lr=rate, eps=1e-8)),
    ]
    if rows:
        # The dense counterpart of the fused optimizer: SGD, Adagrad, RowWiseAdagrad, or for Adam mlet_dist's LazyAdam.
        optimizers.append(
            KeyedOptimizerWrapper(rows, lambda parameters: RowWiseAdagrad(parameters, lr=rows_rate, eps=1e-8))
        )
    return CombinedOptimizer(optimizers)


def serve(checkpoint: str, features: KeyedJaggedTensor) -> torch.Tensor:
    """Load a checkpoint, collapse W1·W2, and compute logits with a model that contains no mlet_dist module."""
    trained = TwoTower(MultiLayerEmbeddingBagCollection(TABLES))
    dcp.load(trained.state_dict(), checkpoint_id=checkpoint, no_dist=True)
    served = TwoTower(trained.embeddings.collapse())  # MLET: a plain EmbeddingBagCollection of width d
    assert type(served.embeddings) is torchrec.EmbeddingBagCollection
    served.user_tower.load_state_dict(trained.user_tower.state_dict())
    return served(features)


def main() -> None:
    """Train, print losses, and compare the served model's logits with the trained model's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=256, help="batch size of one rank")
    parser.add_argument("--rows-rate", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=0.05)
    args = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

    # MLET: the collection. On the meta device it allocates nothing until it is sharded.
    embeddings = MultiLayerEmbeddingBagCollection(TABLES, device=torch.device("meta"))
    torch.manual_seed(0)
    model = shard(TwoTower(embeddings), device, args.rows_rate, args.batch)
    optimizer = build_optimizer(model, args.rows_rate, args.rate)
    schedule = LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / 20))
    for step in range(args.steps):
        features, labels = make_batch(args.batch, seed=step * world_size + rank)
        optimizer.zero_grad()  # call it before forward: it passes the learning rate to the fused kernels
        logits = model(features.to(device))
        loss = functional.binary_cross_entropy_with_logits(logits, labels.to(device))
        loss.backward()
        optimizer.step()
        schedule.step()
        if rank == 0 and (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")

    features, _ = make_batch(args.batch, seed=2**31 + rank)
    with torch.no_grad():
        expected = model(features.to(device)).cpu()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = [directory]
        dist.broadcast_object_list(checkpoint)  # all ranks use the directory of rank 0
        dcp.save(model.state_dict(), checkpoint_id=checkpoint[0])
        if rank == 0:
            difference = (serve(directory, features) - expected).abs().max().item()
            print(f"largest difference between trained and served logits: {difference:.1e}")
            assert difference < 1e-4
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
