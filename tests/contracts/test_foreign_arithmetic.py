"""The suite is green on machines whose libraries compute otherwise: contracts run again under another dispatch."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOREIGN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
"""The plainest kernels that torch, oneDNN and MKL have."""


def test_stored_losses_hold_under_another_dispatch():
    cases = "debug/dalle/train] or debug/vqgan"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contracts/test_losses.py", "-k", cases],
        env=os.environ | FOREIGN,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    # A machine that has no other kernels than these says that it compared digits.
    assert done.stdout.count("within 1e-5") + done.stdout.count("equal to the last digit") == 3, done.stdout
