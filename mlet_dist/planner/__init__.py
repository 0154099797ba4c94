"""`mlet plan`: the sharding plan of a run and what it costs, on hardware that need not be there.

Modules:
    run_plan: makes the plan of `mlet plan`, as plain data.
    configurations: one run to plan, and the configurations that it is compared with.
    budgets: what compression keeps within several budgets.
    suggestions: settings with which tables fit that do not.
    plan_inputs: presets of hardware (hardware.yaml), and the sizes of tables from a data set or a file.
    hardware_rates: the rates of a rank, of a preset or measured.
    expected_step: distinct ids and the skew of owners, from the counts of a data set's ids.
    plan_report: the plan as text and as an HTML page.
"""
