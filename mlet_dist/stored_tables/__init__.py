"""Tables on disk, in a checkpoint or an export, of which rows are read without a model or a process group.

table_source.py     a table as W1 and W2, or as one layer
ranged_source.py    a table whose ranges of rows have widths of their own
adaptive_source.py  a table whose rows have slots
open_tables.py      opens all tables of a model
refitted_rows.py    the rows of a table in another width, or with another W2
"""
