"""The sharded collection on this machine's device against the dense float64 reference."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig

from mlet_dist.config.sections import Precision
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.sharded.collectives import exchange_codecs
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, ExchangeChoice
from tests.gpu.machine import Machine
from tests.helpers.precision_model import (
    GLOBAL_BATCH,
    check_rounding,
    small_bags,
    small_reference,
    train_in_precision,
    train_small,
)
from tests.helpers.ranks import rank_device
from tests.helpers.sharded_module import OPTIMIZERS, full_weights, optimizer_of, shard, to_kjt

_STEPS = 3
_RELATIVE, _ABSOLUTE = 2e-5, 2e-6
_HALF_UNIT = 2.0**-11  # of FP16, relative
_LARGEST_WEIGHT = 0.35  # of small_module


def _train(
    optimizer: str,
    exchange: ExchangeChoice,
    kind: str,
    rows: DataType = DataType.FP32,
    kernels: Sequence[str] = (),
    comm: str = "fp32",
) -> dict[str, Any]:
    codecs = None if comm == "fp32" else exchange_codecs(comm, comm, GLOBAL_BATCH)  # type: ignore[arg-type]
    return train_small(optimizer, exchange, _STEPS, rows, codecs, kind=kind, kernels=kernels)


def _compare(by_rank: list[dict[str, Any]], optimizer: str) -> float:
    """Check outputs and weights of all steps; return the largest absolute difference of weights."""
    reference, largest = small_reference(optimizer), 0.0
    for step in range(_STEPS):
        for name, expected in reference.step(small_bags(step)).items():
            found = torch.cat([each["outputs"][step][name] for each in by_rank]).double()
            torch.testing.assert_close(found, expected, rtol=_RELATIVE, atol=_ABSOLUTE)
    for table in reference.tables:
        for kind, expected in (("embedding_bags", table.rows), ("projections", table.projection)):
            if expected is None:
                continue
            name = f"{kind}.{table.name}.weight"
            for each in by_rank:
                found = each["weights"][name].double()
                torch.testing.assert_close(found, expected.detach(), rtol=_RELATIVE, atol=_ABSOLUTE)
                largest = max(largest, float((found - expected.detach()).abs().max()))
                assert torch.equal(each["weights"][name], by_rank[0]["weights"][name]), f"{name} differs between ranks"
    return largest


def every_exchange_and_optimizer(machine: Machine) -> str:
    """Every exchange of row_wise tables, with every optimizer."""
    errors = [
        _compare(machine.pools(world_size).run(_train, optimizer, exchange, "row_wise"), optimizer)
        for world_size in machine.world_sizes
        for exchange in EXCHANGES
        for optimizer in OPTIMIZERS
    ]
    return f"{len(errors)} trainings of {_STEPS} steps; weights differ by at most {max(errors):.1e}"


def every_sharding_type(machine: Machine) -> str:
    """Every other sharding type, with Adagrad."""
    cases: list[tuple[str, ExchangeChoice]] = [
        ("table_wise", "auto"),
        ("table_row_wise", "after"),
        ("table_row_wise", "reduce_scatter"),
        ("data_parallel", "after"),
    ]
    errors = [
        _compare(machine.pools(world_size).run(_train, "adagrad", exchange, kind), "adagrad")
        for world_size in machine.world_sizes
        for kind, exchange in cases
    ]
    return f"{len(errors)} trainings; weights differ by at most {max(errors):.1e}"


def every_precision(machine: Machine) -> str:
    """The products with W2 in fp32, tf32 and bf16, within the bounds of their formats."""
    precisions: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
    found = {
        precision: max(
            check_rounding(machine.pools(world_size).run(train_in_precision, exchange, precision), precision)
            for world_size in machine.world_sizes
            for exchange in EXCHANGES
        )
        for precision in precisions
    }
    return "relative errors of outputs: " + ", ".join(f"{name} {error:.1e}" for name, error in found.items())


def rounded_exchange(machine: Machine) -> str:
    """Vectors and gradients that cross the network in fp16 and bf16: the run is close to the reference."""
    units, largest = {"fp16": 2.0**-11, "bf16": 2.0**-8}, {}
    for comm, unit in units.items():
        errors = []
        for world_size in machine.world_sizes:
            for exchange in EXCHANGES:
                by_rank = machine.pools(world_size).run(_train, "sgd", exchange, "row_wise", DataType.FP32, (), comm)
                for name, expected in small_reference("sgd").step(small_bags(0)).items():
                    found = torch.cat([each["outputs"][0][name] for each in by_rank]).double()
                    errors.append(float(((found - expected).abs() / expected.abs().clamp(min=1e-9)).max()))
                    assert errors[-1] <= (2 * world_size - 1) * unit * 1.01 + 1e-6, (comm, exchange, name, errors[-1])
        largest[comm] = max(errors)
    return "relative errors of outputs: " + ", ".join(f"{name} {error:.1e}" for name, error in largest.items())


def half_precision_rows(machine: Machine) -> str:
    """Rows stored in fp16: within a unit in the last place for each update of the reference."""
    cases = [(size, exchange, each) for size in machine.world_sizes for exchange in EXCHANGES for each in OPTIMIZERS]
    if machine.device == "cpu":
        cases = [case for case in cases if case[2] != "adam"]
    for world_size, exchange, optimizer in cases:
        by_rank = machine.pools(world_size).run(_train, optimizer, exchange, "row_wise", DataType.FP16)
        reference = small_reference(optimizer, DataType.FP16)
        for step in range(_STEPS):
            reference.step(small_bags(step))
        for table in reference.tables:
            found = by_rank[0]["weights"][f"embedding_bags.{table.name}.weight"].double()
            error = float((found - table.rows.detach()).abs().max())
            # Rounding to the nearest errs by half a unit, stochastic rounding by one.
            assert error < _STEPS * 2 * _HALF_UNIT * _LARGEST_WEIGHT, (
                world_size,
                exchange,
                optimizer,
                table.name,
                error,
            )
    return f"{len(cases)} trainings of {_STEPS} steps"


def _small_updates(steps: int) -> tuple[float, float]:
    """Return the sum of ``steps`` equal updates of fp16 rows, and what all rows moved by on average."""
    rows, columns, update = 512, 64, 2.0**-15  # a sixteenth of a unit in the last place
    table = EmbeddingBagConfig(
        name="t", num_embeddings=rows, embedding_dim=columns, feature_names=["f"], data_type=DataType.FP16
    )
    module = MultiLayerEmbeddingBagCollection([table], seed=1)
    with torch.no_grad():
        module.embedding_bags["t"].weight.fill_(0.5 + 2.0**-5)
    model = shard(module, "sgd", rate=update * dist.get_world_size())
    stepper = optimizer_of(model, "sgd", {"rows": update, "projections": 0.0})
    bags = {"f": [[(row, 1.0)] for row in range(rows)]}
    share = rows // dist.get_world_size()
    begin = dist.get_rank() * share
    for _ in range(steps):
        stepper.zero_grad()
        model(to_kjt(bags, begin, begin + share)).values().sum().backward()
        stepper.step()
    weights = full_weights(model)["embedding_bags.t.weight"].double()
    return update * steps, float((0.5 + 2.0**-5 - weights).mean())


def stochastic_rounding(machine: Machine) -> str:
    """Updates of fp16 rows below half a unit in the last place are right on average."""
    machine.needs_cuda("fbgemm rounds rows stochastically on CUDA alone, and to the nearest on a CPU")
    wanted, moved = machine.pools(1).run(_small_updates, 16)[0]
    # A value's 16 roundings have a variance of at most a quarter of a squared unit (2^-11) each; 32,768 values.
    sigma = 2.0**-11 / 2 * (16 / (512 * 64)) ** 0.5
    assert abs(moved - wanted) < 6 * sigma, f"moved by {moved:.3e} instead of {wanted:.3e} ± {sigma:.1e}"
    return f"16 updates of 2^-15 moved 32,768 values by {moved:.4e} on average; wanted {wanted:.4e}"


def host_memory_kernels(machine: Machine) -> str:
    """Tables in host memory (UVM), with and without a cache on the GPU."""
    machine.needs_cuda("a CPU has no other memory")
    errors = []
    for world_size in machine.world_sizes:
        for kernel in ("fused_uvm", "fused_uvm_caching"):
            for exchange in EXCHANGES:
                by_rank = machine.pools(world_size).run(
                    _train, "adagrad", exchange, "row_wise", DataType.FP32, (kernel,)
                )
                assert kernel in by_rank[0]["kernels"], by_rank[0]["kernels"]
                errors.append(_compare(by_rank, "adagrad"))
    return f"{len(errors)} trainings; weights differ by at most {max(errors):.1e}"


def _collectives() -> dict[str, float]:
    """Return the results of NCCL's or gloo's collectives that the exchanges use."""
    rank, world_size, device = dist.get_rank(), dist.get_world_size(), rank_device()
    sent = torch.full((world_size, 3), float(rank), device=device)
    received, summed, reduced = torch.empty_like(sent), sent.clone(), torch.empty(1, 3, device=device)
    dist.all_to_all_single(received, sent)
    dist.all_reduce(summed)
    dist.reduce_scatter_tensor(reduced, sent)
    return {"received": float(received[:, 0].sum()), "summed": float(summed[0, 0]), "reduced": float(reduced[0, 0])}


def collectives(machine: Machine) -> str:
    """The collectives themselves: all-to-all, all-reduce and reduce-scatter."""
    for world_size in machine.world_sizes:
        total = world_size * (world_size - 1) / 2
        for found in machine.pools(world_size).run(_collectives):
            assert set(found.values()) == {total}, (world_size, found)
    backend = "NCCL" if machine.device == "cuda" else "gloo"
    return f"{backend} on {' and '.join(map(str, machine.world_sizes))} ranks"
