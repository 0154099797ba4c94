"""Launching by TorchX."""
