"""`tokscale sample`: prompts to images, a labelled grid and a JSON list of what was drawn with what."""

import time
from typing import Any

import torch

from tokscale.base.errors import DataError
from tokscale.base.files import require_writable
from tokscale.base.log import logger
from tokscale.base.progress import progress
from tokscale.data.raw.prompts import read_prompts
from tokscale.dist.env import ProcessEnv
from tokscale.inference.cascade import Cascade
from tokscale.inference.pretrained import Pretrained
from tokscale.runs.stage import StageResult
from tokscale.runs.stopping import stopping_for
from tokscale.stages.sample_config import SampleConfig
from tokscale.stages.sample_job import GRID, LISTING, SampleJob
from tokscale.train.signals import StopRequests

log = logger("sample")
CONFIG = SampleConfig


def run(config: SampleConfig, env: ProcessEnv) -> StageResult:
    """Draw every prompt; finished work of the same request is recognised and left alone.

    Raises:
        DataError: When there is no prompt, or the export is not there.
        StopRequested: When asked to stop; units that are done are kept.
    """
    job = SampleJob(config, env, _prompts(config))
    grid, listing = job.out / GRID, job.out / LISTING
    outputs = {"grid": grid, "listing": listing}
    if job.finished():
        return StageResult(f"{grid} already shows these {len(job.prompts)} prompts", outputs, skipped=True)
    require_writable(job.out, "give out=FOLDER")
    job.begin()
    begin = time.perf_counter()
    with (
        StopRequests(job.out, is_main=env.is_main) as requests,
        stopping_for(requests, "sample"),
        job.leases() as leases,
        progress(job.images, "sampling", quiet=not env.is_main) as bar,
    ):
        stop = lambda: requests.flags()["stop"]  # noqa: E731
        drawn = job.draw_due(leases, wait=env.is_main, stop=stop, progress=bar.update)
    seconds = time.perf_counter() - begin
    if not env.is_main:
        return StageResult(f"rank {env.rank} drew {drawn} images", skipped=not drawn)
    job.close()
    return StageResult(
        f"{job.images} images in {seconds:.1f} s; look at {grid}",
        outputs,
        metrics={"images_per_second": drawn * config.best_of / seconds},
    )


def sample_batches(
    pretrained: Pretrained | Cascade, captions: list[str], seeds: list[int], batch_size: int, sampling: dict[str, Any]
) -> torch.Tensor:
    """Sample `captions` in batches under a progress bar; uint8 `(captions, channels, height, width)` on the CPU."""
    images = []
    with progress(len(captions), "sampling") as bar:
        for at in range(0, len(captions), batch_size):
            part = slice(at, at + batch_size)
            images.append(pretrained.sample(captions[part], seeds=seeds[part], batch_size=batch_size, **sampling))
            bar.update(len(captions[part]))
    for words in pretrained.cut_captions():
        log.warning("%s", words)
    return torch.cat(images)


def _prompts(config: SampleConfig) -> list[str]:
    prompts = list(config.prompts)
    if config.prompts_file is not None:
        prompts += read_prompts(config.prompts_file, config.prompts_column)
    if not prompts:
        raise DataError(f"prompts_file: {config.prompts_file} has no prompt in it")
    return prompts
