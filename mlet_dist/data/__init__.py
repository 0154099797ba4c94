"""Data: raw click logs become typed, split Parquet data sets, and those become batches for every rank."""
