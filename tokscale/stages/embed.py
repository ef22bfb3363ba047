"""`tokscale tokenize action=embed`: the states of a frozen text encoder, stored beside the codes of its captions."""

import time
from pathlib import Path

from tokscale.base.errors import ConfigError
from tokscale.base.files import remove_partials
from tokscale.base.log import logger
from tokscale.base.progress import progress
from tokscale.data.tokenization.embed import bill, claim_folder, embed_shards
from tokscale.data.tokenization.embed import embed_problems as shard_problems
from tokscale.data.tokenization.leases import Leases
from tokscale.data.tokenization.verify import Problem
from tokscale.data.tokens import embeds
from tokscale.data.tokens.embeds import EmbedsAbout
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.runs.stage import StageResult, command
from tokscale.runs.stopping import stopping_for
from tokscale.stages.tokenize_job import Job, leave, sources_of
from tokscale.tokenizers.text import load_text_encoder
from tokscale.train.signals import StopRequests

log = logger("tokenize")


def embed(job: Job) -> StageResult:
    """Store the states of every caption; what is done is left alone, so that workers may come and go.

    Raises:
        ConfigError: When no text encoder is named.
        DataError: When the token shards are not closed, or the states of another encoder are there.
        StopRequested: When asked to stop; finished shards are kept.
    """
    config = job.config
    if config.text_encoder is None:
        raise ConfigError("action=embed needs a text encoder: give text_encoder=FOLDER")
    dataset = TokenDataset(job.folder)
    encoder = load_text_encoder(
        config.text_encoder,
        precision=config.text_encoder_precision,
        length=config.text_encoder_length,
        device=job.device,
    )
    about = EmbedsAbout(
        path=config.text_encoder.resolve(),
        encoder=encoder.fingerprint,
        precision=encoder.precision,
        length=encoder.length,
        width=encoder.width,
    )
    price = bill(dataset, encoder, 2 if encoder.precision == "bf16" else 4)
    log.info("%s: %s", job.folder / embeds.FOLDER, price)
    working = Leases(job.folder / embeds.FOLDER, config.work.lease_seconds)
    claim_folder(job.folder, about, in_work=bool(working.active()))
    made = 0
    with (
        StopRequests(job.folder, is_main=job.env.is_main) as requests,
        stopping_for(requests, "tokenize"),
        working as leases,
        progress(dataset.samples, "embedding", quiet=not job.env.is_main) as bar,
    ):
        stop = lambda: requests.flags()["stop"]  # noqa: E731
        while True:
            more, elsewhere = embed_shards(dataset, encoder, leases, stop=stop, progress=bar.update)
            made += more
            if not elsewhere or not job.env.is_main:
                break
            time.sleep(min(1.0, config.work.retry_seconds))  # one worker stays to take over what a dead one leaves
        leave(job, leases, lambda: remove_partials(job.folder / embeds.FOLDER))
    stored = sum(path.stat().st_size for path in (job.folder / embeds.FOLDER).glob("*.tar"))
    return StageResult(
        f"states of {price.captions} captions, {stored / 1e6:.1f} MB, {made} shards made now"
        + (f", {len(elsewhere)} in work elsewhere" if elsewhere else ""),
        {"embeds": job.folder / embeds.FOLDER},
        next_command=command("train", config, data__text_embeds="stored", data__sources=sources_of(config, job.folder)),
        next_suggested=("model=dalle/small", "model.condition.kind=embeddings"),
        skipped=not made,
    )


def embed_problems(folder: Path) -> list[Problem]:
    """Everything wrong with the states beside token shards, if there are any."""
    return [Problem(where, what) for where, what in shard_problems(folder)]


def invalidate_damaged(folder: Path) -> None:
    """Make damaged shards of states undone, so that `action=embed` makes them again."""
    for where, _ in shard_problems(folder):
        Path(where).with_suffix(".json").unlink(missing_ok=True)
        log.warning("%s: invalidated, the next action=embed makes it again", where)
