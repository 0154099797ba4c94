"""The `mlet` command."""

from mlet_dist.cli.main import main

__all__ = ["main"]
