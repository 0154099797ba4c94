"""Commands that read trained models: export, verify, evaluate, predict, factorize and spectrum.

Each command has a package or module of its own:

    budget/              `mlet export --budget`: finds the best tables of a number of bytes
    collapse/            `mlet export`: collapses W1·W2 in work units, keeps finished ones, assembles the export
    verify/              `mlet verify`: compares the trained model with every model of an export
    run_evaluate.py      `mlet evaluate`: metrics of a run or an export
    run_predict.py       `mlet predict`: its scores for every row of a split
    factorize/           `mlet factorize`: factors existing tables into W1·W2
    spectrum/            `mlet spectrum`: singular values of tables, as text and as an HTML page

They share:

    serving/             quantised models, sharding plans for serving, the scripted package
    evaluated_model.py   opens the model of a run or an export for a split, and loads it on any number of ranks
    measured_split.py    the LogLoss of a split with other tables, of which only the rows that it looks up are read
    size_choice.py       the sizes that a run can be exported at, and what its tables keep
    sized_model.py       the model of a run at another size
    seen_rows.py         the rows of tables that a split looks up
    row_blocks.py        reads tables in float64 blocks and computes Gram matrices
    source.py            opens the tables of a run, an export or factors for reading
    outputs.py           the outputs that an export can contain: an encoding and a file format each
    encoding.py          row encodings: fp32, fp16, int8, int4
    export_directory.py  the layout of an export on disk and its manifest
    formats/             file formats: DCP, safetensors, torch.save
"""
