"""TorchRec's planner for multi-layer tables: cost estimates in bytes and seconds.

Modules:

- ``planner``: the planner, with estimators of storage and time for TorchRec.
- ``search_space``: sharding types and kernels of each table, and the pruning of options.
- ``plan_rating``: the rating of complete plans, which includes the latency of their collectives.
- ``cost_model``: bytes, operations and time of a step, common to tables and dense layers.
- ``collective_time``: latency and bandwidth of collectives by kind, size of group and backend.
- ``step_collectives``: the collectives of a step, counted by process group.
- ``owner_skew``: how unequally the owners of rows work, from counts of ids.
- ``table_cost``: the cost of one table under a sharding type, exchange and kernel.
- ``plan_cost``: the cost of a complete plan, by rank.
- ``explanation``: the reason for each table's sharding type.
"""
