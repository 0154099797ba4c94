"""Raw click logs become prepared data sets of typed, split Parquet files, and those become batches for every rank.

Packages:
    describe: the first rows of a raw file to the description of a table (``mlet describe``).
    prepare: raw files to a prepared data set (``mlet prepare``).
    loading: a prepared data set to the batches of each rank.

Modules:
    schema: ``schema.json``, the description of a prepared data set.
    column_names: the names that columns and tables may have.
    preprocessing: how each column was made from raw values, which models and data sets are compared by.
    id_counts, label_classes: ids that are out of vocabulary, and splits of one class.
    location: the path or URL of a data set.
    hashing: platform-independent hashes of texts and counters.
    parquet_parts: the Parquet encoding of a data set's files, and a writer that splits rows by position.
    synthetic: synthetic data sets and raw logs (``mlet synth``).
    synthetic_model: the distribution that synthetic rows are drawn from.
"""
