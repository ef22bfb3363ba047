"""What a start and a requeue cost each rank does not grow with the ranks, nor with the checkpoints that are kept.

Real processes count what they open, look at and send.
"""

import functools
import os
from pathlib import Path

import pytest
import tiny_pipeline

import tokscale
from tokscale.base.config import decode
from tokscale.bench.file_calls import count_file_calls
from tokscale.dist.comm import Comm
from tokscale.dist.env import detect
from tokscale.dist.testing import run_ranks
from tokscale.runs import guard
from tokscale.stages import train

SOURCES = Path(tokscale.__file__).parent
WORLDS = (2, 4, 8)


def started(comm: Comm, folder: Path, steps: list[int], every: int) -> list[dict[str, int]]:
    """One run that is stopped and started again at each number of steps: what each start cost this rank."""
    found = []
    for total in steps:
        values = {
            "run_dir": folder / "run",
            "data_dir": folder / "data",
            "image_tokenizer": folder / "image_tokenizer",
            "text_tokenizer": folder / "text_tokenizer",
            "model": tiny_pipeline.MODEL,
            "batch_size": 16,
            "device": "cpu",
            "preflight": {"when": "always", "min_free_gib": 0, "transfer_mib": 0.1, "files_per_rank": 1},
            "engine": {"kind": "eager", "dtype": "fp32"},
            "schedule": {"warmup_steps": 0, "kind": "constant"},
            "loop": {"total_steps": total, "log_every": 100},
            "checkpoint": {"every_steps": every, "keep_last": 100, "async_save": True},
        }
        config = decode(train.TrainConfig, values)
        jobs: list[Comm] = []
        guard.Comm = functools.partial(joined, jobs)
        with count_file_calls(folder, SOURCES) as calls:
            train.run(config, detect())
        found.append({**calls, **jobs[0].traffic.as_dict(), "sockets": sockets()})
    return found


def joined(jobs: list[Comm], *arguments) -> Comm:
    jobs.append(Comm(*arguments))
    return jobs[-1]


def sockets() -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.lexists(link) and os.readlink(link).startswith("socket:") for link in links)


@pytest.fixture(scope="module")
def costs(tmp_path_factory) -> dict[int, list[list[dict[str, int]]]]:
    """By number of ranks and rank: of the first start, of a requeue, and of the start of a run that is finished."""
    found = {}
    for world in WORLDS:
        folder = tmp_path_factory.mktemp(f"of{world}")
        tiny_pipeline.make_inputs(folder)
        found[world] = run_ranks(started, world, folder, [1, 2, 2], 1, fork=True)
    return found


def most(costs: dict[int, list[list[dict[str, int]]]], world: int, start: int, kind: str) -> int:
    """The largest count of any rank but the one that looks."""
    return max(rank[start][kind] for rank in costs[world][1:])


@pytest.mark.parametrize("start", [0, 1, 2], ids=["first start", "requeue", "start of a finished run"])
def test_what_a_rank_opens_and_sends_does_not_grow_with_the_ranks(costs, start):
    opened, looked, sent = ({"opens": 12, "stats": 30, "messages": 20}[kind] for kind in ("opens", "stats", "messages"))
    for world in WORLDS:
        assert most(costs, world, start, "opens") <= opened
        assert most(costs, world, start, "stats") <= looked
        assert most(costs, world, start, "messages") <= sent
    # A share of the files to look at may be one more or one less; nothing else may differ.
    for kind in ("opens", "messages"):
        assert abs(most(costs, 8, start, kind) - most(costs, 2, start, kind)) <= 1


def test_the_rank_that_looks_opens_as_much_for_eight_as_for_two(costs):
    for start in range(3):
        opened = [costs[world][0][start]["opens"] for world in WORLDS]
        assert max(opened) - min(opened) <= 2
        sent = [
            costs[world][0][start]["messages"] / (world - 1) for world in WORLDS
        ]  # one for each below it in the tree
        assert max(sent) - min(sent) <= 1


def test_ranks_are_connected_to_those_they_speak_with_and_no_others(costs):
    # Its parent, its neighbours in the reduction of gradients, and the rendezvous.
    assert max(rank[0]["sockets"] for rank in costs[8][1:]) <= 6  # a full mesh of them has 9


def test_a_start_costs_the_same_however_many_checkpoints_are_kept(tmp_path):
    tiny_pipeline.make_inputs(tmp_path)
    ranks = run_ranks(started, 2, tmp_path, [1, 1, 9, 9], 1, fork=True)
    for rank in ranks:
        assert rank[1] == rank[3]
