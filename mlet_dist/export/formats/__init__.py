"""Formats of files: ``dcp`` and ``safetensors`` write, join and index pieces; the others read."""
