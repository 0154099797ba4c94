"""The sharded multi-layer embedding module: sharder, exchanges and collectives.

Modules:

- ``sharder``: chooses exchanges, adapts TorchRec's plan and builds the sharded module.
- ``module``: the sharded module, which looks up W1, exchanges vectors and applies W2.
- ``exchange_choice``: the exchanges of each sharding type, and the choice between them.
- ``placement``: checks of a table's plan and changes to it.
- ``pooled``: exchanges of pooled vectors (reduce-scatter, all-to-all), and mean pooling.
- ``unique_rows``: the exchange of distinct rows (unique_rows).
- ``row_lookup``: unpooled lookup of distinct rows for unique_rows.
- ``collectives``: the all-reduce of W2's gradients, the all-to-all of rows, codecs, and small asynchronous all-reduces.
- ``batch_agreement``: the input check, whose errors are raised on all ranks.
"""
