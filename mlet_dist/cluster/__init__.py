"""Start the ranks of a job on one node or several, after checking that all nodes can run it.

- ``launcher``: start a command in ranks on this node, as the only node or as one of several.
- ``restarts``: run attempts one after the other, and decide after a failure who ends and who meets again.
- ``attempt``: run the ranks of this node once with torch elastic.
- ``heartbeats``: find nodes that are lost, and tell all nodes why an attempt has failed.
- ``elastic_beats``: let the ranks of an elastic job restart when a node has vanished, or has come back.
- ``rendezvous_rounds``: the rendezvous rounds of an elastic job's nodes, which have names.
- ``failure``: why an attempt has failed.
- ``verdict``: what a failure means for this node: the reason, whether it counts, the exit code.
- ``rank_watch``: watch the rank processes of this node: report, find those that are stopped, pass signals on, kill.
- ``silence``: how long a value has not changed, for a process that may be suspended itself.
- ``rank_errors``: find the error that is the cause among those of several ranks.
- ``stop_request``: note the signals that ask a launcher to stop.
- ``nodes``: describe the nodes of a job, from the options that every node is given.
- ``rendezvous``: let the nodes of a job meet at node 0.
- ``registration``: how a node reaches node 0 and is admitted.
- ``torch_rendezvous``: give torch elastic the nodes that have met, or those that come and go.
- ``preflight``: compare what the nodes or ranks report about themselves before a job starts.
- ``rank_checks``: run `mlet doctor --distributed`, in which all ranks of a job check one another.
- ``calibration``: measure the rates of a job's ranks for `mlet plan`.
- ``collective_rates``, ``device_rates``, ``host_rates``: of collectives, of a device, of the host's work in a step.
- ``machine_checks``: run `mlet doctor`, which checks one machine or container.
- ``lost_pods``: let the Job controller of Kubernetes replace lost pods of `k8s/job` promptly, in an init container.
- ``software_checks``: check that Python, torch, fbgemm and TorchRec are installed and compatible.
"""
