"""The configuration of a training run.

Modules:
    sections: the settings, as dataclasses with defaults, limits and meanings, and the checks between them.
    config_file: reads config files with overrides, writes them, and describes the settings for `--help`.
    parser: builds dataclasses from YAML and checks keys, types and limits.
"""
