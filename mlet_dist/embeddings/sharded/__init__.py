"""The sharded multi-layer embedding module: sharder, exchanges and collectives.

Modules:

- ``sharder``: chooses exchanges, adapts TorchRec's plan and builds the sharded module.
- ``module``: the sharded module, which looks up W1, exchanges vectors and applies W2.
- ``sequence_module``: that of sequences, whose rows are not pooled.
- ``exchange_choice``: the exchanges of each sharding type, and the choice between them.
- ``placement``: checks of a table's plan and changes to it.
- ``pooled``: exchanges of pooled vectors (reduce-scatter, all-to-all), and mean pooling.
- ``unique_rows``: the exchange of distinct rows (unique_rows).
- ``row_shardings``: the shardings that use it, of bags and of sequences.
- ``row_index``: from ids to their owner ranks, and on an owner rank to rows of its tables.
- ``row_lookup``: unpooled lookup of distinct rows for unique_rows; ``table_pool``: of several tables as one, on a CPU.
- ``flat_rows``: rows of several widths in one buffer.
- ``stored_ids``: from ids to stored rows, for all exchanges but unique_rows.
- ``adaptive_tables``, ``slot_map``: tables whose rows move between widths.
- ``collectives``: the all-reduce of W2's gradients, the all-to-all of rows, codecs, and small asynchronous all-reduces.
- ``batch_agreement``: the input check, whose errors are raised on all ranks.
"""
