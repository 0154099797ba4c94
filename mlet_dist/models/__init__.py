"""The models that ``mlet train`` trains and exports.

Modules:

- ``spec``: the description from which a model is built again without its data set.
- ``build``: the model of a spec around multi-layer, plain or quantised tables.
- ``architectures``: the networks of ``model.name``.
- ``builder``: networks of the user's own, ``model.builder``.
- ``stand_in_tables``: made vectors in the place of tables, for these two.
- ``tables``: finds the tables in a model.
- ``network_check``: checks a network of ``builder`` by running it on made vectors.
- ``nested_widths``: runs a model with the first columns of all vectors alone.
- ``network_cost``: the work and the memory of any network, for the planner.
- ``dense_memory``: the memory of the layers that every rank holds, computed without torch.
- ``row_widths``, ``width_shares``: the widths of rows within a budget, and what they keep.
"""
