"""How the dense layers and W2 compute while a run takes steps: their precision, compilation and determinism.

Rows of W1, losses, what crosses the network, weights, gradients and optimizer states keep their dtypes, and so do
checkpoints. Evaluation computes in float32 and is not compiled, so that its metrics are those of the exported model.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from mlet_dist.config.sections import Precision, TrainConfig
from mlet_dist.errors import UserError
from mlet_dist.models.tables import layers_beside_tables


def configure_cublas(config: TrainConfig) -> None:
    """Have cuBLAS choose the same algorithms in every run if the config asks for it; call this before CUDA is used."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def dense_arithmetic(config: TrainConfig, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block, steps compute as the config says; torch's settings and the model are restored after it.

    Forward must also be within ``forward_precision``: bf16 applies to forward, and backward follows it.

    Args:
        config: ``precision``, ``compile`` and ``deterministic``.
        model: the model, whose dense layers are compiled in place; their names and those of their weights stay.
        device: where the model is.

    Raises:
        UserError: ``compile`` is true, and torch cannot compile on this machine.
    """
    with ExitStack() as stack:
        if config.precision == "tf32":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        if config.deterministic:
            stack.enter_context(_deterministic_algorithms())
        if config.compile:
            stack.enter_context(_compiled(model, device))
        yield


@contextmanager
def evaluation_arithmetic(model: nn.Module) -> Iterator[None]:
    """Within the block, which may lie in one of ``dense_arithmetic``, the model computes in float32, not compiled."""
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    calls = [module._compiled_call_impl for module in compiled]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = call  # as it was, so that nothing is compiled again
        torch.set_float32_matmul_precision(precision)


def forward_precision(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass: autocast to bfloat16 for ``bf16``, nothing for the others."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written, and filling it would cost a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextmanager
def _compiled(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Compile the dense layers in place; each is compiled when it is first called."""
    _check_compiler(device)
    layers = [layer for _, layer in layers_beside_tables(model)]
    for layer in layers:
        # Every training batch of a run has the same shape, since an incomplete one is padded.
        layer.compile(dynamic=False)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def _check_compiler(device: torch.device) -> None:
    """Raise UserError unless torch can compile here; otherwise the first step would fail with pages of text."""
    try:
        torch.compile(lambda value: value * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:
        reason = _reason(error)
        needed = "a C compiler, Python's headers and Triton" if device.type == "cuda" else "a C++ compiler such as g++"
        raise UserError(
            f"train.compile is true, and torch.compile fails on this machine: {reason}; it needs {needed}; "
            "mend that, or set train.compile=false"
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line of torch's message, and the first error of the C++ compiler if it quotes one."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    _, quoted, output = text.partition("\nOutput:\n")
    if not quoted:
        return first
    lines = [line.strip() for line in output.partition("\nSet TORCHDYNAMO")[0].splitlines() if line.strip()]
    if not lines:
        return f"{first}, and the compiler printed nothing, as when a signal ends it"
    return f"{first}: {next((line for line in lines if 'error' in line), lines[0])}"
