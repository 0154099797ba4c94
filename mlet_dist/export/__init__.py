"""What becomes of a trained model: each command of `mlet` in a room of its own, above what they share.

collapse/         `mlet export`: its job, units of work, the directory in which they are kept, the assembly
serving/          quantised models, plans for serving them sharded, the scripted package
verify/           `mlet verify`: the trained model beside every model of an export
factorize/        `mlet factorize`: tables of any origin -> W1·W2
spectrum/         `mlet spectrum`: singular values, and the page
evaluate.py       `mlet evaluate`
source.py         where tables are read: a run, an export, factors
row_blocks.py     a table by blocks in float64, and its Gram matrices
manifest.py       the layout of an export on disk
outputs.py        what an export may consist of: an encoding of rows and a format of files
encoding.py       float32, fp16, int8, int4
stored_tables.py  rows of an output, read back
formats/          files: written, joined, indexed, read
"""
