"""Start the ranks of a job on one node or several, after checking that all nodes can run it.

- ``launcher``: start the ranks of this node with torch elastic, and report how they ended.
- ``hung_ranks``: kill ranks of this node that hang when the job ends.
- ``nodes``: describe the nodes of a job, from the options that every node is given.
- ``rendezvous``: let the nodes of a job find one another at node 0, and give torch elastic their store.
- ``preflight``: compare what the nodes or ranks report about themselves before a job starts.
- ``rank_checks``: run `mlet doctor --distributed`, in which all ranks of a job check one another.
- ``machine_checks``: run `mlet doctor`, which checks one machine or container.
- ``software_checks``: check that Python, torch, fbgemm and TorchRec are installed and compatible.
"""
