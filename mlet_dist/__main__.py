"""`python -m mlet_dist` is the `mlet` command."""

import sys

from mlet_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
