"""`mlet widths`: the columns that the rows of a compressed run have, and the memory that they take.

Modules:
    run_widths: reads them from a run, as plain data.
    widths_report: the text.
    widths_page: the HTML page.
    plots: the plots of the page.
"""
