"""Attention's kernels compile for an H100 and take no more of it than is stored; see `sm90.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sm90

KEPT = json.loads(sm90.STORED.read_text()).get(sm90.VERSION, {})


@pytest.mark.long
@pytest.mark.parametrize("case", sm90.CASES)
def test_attention_compiles_for_an_h100(case: str) -> None:
    if missing := sm90.why_not(KEPT):
        pytest.skip(missing)
    told = subprocess.run([sys.executable, str(Path(sm90.__file__)), case], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-4000:]
    found = json.loads(told.stdout.splitlines()[-1])
    assert [kernel["kernel"] for kernel in found] == [kernel["kernel"] for kernel in KEPT[case]]
    for kernel, kept in zip(found, KEPT[case], strict=True):
        assert kernel["shared"] <= sm90.SHARED_LIMIT
        for what in ("registers", "shared", "spilled"):
            assert kernel[what] <= kept[what], f"{kernel['kernel']}: more {what} than stored"
