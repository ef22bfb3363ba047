"""`tokscale <stage> ...` for launchers that start a file: `torchrun --nproc-per-node 2 launch/run.py <stage> ...`."""

import sys

from tokscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
