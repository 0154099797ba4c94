"""Starting ranks: on this node by torch elastic, on several after they have met and agreed that they are one job."""

from mlet_dist.launcher.elastic import record_failure, run_ranks

__all__ = ["record_failure", "run_ranks"]
