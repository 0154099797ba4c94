"""What the HTML pages of all commands share.

Modules:
    page_shell: the document and its style, for any screen, in the dark and on paper.
    series_looks: how the series of a chart are told apart.
    charts: charts by matplotlib in the colours of the page, as inline SVG and as PNG.
"""
