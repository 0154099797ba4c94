"""The `mlet` command."""

from mlet_dist.cli.run import main

__all__ = ["main"]
