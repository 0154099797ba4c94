"""Named resources of TorchX (`-h h100x8`): whole nodes, less what the system and daemons of a node take.

Registered by the entry points `torchx.named_resources` of pyproject.toml. A cluster's own nodes are best named by
its own package in the same way; `-h` takes any name that is registered.
"""

from torchx.specs import Resource

_GIB = 1024  # in the MiB of TorchX


def h100x8() -> Resource:
    """A node of 8 H100 (80 GB)."""
    return Resource(cpu=160, gpu=8, memMB=1536 * _GIB)


def h200x8() -> Resource:
    """A node of 8 H200 (141 GB)."""
    return Resource(cpu=160, gpu=8, memMB=1536 * _GIB)


def a100x8() -> Resource:
    """A node of 8 A100 (40 or 80 GB)."""
    return Resource(cpu=88, gpu=8, memMB=960 * _GIB)


def gpu() -> Resource:
    """One GPU of any kind, and an eighth of such a node."""
    return Resource(cpu=10, gpu=1, memMB=96 * _GIB)


def cpu() -> Resource:
    """Two cores: enough for two ranks of a small model."""
    return Resource(cpu=2, gpu=0, memMB=6 * _GIB)


def cpu_large() -> Resource:
    """Sixteen cores, as `mlet prepare` of a large data set likes."""
    return Resource(cpu=16, gpu=0, memMB=64 * _GIB)
