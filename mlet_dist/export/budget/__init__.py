"""`mlet export --budget`: the size and encoding with which tables of a number of bytes predict best.

Modules:
    allocation: widths of ranges of rows within a number of bytes, by how much the loss depends on them.
    candidates: sizes and encodings that fit.
    run_budget: measures the candidates, and exports the best.
    budget_report: what the command prints.
"""
