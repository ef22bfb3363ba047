"""Jobs in an image without any program of Slurm: they meet, save, come again, and know whose lock it is."""

import os
import shutil

from slurm_jobs import log_of, losses, wait_for
from stand_in_apptainer import install

from tokscale.runs.restarts import read_starts


def in_an_image(folder) -> dict[str, str]:
    tools, image = install(folder)
    return {
        "TOKSCALE_CONTAINER": "apptainer",
        "TOKSCALE_CONTAINER_IMAGE": str(image),
        "PATH": f"{tools}:{os.environ['PATH']}",
    }


def test_two_nodes_meet_and_a_warned_job_comes_again(pipeline, undisturbed, tmp_path):
    environ = in_an_image(tmp_path)
    assert shutil.which("scontrol", path=environ["TOKSCALE_CONTAINER_IMAGE"]) is None
    job = pipeline.submit(tmp_path / "run", **environ)
    wait_for(lambda: len(losses(tmp_path / "run")) >= 20, tmp_path / "run")
    pipeline.cluster.call("scancel", "--signal=USR1", job)
    ended = pipeline.cluster.ended(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", log_of(tmp_path / "run")[-6000:]
    assert losses(tmp_path / "run") == undisturbed
    assert read_starts(tmp_path / "run")[1]["step"] >= 20


def test_a_missing_image_is_said_once_and_not_tried_again(pipeline, tmp_path):
    environ = in_an_image(tmp_path)
    job = pipeline.submit(tmp_path / "run", **environ | {"TOKSCALE_CONTAINER_IMAGE": "nowhere.sif"}, nodes=1)
    ended = pipeline.cluster.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "255:0", "0")
    assert "not requeued: ended with 255 before all ranks had met" in log_of(tmp_path / "run")
