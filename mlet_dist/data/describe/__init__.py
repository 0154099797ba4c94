"""The description of a table, guessed from the first rows of a raw file (``mlet describe``)."""

from mlet_dist.data.describe.guess import Described, describe

__all__ = ["Described", "describe"]
