"""The configuration of a training run.

Modules:
    sections, model_section, compression_section, sharding_section: the settings of each section, as dataclasses with
        defaults, limits and meanings.
    validation_settings: checks of the settings of validation while training.
    calibration_file: the file of rates that `mlet doctor --distributed --calibrate` writes and `mlet plan` reads.
    limits: what several sections allow at most.
    byte_sizes: sizes in bytes, such as 12GB.
    config_file: the config of all sections; reads and writes config files, and describes the settings for `--help`.
    overrides: settings of the command line, `section.key=value`.
    parser: builds dataclasses from plain data and checks keys, types and limits.
    strict_yaml: reads YAML without duplicate keys or endless aliases.
"""
