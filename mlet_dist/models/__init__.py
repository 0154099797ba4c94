"""The models that ``mlet train`` trains and exports.

Modules:

- ``build``: the model of a spec around multi-layer, plain or quantised tables.
- ``dense_memory``: the memory of the layers that every rank holds, computed without torch.
- ``spec``: the description from which a model is built again without its data set.
"""
