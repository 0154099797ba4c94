"""The `mlet` command line.

Modules:
    main: parses the command line, runs one command, and turns errors and signals into exit codes.
    prepare, synth, train, compare, plan, evaluate, export, verify, factorize, spectrum, doctor: one command each, with
        its help texts, its options and the function that it calls.
    options: options and checks that several commands share.
    output: prints results and errors.
    process: this process among others: its rank, its launcher, and the environment that torch needs.
    ranks: runs a command as several ranks on this node (``--nproc``).
"""

from mlet_dist.cli.main import main

__all__ = ["main"]
