"""`tokscale train ...` for launchers that start a file: `deepspeed --num_gpus 2 launch/train.py recipe=...`."""

import sys

from tokscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
