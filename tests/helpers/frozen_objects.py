"""Imported last by the fork server: its objects are exempt from garbage collection in the processes that it forks.

A collection looks at every object, and so copies nearly all memory that a forked process shares with its parent.
"""

import gc

gc.collect()
gc.freeze()
