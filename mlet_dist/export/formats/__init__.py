"""File formats of tensors.

``dcp`` and ``safetensors`` write tensor shards (``tensor_shards``), join them to larger files and write their index.
``safetensors`` and ``torch_file`` read files of other programs.
"""
