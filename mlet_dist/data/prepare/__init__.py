"""Preparation of data sets from raw files, in passes that can be interrupted, resumed and shared by machines.

Modules, in the order in which data runs through them:
    pipeline: ``prepare``, which runs the passes, and the command line's arguments for it.
    passes: the passes read, count, vocabulary and write.
    raw_formats: the description of a raw table (``TableSpec``), and those of Criteo's and Avazu's logs.
    table_description: the YAML description of any other table.
    reading: the read pass: raw files to chunks, with a limit on malformed lines.
    raw_blocks: opening raw files and cutting them into blocks.
    parsing: one block to a chunk.
    typed_columns: one raw column to a typed column.
    chunks: the files of valid rows that later passes read, and groups of them.
    splits: the split that each row belongs to.
    counting: the count pass of one group.
    vocabulary: the ids of a feature's values.
    writing: the write pass of one group.
    dataset_manifest: the merge pass: schema, manifest and quarantine of the finished data set.
    dataset_check: verification of a prepared data set (``mlet prepare --check``).
    fingerprints: what the result of each pass depends on.
    work_files: the work directory that keeps finished results.
    worker_pool: the processes that do the work.
"""
