"""`mlet factorize`: existing tables as W1 and W2.

Modules:
    run_factorize: the job, which writes a checkpoint to train from.
    existing_tables: finds the tables in files of other programs.
"""
