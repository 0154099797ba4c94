"""The models that ``mlet train`` trains and exports.

Modules:

- ``spec``: the description from which a model is built again without its data set.
- ``build``: the model of a spec around multi-layer, plain or quantised tables.
- ``architectures``: the networks of ``model.name``.
- ``builder``: networks of the user's own, ``model.builder``.
- ``tables``: finds the tables in a model.
- ``network``: checks what a model does with the vectors of its tables, and measures it for the planner.
- ``dense_memory``: the memory of the layers that every rank holds, computed without torch.
- ``row_widths``, ``width_shares``: the widths of rows within a budget, and what they keep.
"""
