"""Distributed training of recommendation models with multi-layer embeddings (MLET) on TorchRec."""

__version__ = "0.1.0"
