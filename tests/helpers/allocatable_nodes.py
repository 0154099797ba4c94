"""What Kubernetes lets pods request on machines with 8 GPUs of AWS, Azure and Google Cloud.

No machine was asked: sizes and reservations are those that the clouds publish, and where they differ by version or
setting, the one that leaves less. Memory is in GiB, CPU in virtual cores.
"""

from dataclasses import dataclass

EVICTION_GIB = 100 / 1024  # kubelets keep 100 MiB free (memory.available<100Mi)
# An assumption: firmware and the kernel, whose page tables alone take 1.6 %, keep 3 % of a machine's nominal memory.
REPORTED = 0.97

# An assumption, twice what daemons of GPU nodes commonly request: GPU plugin 0.1 cores and 0.1 GiB, DCGM exporter 0.1
# and 0.5, network plugin 0.25 and 0.3, kube-proxy 0.1 and 0.1, three storage drivers 0.2 and 0.5, logging 0.5 and 0.6,
# metrics 0.25 and 0.4.
DAEMONS_CPU, DAEMONS_GIB = 3.0, 5.0


@dataclass(frozen=True)
class Node:
    """A kind of machine, and what its kubelet leaves to pods."""

    name: str
    gpu: str
    cpu: float
    memory_gib: float

    @property
    def free_cpu(self) -> float:
        return self.cpu - DAEMONS_CPU

    @property
    def free_gib(self) -> float:
        return self.memory_gib - DAEMONS_GIB


def _stepped(amount: float, steps: list[tuple[float, float]]) -> float:
    """Return the sum of shares of an amount: the first share of what lies below the first limit, and so on."""
    total, below = 0.0, 0.0
    for limit, share in steps:
        total += max(min(amount, limit) - below, 0) * share
        below = limit
    return total


def _cpu_reserved(cores: int) -> float:
    """Google Kubernetes Engine's rule, which EKS's node images use, too: 6 % of the first core, 1 % of the second …"""
    return _stepped(cores, [(1, 0.06), (2, 0.01), (4, 0.005), (float("inf"), 0.0025)])


def _memory_reserved(gib: float) -> float:
    """Google Kubernetes Engine's rule, which AKS used before 1.29."""
    return _stepped(gib, [(4, 0.25), (8, 0.20), (16, 0.10), (128, 0.06), (float("inf"), 0.02)])


def gke(name: str, gpu: str, cores: int, gib: float) -> Node:
    """cloud.google.com/kubernetes-engine, "Plan node sizes"."""
    return Node(name, gpu, cores - _cpu_reserved(cores), gib * REPORTED - _memory_reserved(gib) - EVICTION_GIB)


def eks(name: str, gpu: str, cores: int, gib: float, pods: int = 737) -> Node:
    """awslabs/amazon-eks-ami: 255 MiB and 11 MiB for each pod that a node may run, of which a p4d may run 737."""
    reserved = (255 + 11 * pods) / 1024
    return Node(name, gpu, cores - _cpu_reserved(cores), gib * REPORTED - reserved - EVICTION_GIB)


def aks(name: str, gpu: str, cores: int, gib: float, pods: int = 250) -> Node:
    """learn.microsoft.com, "Node resource reservations in AKS".

    Its table of CPU ends with 64 cores (740 m) and rises by 10 m for each, which leaves 94.94 of 96 cores; 94.6 were
    reported of an ND96. Memory: 20 MB for each pod and 50 MB, or the older rule.
    """
    assert cores == 96
    reserved = max((20 * pods + 50) / 1024, _memory_reserved(gib) + 750 / 1024)
    return Node(name, gpu, min(cores - (0.740 + 0.010 * (cores - 64)), 94.6), gib * REPORTED - reserved - EVICTION_GIB)


NODES = (
    eks("AWS p4d.24xlarge", "A100", 96, 1152),
    eks("AWS p5.48xlarge", "H100", 192, 2048),
    eks("AWS p5en.48xlarge", "H200", 192, 2048),
    aks("Azure ND96asr_v4", "A100", 96, 900),
    aks("Azure ND96amsr_A100_v4", "A100", 96, 1900),
    aks("Azure ND96isr_H100_v5", "H100", 96, 1900),
    aks("Azure ND96isr_H200_v5", "H200", 96, 1850),
    gke("Google a2-highgpu-8g", "A100", 96, 680),
    gke("Google a2-ultragpu-8g", "A100", 96, 1360),
    gke("Google a3-highgpu-8g", "H100", 208, 1872),
    gke("Google a3-ultragpu-8g", "H200", 224, 2952),
)
