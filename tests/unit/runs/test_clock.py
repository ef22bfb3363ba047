"""The seconds of a stage are those of all its processes, whatever became of them."""

import signal
import subprocess
import sys
import time

from tokscale.base.files import read_json
from tokscale.dist.env import ProcessEnv
from tokscale.runs.clock import FOLDER, StageClock, time_spent
from tokscale.runs.outcome import Attempt
from tokscale.runs.stage import StageResult


def test_a_killed_process_counts_up_to_its_last_sign_of_life(tmp_path):
    program = f"""
import time
from pathlib import Path
from tokscale.runs.clock import StageClock
clock = StageClock(Path({str(tmp_path)!r}), "train", tick=0.05)
print("started", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        while time_spent(tmp_path, "train")[0] < 0.5:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    killed, count = time_spent(tmp_path, "train")
    assert killed >= 0.5 and count == 1
    began = time.monotonic()
    clock = StageClock(tmp_path, "train")
    time.sleep(0.1)
    Attempt(tmp_path, "train", ProcessEnv()).succeed(StageResult("done"), clock=clock)
    done = read_json(tmp_path / "stages/train.json")
    passed = time.monotonic() - began
    assert done["processes"] == 2 and killed + 0.1 <= done["seconds"] + 0.001 <= killed + passed + 0.01  # it is rounded
    assert time_spent(tmp_path, "train-tokenizer") == (0.0, 0)


def test_who_did_no_work_is_not_counted(tmp_path):
    Attempt(tmp_path, "train", ProcessEnv()).succeed(StageResult("done"), clock=StageClock(tmp_path, "train"))
    before = read_json(tmp_path / "stages/train.json")
    Attempt(tmp_path, "train", ProcessEnv()).succeed(
        StageResult("done", skipped=True), clock=StageClock(tmp_path, "train")
    )
    assert read_json(tmp_path / "stages/train.json") == before and time_spent(tmp_path, "train")[1] == 1
    refused = StageClock(tmp_path, "train", tick=0.01)
    while time_spent(tmp_path, "train")[1] < 2:
        time.sleep(0.01)
    refused.forget()
    assert time_spent(tmp_path, "train")[1] == 1


def test_no_folder_is_made_for_it_and_a_torn_file_is_passed_over(tmp_path):
    StageClock(tmp_path / "gone", "train").stop()
    assert not (tmp_path / "gone").exists()
    StageClock(tmp_path, "train").stop()
    (tmp_path / FOLDER / "train.torn.json").write_text("{")
    assert time_spent(tmp_path, "train")[1] == 1
