"""`mlet verify`: an export against the run it came from.

Modules:
    run_verify: the job.
    compared_models: the models, with the rows that a split looks up.
    table_check: all rows of all tables, block by block.
    tolerances: differences of predictions, and how large they may be.
"""
