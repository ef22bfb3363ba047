"""Real ranks: what they send each other, and that one rank's failure is everybody's."""

import subprocess
import sys

import pytest
import torch

from tokscale.base.errors import DataError
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks


def exchange(comm: Comm) -> dict:
    local = torch.full((2, 1), float(comm.rank), requires_grad=True)
    everyone = comm.gather_batch(local)
    (everyone * torch.arange(4.0)[:, None]).sum().backward()
    return {
        "gathered": everyone.flatten().tolist(),
        "gradient": local.grad.flatten().tolist(),
        "mean": comm.mean({"b": float(comm.rank), "a": 1.0}),
        "max": comm.max(comm.rank),
        "objects": comm.gather_objects(f"rank {comm.rank}"),
    }


def fail_on_last(comm: Comm) -> str:
    try:
        with comm.raise_together("reading shards"):
            if comm.rank == comm.world - 1:
                raise DataError("shard 7 is torn")
    except DataError as error:
        return str(error)
    return "no error"


def test_collectives_agree_on_every_rank():
    first, second = run_ranks(exchange, 2)
    assert first["gathered"] == second["gathered"] == [0, 0, 1, 1]
    # Every rank's loss counts every row, so a row's gradient is summed over ranks.
    assert first["gradient"] == [0, 2] and second["gradient"] == [4, 6]
    for result in (first, second):
        assert result["mean"] == {"b": 0.5, "a": 1.0}
        assert result["max"] == 1
        assert result["objects"] == ["rank 0", "rank 1"]


def test_a_failure_on_one_rank_is_raised_on_all():
    first, second = run_ranks(fail_on_last, 2)
    assert second == "shard 7 is torn"
    assert first == "reading shards failed on rank 1: shard 7 is torn"


def test_a_failing_rank_is_reported_with_its_output():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_ranks(divide, 2)


def divide(comm: Comm) -> float:
    return 1 / comm.rank


def test_a_script_may_start_ranks_that_do_not_start_it_again(tmp_path):
    script = tmp_path / "doubling.py"
    script.write_text(
        "from tokscale.dist.testing import run_ranks\n"
        "def double(comm):\n    return comm.rank * 2\n"
        "if __name__ == '__main__':\n    print(run_ranks(double, 2))\n"
    )
    told = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert told.stdout == "[0, 2]\n", told.stderr
