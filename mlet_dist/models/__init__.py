"""The models that ``mlet train`` trains and exports.

Modules:

- ``dlrm``: TorchRec's DLRM around multi-layer, plain or quantised tables.
- ``spec``: the description from which a model is built again without its data set.
"""
