"""TorchRec's planner for multi-layer tables: cost estimates in bytes and seconds.

Modules:

- ``planner``: the planner, with estimators of storage and time for TorchRec.
- ``search_space``: sharding types and kernels of each table, and the pruning of options.
- ``cost_model``: bytes, flops and time of a step at peak rates, common to tables and dense layers.
- ``table_cost``: the cost of one table under a sharding type, exchange and kernel.
- ``plan_cost``: the cost of a complete plan, by rank.
- ``explanation``: the reason for each table's sharding type.
"""
