"""`tokscale tokenize`: raw shards become token shards, by any number of processes, started and killed at any time."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokscale.base.errors import DataError
from tokscale.base.files import may_write, write_json
from tokscale.base.log import logger
from tokscale.base.progress import progress
from tokscale.data.tokenization.finalise import bad_inputs, closed, finalise
from tokscale.data.tokenization.lengths import caption_lengths, words
from tokscale.data.tokenization.notes import said
from tokscale.data.tokenization.plan import Plan
from tokscale.data.tokenization.recheck import agreement, chosen_blocks, contact_sheet
from tokscale.data.tokenization.stats import data_stats, shown
from tokscale.data.tokenization.units import finished, invalidate, record_path, sweep_all, total_drops, total_notes
from tokscale.data.tokenization.verify import Problem, strays, verify_manifest, verify_unit
from tokscale.data.tokenization.work import Worker, WorkReport
from tokscale.data.tokens.blocks import Block, open_block
from tokscale.data.tokens.manifest import CLASSES, CODES, MANIFEST, TokenDataset, TokenManifest
from tokscale.dist.env import ProcessEnv
from tokscale.dist.slurm import note_kept
from tokscale.inference.grids import save_grid
from tokscale.runs.stage import StageResult, command
from tokscale.runs.stopping import stopping_for
from tokscale.stages.embed import embed, embed_problems, invalidate_damaged
from tokscale.stages.tokenize_job import Job, TokenizeConfig, alone, leave, sources_of
from tokscale.tokenizers.text import load_text_tokenizer
from tokscale.tokenizers.text.base import AnyTextTokenizer
from tokscale.train.signals import StopRequests

log = logger("tokenize")


CONFIG = TokenizeConfig


def run(config: TokenizeConfig, env: ProcessEnv) -> StageResult:
    """Do what is asked, or all that is due.

    Raises:
        DataError: When inputs, units or the folder are not as they should be; each message names the way out.
        StopRequested: When asked to stop; finished units are kept.
        StorageError: When the file system refuses.
    """
    job = Job(config, env)
    actions: dict[str, Callable[[Job], StageResult]] = {
        "all": _all,
        "plan": _plan,
        "run": _run,
        "embed": embed,
        "verify": _verify,
        "finalise": _finalise,
        "stats": _stats,
        "status": _status,
    }
    return actions[config.action](job)


def _all(job: Job, report: WorkReport | None = None) -> StageResult:
    plan = job.planned()
    if not job.progress_of(plan).complete:
        if report is None and job.env.is_main:
            for line in _caption_lengths(job, plan):
                log.info(line)
        report = _work(job, plan, wait=job.env.is_main)
    if not job.env.is_main:
        return StageResult(
            f"rank {job.env.rank} made {report.samples if report else 0} samples", skipped=report is None
        )
    _raise_failed(job, report.failed_for_good if report else {})
    plan_now = job.planned()  # an input that was mended meanwhile is a new one
    with alone(job):
        # A data set that is closed by a plan which another worker has extended since would lose the new units.
        if len(job.existing_plan().parts) == len(plan.parts):
            return _close(job, plan_now, report)
    log.info("%s: units were planned meanwhile; going on with them", job.folder)
    return _all(job, report)


def _close(job: Job, plan: Plan, report: WorkReport | None) -> StageResult:
    if fresh := not closed(job.folder, plan):
        _raise_problems(_check_units(job, plan))
    manifests, written = finalise(
        job.folder,
        plan,
        job.config.views,
        allow_missing=job.config.allow_missing,
        drop_bad_inputs=job.config.on_bad_shard == "drop",
    )
    samples, dropped = _totals(manifests)
    if not (report or fresh or written):
        return StageResult(f"{job.folder}: {samples} samples, nothing is due", {"tokens": job.folder}, skipped=True)
    stats = {bucket: _write_stats(job.folder / bucket, plan.of(bucket)) for bucket in manifests}
    lost = _losses(job, plan)
    if job.classes is not None:
        for bucket in manifests:
            write_json(job.folder / bucket / CLASSES, list(job.classes))
    read = job.folder / next(iter(manifests)) if len(manifests) == 1 else job.folder
    largest = max(manifests, key=lambda bucket: manifests[bucket].samples)
    codes = stats[largest]["codes"][CODES][0]
    metrics = {
        "samples": float(samples),
        "dropped": float(dropped),
        "codes_used": float(codes["used"]),
        "perplexity": codes["perplexity"],
    }
    if report is not None and report.done:
        metrics |= {"images_per_second": report.rate}
    return StageResult(
        f"{_shown(manifests)} in {job.folder}"
        + (f", {report.rate:.0f} images/s" if report is not None and report.done else "")
        + f", {codes['used']} of {codes['used'] + codes['dead']} codes used"
        + (f", {dropped} left out" if dropped else "")
        + "".join(f"\n  {line}" for line in lost),
        {"tokens": job.folder, "stats": job.folder / largest / "stats.json"},
        metrics,
        next_command=command("train", job.config, data__sources=sources_of(job.config, read)),
        next_suggested=_models_for(manifests[largest].labels),
    )


def _models_for(labels: int | None) -> tuple[str, ...]:
    if labels is None:
        return ("model=dalle/small",)
    return ("model=maskgit/small", "model.condition.kind=classes", f"model.condition.num_classes={labels}")


def _plan(job: Job) -> StageResult:
    plan = job.planned()
    lengths = _caption_lengths(job, plan)
    samples = f"{plan.expected} samples" if plan.expected is not None else "an unknown number of samples"
    return StageResult(
        "\n  ".join([f"{len(plan.units)} units of {len(plan.inputs)} input shards with {samples}", *lengths]),
        {"plan": job.folder / "plan"},
        next_command="tokscale tokenize action=run",
        next_keeps=True,
    )


def _caption_lengths(job: Job, plan: Plan) -> list[str]:
    """A line on how long captions are, where there is a text tokenizer to count by."""
    if not job.config.text_tokenizer_folder.exists():
        return []
    tokenizer = load_text_tokenizer(job.config.text_tokenizer_folder)
    lengths = caption_lengths(job.recipe, plan, tokenizer) if isinstance(tokenizer, AnyTextTokenizer) else []
    return [words(lengths)] if lengths else []


def _run(job: Job) -> StageResult:
    plan = job.planned()
    report = _work(job, plan, wait=False)
    _raise_failed(job, report.failed_for_good)
    others = f"; {len(report.leased_elsewhere)} units are in work elsewhere" if report.leased_elsewhere else ""
    return StageResult(
        f"{report.units} units with {report.samples} samples made{others}",
        {"tokens": job.folder},
        {"images_per_second": report.rate} if report.done else {},
        next_command="tokscale tokenize action=verify",
        next_keeps=True,
        skipped=not report.done,
    )


def _verify(job: Job) -> StageResult:
    plan = job.existing_plan()
    folders = [job.folder / bucket for bucket in plan.buckets]
    problems = _check_units(job, plan) + verify_manifest(job.folder, plan)
    states = [problem for folder in folders for problem in embed_problems(folder)]
    for path in strays(job.folder, plan):
        log.warning("%s: belongs to no unit; remove it", path)
    state = job.progress_of(plan)
    damaged = sorted({problem.unit for problem in problems if problem.unit is not None})
    if job.config.repair:
        for unit in damaged:
            for folder in folders:
                invalidate(folder, unit)
            log.warning("unit %d: invalidated, the next run makes it again", unit)
        for folder in folders:
            invalidate_damaged(folder)
    # A manifest cannot be right while units are missing.
    way_out = _way_out(damaged, bool(states), job.config.repair) if state.complete or damaged else _UNFINISHED
    _raise_problems([*problems, *states], way_out)
    if not state.complete:
        lines = " ".join(state.lines())
        raise DataError(f"{job.folder}: what is there is sound, but incomplete; {_UNFINISHED}. {lines}")
    return StageResult(
        f"{state.units} units with {state.samples} samples are sound",
        next_command="tokscale tokenize action=finalise",
        next_keeps=True,
    )


def _finalise(job: Job) -> StageResult:
    plan = job.existing_plan()
    manifests, written = finalise(
        job.folder,
        plan,
        job.config.views,
        allow_missing=job.config.allow_missing,
        drop_bad_inputs=job.config.on_bad_shard == "drop",
    )
    return StageResult(
        f"{_shown(manifests)}, id {', '.join(manifest.id[:12] for manifest in manifests.values())}",
        {"tokens": job.folder},
        next_command="tokscale tokenize action=stats",
        next_keeps=True,
        skipped=not written,
    )


def _stats(job: Job) -> StageResult:
    folders = [path.parent for path in sorted(job.folder.glob(f"*/{MANIFEST}"))] or [job.folder]
    lines = []
    for folder in folders:
        lines += [f"{folder.name}:"] if folder != job.folder else []
        TokenDataset(folder)  # what is not closed yet has its own words
        bucket = folder.name if folder != job.folder else ""
        lines += shown(_write_stats(folder, job.existing_plan().of(bucket)))
    return StageResult("\n".join(lines), {"stats": folders[0] / "stats.json"})


def _status(job: Job) -> StageResult:
    return StageResult("\n".join(job.progress_of(job.existing_plan()).lines()), {"tokens": job.folder})


def _work(job: Job, plan: Plan, *, wait: bool) -> WorkReport:
    if job.config.retry_failed:
        for unit in plan.units:
            job.attempts.clear(unit.number)
    records = finished(job.folder, plan)
    made = sum(record.shard.samples for record in records) + sum(total_drops(records).values())
    metrics = job.config.run_dir / "tokenize.jsonl"
    with (
        StopRequests(job.folder, is_main=job.env.is_main) as requests,
        stopping_for(requests, "tokenize"),
        job.leases() as leases,
        progress(plan.expected, "tokenizing", start=made, quiet=not job.env.is_main) as bar,
    ):
        stop = lambda: requests.flags()["stop"]  # noqa: E731
        with job.pipeline(stop) as pipeline:
            worker = Worker(
                job.folder,
                plan,
                pipeline,
                leases,
                job.config.work,
                stop=stop,
                progress=bar.update,
                on_unit=lambda unit: _made(metrics, unit),
            )
            report = worker.run(wait=wait)
        leave(job, leases, lambda: sweep_all(job.folder, plan))
        return report


def _check_units(job: Job, plan: Plan) -> list[Problem]:
    """Everything wrong with finished units, their ids compared with fresh ones; writes contact sheets."""
    last = job.folder / plan.buckets[-1]  # a unit is committed there last
    problems = []
    with progress(len(plan.units), "verifying") as bar:
        present = [unit for unit in plan.units if record_path(last, unit.number).exists()]
        for unit in present:
            problems += verify_unit(job.folder, plan, unit)
            bar.update()
    return problems or [problem for bucket in plan.buckets for problem in _check_codes(job, plan, bucket)]


def _check_codes(job: Job, plan: Plan, bucket: str) -> list[Problem]:
    folder, recipe, problems = job.folder / bucket, job.recipe.of(bucket), []
    records = finished(folder, plan.of(bucket))
    places = [(record.shard.file, place) for record in records for place in record.shard.blocks]
    if not places:
        return []
    sizes = [place.samples for _, place in places]

    def blocks(samples: int) -> Iterator[Block]:
        for number in chosen_blocks(sizes, samples, job.config.seed):
            file, place = places[number]
            yield open_block(folder / file, place)

    check = job.config.check
    if check.reencode:
        found = agreement(blocks(check.reencode), recipe, plan, check.reencode, job.device)
        log.info("%d images encoded again: %.4f of %d ids are equal", found.images, found.share, found.ids)
        problems += [Problem(str(job.raw), f"{what}; its stored codes cannot be checked") for what in found.missing]
        if found.share < check.min_agreement:
            what = f"only {found.share:.4f} of the ids come out again, check.min_agreement={check.min_agreement}"
            problems.append(Problem(str(folder), f"{what}; was it made by another device or library version?"))
    if check.sheet and may_write(folder):
        pixels, captions = contact_sheet(blocks(check.sheet), recipe, check.sheet)
        save_grid(pixels, captions, folder / "sheet.png")
    return problems


_UNFINISHED = "run `tokscale tokenize`, which makes what is missing"


def _way_out(damaged: Sequence[int], states: bool, repaired: bool) -> str:
    """What to do about problems: in these units, in the states beside them, or else in the manifest alone."""
    again = ["`tokscale tokenize`"] * bool(damaged) + ["`tokscale tokenize action=embed`"] * states
    if not again:
        return "run `tokscale tokenize action=finalise` where the manifest is wrong; mend what else is named"
    if repaired:
        return f"what is damaged is undone now: run {', then '.join(again)} to make it again"
    repair = "`tokscale tokenize action=verify repair=true`"
    return f"run {repair}, which makes undone what is damaged, then {', then '.join(again)}"


def _raise_problems(problems: Sequence[Problem], way_out: str = "") -> None:
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        advice = way_out or _way_out([problem.unit for problem in problems if problem.unit is not None], False, False)
        raise DataError(f"{len(problems)} problems:\n{listed}{more}\n{advice}")


def _raise_failed(job: Job, failed: Mapping[int, str]) -> None:
    if failed and not job.config.allow_missing:
        listed = "\n".join(f"  unit {unit}: {why}" for unit, why in sorted(failed.items())[:20])
        raise DataError(
            f"{job.folder}: {len(failed)} units were given up, all others are done:\n{listed}\n"
            "or close without them by allow_missing=true"
        )


def _totals(manifests: Mapping[str, TokenManifest]) -> tuple[int, int]:
    """Samples in all data sets, and those left out."""
    return (
        sum(manifest.samples for manifest in manifests.values()),
        sum(sum(manifest.drops.values()) for manifest in manifests.values()),
    )


def _shown(manifests: Mapping[str, TokenManifest]) -> str:
    shards = sum(len(manifest.shards) for manifest in manifests.values())
    each = ", ".join(f"{manifest.samples} of {bucket}" for bucket, manifest in manifests.items() if bucket)
    return f"{_totals(manifests)[0]} samples in {shards} shards" + (f" ({each})" if each else "")


def _losses(job: Job, plan: Plan) -> list[str]:
    """What the data set lacks or has otherwise than its sources, for a person: said once, when it is closed."""
    records = finished(job.folder, plan)
    bad = [f"input shard left out: {found.path}, {found.why}" for found in bad_inputs(plan, records)]
    return said(total_notes(records)) + bad


def _write_stats(folder: Path, plan: Plan) -> dict[str, Any]:
    records = finished(folder, plan)
    found = data_stats(TokenDataset(folder)) | {
        "noted": total_notes(records),
        "bad_inputs": [bad.model_dump(mode="json") for bad in bad_inputs(plan, records)],
    }
    if may_write(folder):
        write_json(folder / "stats.json", found)
    return found


def _made(path: Path, metrics: Mapping[str, Any]) -> None:
    note_kept()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(metrics) + "\n")
