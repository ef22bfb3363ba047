"""`python -m tokscale <stage> key=value ...`: the command line for launchers that start an interpreter."""

import sys

from tokscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
