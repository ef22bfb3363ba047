"""Every mutant of the list is noticed by the tests that it names."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_no_mutant_survives():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("run.py"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
