"""The configuration of a training run.

Modules:
    sections: the settings of each section, as dataclasses with defaults, limits and meanings.
    config_file: the config of all sections; reads and writes config files, and describes the settings for `--help`.
    parser: builds dataclasses from YAML and checks keys, types and limits.
"""
