"""Many workers of one tokenization: how often they try for a unit, and what the end costs each of them."""

import time
from pathlib import Path

import tokenizing

from tokscale.base.config import decode
from tokscale.bench.file_calls import count_file_calls
from tokscale.data.tokenization.config import WorkConfig
from tokscale.data.tokenization.finalise import outcome
from tokscale.data.tokenization.inputs import list_inputs
from tokscale.data.tokenization.leases import Leases
from tokscale.data.tokenization.pipeline import Pipeline
from tokscale.data.tokenization.plan import Plan, make_plan
from tokscale.data.tokenization.work import Worker
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.stages.tokenize_job import Job, TokenizeConfig, leave

WORKERS, UNITS = 64, 200


def planned(folder: Path) -> tuple[Plan, Pipeline]:
    recipe = tokenizing.make_recipe(folder / "raw")
    plan = make_plan(
        folder / "tokens",
        recipe.identity,
        lambda: list_inputs(recipe.raw),
        1,
        lambda plan: outcome(folder / "tokens", recipe.raw, plan),
    )
    return plan, Pipeline(recipe, threads=1, queue=0, device=tokenizing.CPU, stop=lambda: False)


def one_worker(comm: Comm, folder: Path) -> dict[str, int]:
    plan, pipeline = planned(folder)
    job = Job(decode(TokenizeConfig, {"data_dir": folder, "image_tokenizer": folder}), ProcessEnv())
    with Leases(folder / "tokens", 600) as leases:
        comm.barrier()
        worker = Worker(
            folder / "tokens",
            plan,
            pipeline,
            leases,
            WorkConfig(retry_seconds=0.0),
            stop=lambda: False,
            progress=lambda samples, **metrics: None,
            on_unit=lambda metrics: time.sleep(0.02),
        )
        made = worker.run(wait=False).units
        comm.barrier()  # the end of all at once, as that of an array job
        with count_file_calls(folder / "tokens") as calls:
            leave(job, leases, lambda: None)
    pipeline.close()
    return {"made": made, "tries": leases.tries, **calls}


def test_workers_seldom_try_for_the_same_unit_and_one_of_them_clears_up(tmp_path):
    tokenizing.make_raw(tmp_path / "raw", *[1] * UNITS)
    planned(tmp_path)[1].close()
    workers = run_ranks(one_worker, WORKERS, tmp_path, fork=True)
    assert sum(worker["made"] for worker in workers) == UNITS
    assert sum(worker["tries"] for worker in workers) <= 1.2 * UNITS
    # Nobody opens a file for each unit: a worker looks for one that still works, and the last finds none.
    assert max(worker.get("opens", 0) for worker in workers) < UNITS / 2
    assert not list((tmp_path / "tokens" / "leases").iterdir()) and not list(
        (tmp_path / "tokens" / "workers").iterdir()
    )
