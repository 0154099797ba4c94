"""`mlet sweep`: trains models of many settings, tunes each from the same budget, and repeats the best with other seeds.

Modules:
    sweep_file: the YAML file.
    arms: the models that it describes, with the single layers and controls that belong to them.
    trained_points: trains a config once, in a directory that follows from its settings, and remembers the result.
    scored_points: exports a run and keeps the predictions of each output.
    shared_directory: several processes that work into one directory.
    logged_commands: the `mlet` commands that both run.
    tuning: the search for an arm's settings by successive halving.
    run_sweep: all arms, several at once.
    sweep_results: the results as a Parquet file and a table.
"""
