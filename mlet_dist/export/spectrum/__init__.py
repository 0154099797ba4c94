"""`mlet spectrum`: singular values of tables.

Modules:
    run_spectrum: the job.
    singular_values: the numbers, from Gram matrices.
    spectrum_report: the text and the HTML page.
"""
