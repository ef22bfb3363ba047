"""The loop over a task of two engines: bit-equal resuming, requests to stop and save, steps that are not finite."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_run

from tokscale.base import rng
from tokscale.base.errors import CheckpointError, DataError, NonFiniteError, StopRequested
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.engine.config import EagerConfig, ZeroConfig
from tokscale.train.hooks import Hook
from tokscale.train.metrics import read_metrics

ALONE = ProcessEnv()
MEASURED = {
    "time",
    "images_per_second",
    "seconds_per_step",
    "data_wait",
    "memory_rss",
    "straggler_score",
    "straggler_rank",
}


def history(folder: Path) -> list[dict]:
    """What `metrics.jsonl` says, without what differs from run to run."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in read_metrics(folder)]


def assert_equal_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """History and final state of twelve steps in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, state = toy_run.run(Comm(ALONE), folder)
    return history(folder), state


def test_both_engines_learn_and_every_metric_is_there(tmp_path, undisturbed):
    result, _ = toy_run.run(Comm(ALONE), tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13)) and result.step == 12 and result.first_step == 0
    assert rows[-1]["loss/coder"] < 0.9 * rows[0]["loss/coder"]
    assert rows[-1]["loss/critic"] < 0.95 * rows[0]["loss/critic"]
    last = rows[-1]
    assert last["coder/lr"] < 0.02 and last["critic/lr"] < 0.01 and last["coder/grad_norm"] > 0
    assert last["images_per_second"] > 0 and last["tokens_per_second"] is None and last["mfu"] is None
    assert 0 <= last["data_wait"] < 1 and last["memory_rss"] > 1e6 and last["nonfinite_steps"] == 0
    assert result.metrics["loss"] == last["loss"]
    assert history(tmp_path) == undisturbed[0]  # the same run twice is the same run


def test_each_step_draws_from_a_stream_of_its_own_that_begins_with_the_step(tmp_path):
    made = toy_run.trainer(Comm(ALONE), tmp_path, total=3)
    drawn, step = [], made.task.step

    def noted(batch, number):
        drawn.append(torch.rand(1).item())
        return step(batch, number)

    made.task.step = noted
    made.run()
    expected = []
    for number in range(3):
        with rng.scope(7, "train", number, 0):
            expected.append(torch.rand(1).item())
    assert drawn == expected and len(set(drawn)) == 3


def test_a_killed_run_goes_on_bit_equal(tmp_path, undisturbed):
    program = [sys.executable, toy_run.__file__, str(tmp_path), "7"]
    ended = subprocess.run(program, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL and len(read_metrics(tmp_path)) == 7
    result, state = toy_run.run(Comm(ALONE), tmp_path)
    assert result.first_step == 5
    assert history(tmp_path) == undisturbed[0]
    assert_equal_state(state, undisturbed[1])


class AskOneRank(Hook):
    """Sends this process a signal after a step, on the last rank only."""

    def __init__(self, comm: Comm, step: int):
        self.comm, self.step = comm, step

    def on_step(self, step: int, metrics) -> None:
        if step == self.step and self.comm.rank == self.comm.world - 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def disturbed_and_resumed(comm: Comm, folder: Path) -> tuple[str, list[str], list[dict], dict[str, torch.Tensor]]:
    stopped = ""
    try:
        toy_run.run(comm, folder / "stopped", hooks=[AskOneRank(comm, 6)])
    except StopRequested as error:
        stopped = str(error)
    saved = sorted(path.name for path in (folder / "stopped" / "checkpoints").glob("step_*"))
    comm.barrier()
    _, state = toy_run.run(comm, folder / "stopped")
    _, undisturbed = toy_run.run(comm, folder / "undisturbed")
    assert_equal_state(state, undisturbed)
    if comm.is_main:
        assert history(folder / "stopped") == history(folder / "undisturbed")
    return stopped, saved, history(folder / "stopped"), state


def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(tmp_path, undisturbed):
    first, second = run_ranks(disturbed_and_resumed, 2, tmp_path)
    for stopped, saved, *_ in (first, second):
        # The signal came when step 7 was queued; step 8's message carries it, and is read when step 9 is queued.
        assert "stopped after step 9" in stopped and saved == ["step_000000005", "step_000000009"]
    assert "stop requested on another rank" in first[0] and "SIGUSR1" in second[0]
    # Two ranks see the same global batches as one; only the noise of dropout is their own.
    assert first[2][0]["loss"] == pytest.approx(undisturbed[0][0]["loss"], rel=0.3)


def test_a_stop_file_saves_stops_and_is_used_up(tmp_path, undisturbed):
    (tmp_path / "STOP").touch()
    with pytest.raises(StopRequested, match=r"after step 1 \(file STOP") as caught:
        toy_run.run(Comm(ALONE), tmp_path)
    assert caught.value.exit_code == 75 and not (tmp_path / "STOP").exists()
    result, state = toy_run.run(Comm(ALONE), tmp_path)
    assert result.first_step == 1
    assert_equal_state(state, undisturbed[1])


def test_a_save_file_saves_once_and_goes_on(tmp_path):
    (tmp_path / "SAVE").touch()
    toy_run.run(Comm(ALONE), tmp_path, total=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == [
        "step_000000001",
        "step_000000003",
    ]


def test_a_time_limit_stops(tmp_path):
    with pytest.raises(StopRequested, match="time limit"):
        toy_run.run(Comm(ALONE), tmp_path, time_limit_minutes=0.001, pause=0.1)


def test_before_the_end_of_its_time_it_stops_earlier_where_saving_is_slow(tmp_path, monkeypatch):
    """Whatever margin it was given: by what its own steps and saves took."""
    known = []

    class Allocation:
        def __init__(self, margin):
            assert margin == 120.0

        def near(self, needed):
            known.append(needed)
            return needed > 600.0  # so much is left

    monkeypatch.setattr("tokscale.train.loop.EndOfAllocation", Allocation)
    made = toy_run.trainer(Comm(ALONE), tmp_path)
    write = made.store._write

    def slow(*arguments):
        path = write(*arguments)
        assert 0 < made.store.seconds < 300
        made.store.seconds = 300.0
        return path

    monkeypatch.setattr(made.store, "_write", slow)
    with pytest.raises(StopRequested, match=r"after step \d+ \(Slurm time limit"):
        made.run()
    assert known[0] == 0.0 and max(known[:5]) < 600.0 and 6 <= read_metrics(tmp_path)[-1]["step"] <= 11


def test_the_last_step_is_no_reason_to_come_again(tmp_path):
    (tmp_path / "STOP").touch()
    result, _ = toy_run.run(Comm(ALONE), tmp_path, total=1)
    assert result.step == 1


def test_a_non_finite_step_changes_nothing_and_is_counted(tmp_path):
    before: list[dict] = []

    class Watch(Hook):
        def on_step(self, step: int, metrics) -> None:
            before.append(toy_run.weights(made))

    made = toy_run.trainer(Comm(ALONE), tmp_path, poisoned=[3, 4, 7], hooks=[Watch()], max_nonfinite=2)
    made.run()
    assert_equal_state(before[2], before[3])
    assert_equal_state(before[2], before[4])
    assert not torch.equal(before[4]["coder/net.0.weight/weight"], before[5]["coder/net.0.weight/weight"])
    rows = read_metrics(tmp_path)
    assert [row["nonfinite_steps"] for row in rows] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert rows[3]["loss"] is None  # what is not finite is not JSON


def poisoned_run(comm: Comm, folder: Path) -> tuple[str, int]:
    try:
        toy_run.run(comm, folder, poisoned=range(6, 12), max_nonfinite=2)
    except NonFiniteError as error:
        return str(error), error.exit_code
    return "", 0


def test_too_many_non_finite_steps_end_the_run_on_every_rank(tmp_path):
    # Only the main rank's share is poisoned: the other hears of it.
    for message, code in run_ranks(poisoned_run, 2, tmp_path):
        assert "3 steps in a row" in message and "step 9" in message and "step 5 is saved" in message
        assert "optim.lr" in message and code == 77


def test_nothing_is_saved_in_a_streak_and_the_next_sound_step_makes_up_for_it(tmp_path):
    saved: dict[int, dict] = {}

    class Watch(Hook):
        def on_save(self, step: int) -> None:
            saved[step] = toy_run.weights(made)

    made = toy_run.trainer(Comm(ALONE), tmp_path, every=2, poisoned=[3, 4, 5, 6], hooks=[Watch()], max_nonfinite=9)
    made.run()  # steps 4 to 7 are dropped; 4 and 6 would have been saved
    assert list(saved) == [2, 8, 10, 12]


def test_a_stop_in_a_streak_saves_nothing_and_says_where_the_run_goes_on(tmp_path):
    class Stop(Hook):
        def on_step(self, step: int, metrics) -> None:
            if step == 6:
                (tmp_path / "STOP").touch()

    with pytest.raises(StopRequested, match=r"after step 9 .*dropped as not finite; step 5 is saved"):
        toy_run.run(Comm(ALONE), tmp_path, poisoned=[5, 6, 7, 8], hooks=[Stop()], max_nonfinite=9)
    assert toy_run.run(Comm(ALONE), tmp_path)[0].first_step == 5


def test_a_run_whose_last_steps_were_dropped_does_not_end_as_done(tmp_path):
    with pytest.raises(NonFiniteError, match=r"the last 2 of 12 steps were dropped.*step 10 is saved") as caught:
        toy_run.run(Comm(ALONE), tmp_path, poisoned=[10, 11], max_nonfinite=9)
    assert caught.value.exit_code == 77 and "resume_from=10 on_change=record" in str(caught.value)
    assert toy_run.run(Comm(ALONE), tmp_path)[0].first_step == 10  # what is saved is sound


def spoilt_run(comm: Comm, folder: Path, at: int) -> tuple[str, int]:
    class Spoil(Hook):
        """A weight becomes NaN on the last rank alone, after the update."""

        def on_step(self, step: int, metrics) -> None:
            if step == at and comm.rank == comm.world - 1:
                shard = [shard for shard in made.task.engines["critic"].shards() if shard.slot == "exp_avg_sq"][-1]
                shard.data[-1] = float("nan")

    made = toy_run.trainer(comm, folder, every=5, hooks=[Spoil()])
    try:
        made.run()
    except NonFiniteError as error:
        return str(error), error.exit_code
    return "", 0


def test_a_state_with_one_value_that_is_not_finite_is_not_saved(tmp_path):
    for message, code in run_ranks(spoilt_run, 2, tmp_path, 10):
        assert code == 77 and "(exp_avg_sq) of engine 'critic' is not finite after step 10" in message
        assert "step 5 is saved" in message
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step_*"))] == ["step_000000005"]


def unreadable(
    comm: Comm, folder: Path, at: int, engine: EagerConfig | ZeroConfig = toy_run.EAGER
) -> tuple[str, int, list[int]]:
    """A run whose last rank cannot read batch number `at`: what this rank says, and the steps it finished."""
    try:
        toy_run.run(comm, folder, total=4, every=2, torn=at, engine=engine)
    except DataError as error:
        return str(error), error.exit_code, [row["step"] for row in read_metrics(folder)]
    return "", 0, []


def unreadable_twice(comm: Comm, folder: Path) -> list[tuple[str, int, list[int]]]:
    return [unreadable(comm, folder / str(at), at) for at in (0, 3)]


def test_a_batch_that_one_rank_cannot_read_is_an_error_of_all_with_its_own_words(tmp_path):
    first, second = run_ranks(unreadable_twice, 2, tmp_path)
    for (message, code, _), (own, own_code, _) in zip(first, second, strict=True):
        assert own == "shard 7 is torn" and message == "reading the data failed on rank 1: shard 7 is torn"
        assert code == own_code == 65
    # What was trained before it is whole, and what was due is saved.
    assert [steps for *_, steps in first] == [[], [1, 2, 3]]
    toy_run.run(Comm(ALONE), tmp_path / "3", total=4, every=2)
    assert [row["step"] for row in read_metrics(tmp_path / "3")] == [1, 2, 3, 4]


def unreadable_by_stage(comm: Comm, folder: Path) -> list[tuple[str, int, list[int]]]:
    zero = [ZeroConfig(stage=stage, param_persistence_threshold=0) for stage in range(4)]
    return [unreadable(comm, folder / f"zero{config.stage}", 2, config) for config in zero]


def test_under_no_engine_does_a_rank_wait_for_one_that_cannot_read(tmp_path):
    # Under ZeRO-3 forward itself is a collective: a rank that left before all knew would leave the others in it.
    first, second = run_ranks(unreadable_by_stage, 2, tmp_path, timeout=120)
    for (message, code, steps), (own, own_code, _) in zip(first, second, strict=True):
        assert message == "reading the data failed on rank 1: shard 7 is torn" and own == "shard 7 is torn"
        assert code == own_code == 65 and steps == [1, 2]


def test_hooks_are_called_by_name_in_order(tmp_path):
    calls: list[tuple] = []

    class Record(Hook):
        def on_step(self, step: int, metrics) -> None:
            calls.append(("step", step, "loss" in metrics))

        def on_save(self, step: int) -> None:
            calls.append(("save", step))

        def on_end(self, step: int) -> None:
            calls.append(("end", step))

    toy_run.run(Comm(ALONE), tmp_path, total=3, every=2, hooks=[Record()])
    assert calls == [
        ("step", 1, True),
        ("step", 2, True),
        ("save", 2),
        ("step", 3, True),
        ("save", 3),
        ("end", 3),
    ]


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    toy_run.run(Comm(ALONE), tmp_path, total=5)
    lines = (tmp_path / "metrics.jsonl").read_text()
    result, _ = toy_run.run(Comm(ALONE), tmp_path, total=5)
    assert result.step == result.first_step == 5 and not result.metrics
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_a_run_with_other_engines_is_refused(tmp_path):
    toy_run.run(Comm(ALONE), tmp_path, total=5)
    other = toy_run.trainer(Comm(ALONE), tmp_path, total=6)
    other.task.engines = {"decoder": other.task.engines["coder"]}
    with pytest.raises(CheckpointError, match="no engine 'decoder'; did you mean 'coder'"):
        other.run()
