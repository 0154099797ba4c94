"""`mlet report`: what each way of making tables smaller buys, as a page, charts and plain data.

Modules:
    measured_runs: reads sweeps, comparisons and single runs.
    measured_arms: quality of each arm and output, against the tuned single layer, with intervals.
    recommendation: what to choose, by a stated rule.
    frequency: rows by how frequent their ids are.
    learning: learning curves, time and memory of a step, spectra.
    figures: the charts.
    advice: the recommendation in sentences.
    report_text: text and Markdown, with all tables.
    report_page: the HTML page.
    run_report: all of it.
"""
