"""`mlet export`: a run's W1·W2 as plain tables.

Modules:
    run_collapse: the job, on one or many ranks.
    units: ranges of rows of a table, computed and encoded in one pass.
    work_directory: keeps finished units, so that an interrupted export can resume.
    assembly: the finished export, from units to manifest.
"""
