"""What became of jobs, where a database keeps it and the controller has forgotten them: `slurmdbd` on MariaDB."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_cluster import LocalCluster, missing

from tokscale.dist.slurm import job_states

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture
def accounted() -> Iterator[LocalCluster]:
    why = missing(accounting=True)
    if why is not None:
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    folder.chmod(0o755)
    with LocalCluster(folder, accounting=True, remember=2) as running:
        yield running
    shutil.rmtree(folder)


def test_the_accounting_remembers_what_the_controller_forgets(accounted, monkeypatch):
    done, failed = (
        accounted.submit("--output=/dev/null", "--wrap", "true"),
        accounted.submit("--output=/dev/null", "--wrap", "exit 3"),
    )
    array = accounted.submit("--array=0-2", "--output=/dev/null", "--wrap", "exit $((SLURM_ARRAY_TASK_ID == 1))")
    cancelled = accounted.submit("--hold", "--output=/dev/null", "--wrap", "true")
    accounted.call("scancel", cancelled)
    deadline = time.monotonic() + 300
    while accounted.call("scontrol", "show", "jobs", "--oneliner", check=False).startswith("JobId="):
        assert time.monotonic() < deadline, accounted.call("squeue")
        time.sleep(1)
    for name, value in accounted.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SACCT_FORMAT", "jobid")  # a person's habit
    states = job_states([done, failed, array, cancelled, "999"])
    assert states[done].well and states[failed].state == states[array].state == "FAILED"
    assert states[array].tasks == "2 completed, 1 failed"
    assert states[cancelled].state == "CANCELLED" and states["999"].state == "UNKNOWN"
