"""Preparation of data sets from raw files, in passes that can be interrupted, resumed and shared by machines.

Modules, in the order in which data runs through them:
    prepare_arguments: the command line's arguments for ``prepare``.
    pipeline: ``prepare``, which runs the passes.
    passes: the passes read, count, vocabulary and write.
    raw_formats: the description of a raw table (``TableSpec``), and those of Criteo's and Avazu's logs.
    table_description, description_section: the YAML description of any other table, and the checks of its keys.
    file_lists: directories and patterns of raw files, and the columns that directories are.
    raw_files: opening raw files, recognising and inspecting them.
    compression, text_encoding: compressed text, and text in other encodings than UTF-8.
    reading: the read pass: raw files to chunks, with a limit on malformed lines.
    raw_blocks: raw files to blocks.
    parsing: one block to a chunk.
    text_lines, json_lines: the lines of a block of text, or of JSON objects.
    raw_values: values of any type as texts or numbers, and which are missing.
    typed_columns, list_columns, time_columns: one raw column to a typed column.
    chunks: the files of valid rows that later passes read, and groups of them.
    splits, split_files: the split that each row, or each file, belongs to.
    counting: the count pass of one group.
    vocabulary: the ids of a feature's values.
    like_dataset, known_values: the data set that this one is prepared like, and the values that have ids there.
    writing: the write pass of one group.
    carried_rules, vocabulary_file: what an export carries, so that a server can do what these modules do.
    recorded_description: the description of a table in the manifest.
    dataset_manifest: the merge pass: schema, manifest and quarantine of the finished data set.
    dataset_check: verification of a prepared data set (``mlet prepare --check``).
    fingerprints: what the result of each pass depends on.
    work_files: the work directory that keeps finished results.
    sealed_files: the files of finished results, which tell when they were damaged.
    worker_pool: the processes that do the work.
"""
