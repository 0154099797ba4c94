"""Named resources of TorchX (`-h h100x8`): complete nodes, less what the system and the daemons of a node need.

Each fits all machines of AWS, Azure and Google Cloud with these GPUs, of which the smallest have 96 virtual cores, and
680 GB of memory with 8 A100. tests/launch/test_node_sizes.py computes what kubelets and daemons leave of them.

The entry points `torchx.named_resources` of pyproject.toml register them. To name the nodes of your cluster, register
resources in your own package in the same way; `-h` takes any registered name.
"""

from torchx.specs import Resource

_GIB = 1024  # TorchX counts in MiB


def h100x8() -> Resource:
    """A node with 8 H100 (80 GB)."""
    return Resource(cpu=88, gpu=8, memMB=1536 * _GIB)


def h200x8() -> Resource:
    """A node with 8 H200 (141 GB)."""
    return Resource(cpu=88, gpu=8, memMB=1536 * _GIB)


def a100x8() -> Resource:
    """A node with 8 A100 (40 or 80 GB)."""
    return Resource(cpu=88, gpu=8, memMB=600 * _GIB)


def gpu() -> Resource:
    """One GPU of any kind, and less than an eighth of the cores and memory of a node."""
    return Resource(cpu=10, gpu=1, memMB=72 * _GIB)


def cpu() -> Resource:
    """Two cores, which suffice for two ranks of a small model."""
    return Resource(cpu=2, gpu=0, memMB=6 * _GIB)


def cpu_large() -> Resource:
    """Sixteen cores, for `mlet prepare` on a large data set."""
    return Resource(cpu=16, gpu=0, memMB=64 * _GIB)
