"""`tokscale submit recipe=... cluster=...`: queue the stages of a recipe on a Slurm cluster, each after the one before.

Keys of a stage are given below its name: `train.loop.total_steps=5000`. Everything is decoded before anything is
queued, and written to `run_dir/submitted/<time>/`: configuration, settings and the code itself. Jobs run that, however
late they start and however often they come again; what is edited later concerns later jobs only.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field, field_validator

import tokscale
from tokscale.base.config import decode, did_you_mean, encode
from tokscale.base.errors import ConfigError, EnvironmentRefused
from tokscale.base.files import atomic_write, new_folder, write_json
from tokscale.base.kinds import for_each
from tokscale.base.package_data import package_data_path
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.runs.environment import environment, git_diff
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.runs.submitted import (
    CODE,
    COMMAND_FILE,
    COMMIT_FILE,
    JOBS_FILE,
    PROGRAMS,
    STATE,
    SUBMITTED,
    UNKNOWN,
    Job,
    code_sources,
    freeze_code,
    jobs_text,
    lost_jobs,
    queued_jobs,
    write_jobs,
)
from tokscale.stages import check, registry
from tokscale.stages.cluster import CLOSE, EMBED, EMBED_CLOSE, SEVERAL_RANKS, ClusterConfig
from tokscale.stages.sbatch import output_flag, sbatch_environ, shell_settings
from tokscale.stages.train import split_batch
from tokscale.train.preflight import code_fingerprint

PIPELINE = ("prepare", "train-tokenizer", "tokenize", "train", "export", "evaluate")


Action = Literal["queue", "missing", "check"]


class SubmitConfig(StageConfig):
    """Keys of the `submit` stage."""

    action: Action = "queue"
    """`queue` the stages; `missing` queues those of the last submission whose jobs did not end well; `check` asks
    whether this cluster would take them, and looks at each partition with a job of a minute."""
    stages: tuple[str, ...] = PIPELINE
    """What to queue, in this order; each stage waits for the one before."""
    cluster: ClusterConfig = ClusterConfig()
    """The machine room."""
    tokenize_tasks: int = Field(default=8, ge=1)
    """Tasks of the array that tokenizes, and of that which embeds."""
    after: str = Field(default="", coerce_numbers_to_str=True)
    """A job that the first stage waits for, or several: `17:19`."""
    code: Literal["frozen", "live"] = "frozen"
    """`frozen` copies the package into the submission, and its jobs run that copy; `live` runs what is installed when a
    job starts."""
    dry_run: bool = False
    """Print a shell script that does the same; queue and write nothing."""
    check_minutes: float = Field(default=10.0, gt=0)
    """How long `action=check` waits for its jobs."""
    sections: dict[str, dict[str, Any]] = {}
    """The resolved configuration of each stage; the command line fills it in."""

    @field_validator("stages")
    @classmethod
    def _have_batch_files(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        known = batch_files()
        for stage in stages:
            if stage not in known:
                raise ValueError(f"no batch file for {stage!r}{did_you_mean(stage, known)}")
        if not stages:
            raise ValueError("names no stage")
        return stages


CONFIG = SubmitConfig


class Asked(NamedTuple):
    """What an action means."""

    missing_alone: bool = False
    """Only stages of the last submission whose jobs did not end well."""
    only_looks: bool = False
    """Nothing is queued but jobs of a minute."""


ASKED = for_each(Action, {"queue": Asked(), "missing": Asked(missing_alone=True), "check": Asked(only_looks=True)})


@dataclass(frozen=True)
class Call:
    """One call of `sbatch`."""

    name: str
    stage: str
    flags: list[str]
    file: Path
    words: list[str]
    settings: dict[str, str] = field(default_factory=dict)
    """Variables that the batch file reads, from a file: sites may keep those of the submitting shell from jobs."""
    array: int = 0

    def command(self, settings: Path, after: str = "") -> list[str]:
        """The words of the call.

        Args:
            settings: The file that holds `settings`.
            after: The job to wait for. The task that comes after workers looks at the whole itself, so it comes also
                when one of them was cancelled or failed.
        """
        kind = "afterany" if self.name in (CLOSE, EMBED_CLOSE) else "afterok"
        wait = [f"--dependency={kind}:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *self.flags, *wait, str(self.file), f"settings={settings}", *self.words]


def batch_files() -> dict[str, Path]:
    """The files of `slurm/`, by stage."""
    found = {path.stem: path for path in sorted(package_data_path("slurm").glob("*.sbatch")) if path.stem != check.NAME}
    return found | {EMBED: found[PROGRAMS[EMBED]]}


def programs_of(values: Mapping[str, Any]) -> dict[str, str]:
    """By stage, the program whose section of the recipe is needed.

    Args:
        values: Keys as they were given. What is missing is not known before the scheduler was asked, so any may be.
    """
    known = batch_files()
    missing = values.get("action") == "missing"
    stages = known if missing else values.get("stages", PIPELINE)
    return {stage: PROGRAMS.get(stage, stage) for stage in stages}


def run(config: SubmitConfig, env: ProcessEnv) -> StageResult:
    """Check every stage's configuration, write it down, and queue the jobs.

    Raises:
        ConfigError: When a stage's section cannot be honoured.
        EnvironmentRefused: When `sbatch` is missing or refuses.
    """
    if ASKED[config.action].only_looks and config.dry_run:
        raise ConfigError(
            f"dry_run=true: action={config.action} queues nothing but jobs of a minute, to look; leave it out"
        )
    if ASKED[config.action].missing_alone:
        config = _missing(config)
    sections = {stage: _checked(config, stage, config.sections.get(stage, {})) for stage in config.stages}
    folder = (config.run_dir / SUBMITTED / time.strftime("%Y%m%d_%H%M%S")).absolute()
    made = calls(config, folder)
    for stage in [stage for stage in PROGRAMS if stage in sections]:  # they read the section of their program
        sections[PROGRAMS[stage]] = sections.pop(stage) | sections.get(PROGRAMS[stage], {})
    recipe = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    if ASKED[config.action].only_looks:
        live = calls(config.model_copy(update={"code": "live"}), folder)  # nothing is copied for a look
        return check.check(config.cluster, live, config.run_dir, config.check_minutes)
    if config.dry_run:
        print(script(config, made, folder, recipe))
        return StageResult(f"would queue {len(made)} jobs; nothing was written", stdout_taken=True)
    folder = new_folder(folder)
    made = calls(config, folder)
    with atomic_write(folder / "recipe.yaml", "w") as file:
        file.write(recipe)
    about = environment(Comm(ProcessEnv()))
    write_json(folder / "code.json", about)
    if patch := git_diff():
        (folder / "changes.patch").write_text(patch)
    if config.code == "frozen":
        freeze_code(folder, about["commit"])
    for call in made:
        (folder / f"{call.name}.settings").write_text(shell_settings(call.settings))
    (folder / COMMAND_FILE).write_text(_command())
    (config.run_dir / "logs").mkdir(exist_ok=True)  # Slurm does not make the folder of a job's output
    jobs = queue(made, folder, config.after)
    write_jobs(folder, jobs)
    listed = ", ".join(f"{job.name} {job.job}" for job in jobs)
    return StageResult(
        "\n".join([f"queued {listed}", *_left_over(config)]),
        {"submitted": folder},
        next_command=f"tokscale status run_dir={shlex.quote(str(config.run_dir))}",
    )


def calls(config: SubmitConfig, folder: Path) -> list[Call]:
    """The calls of `sbatch`, in order; all jobs read what stands in `folder`."""
    frozen = config.code == "frozen"
    home = folder / CODE if frozen else None
    slurm = package_data_path("slurm") if home is None else home / package_data_path("slurm").relative_to(_root())
    variables = {"TOKSCALE_SLURM": str(slurm), "TOKSCALE_PYTHON": config.cluster.python or sys.executable}
    variables |= {"TOKSCALE_STATE": str(folder / STATE)}
    if home is not None:
        variables |= {"TOKSCALE_CODE": str(home), "TOKSCALE_CODE_VERSION": code_fingerprint()[:12]}
    logs, files, made = config.run_dir.absolute() / "logs", batch_files(), []
    for stage in config.stages:
        for name, array, words in parts(stage, config.tokenize_tasks):
            log = output_flag(str(logs), f"slurm-{name}-{'%A_%a' if array else '%j'}.log")
            flags = [*config.cluster.sbatch_flags(name, array), f"--job-name=tokscale-{name}", log]
            settings = variables | config.cluster.settings(name)
            words = [f"recipe={folder / 'recipe.yaml'}", *words]
            made.append(Call(name, stage, flags, slurm / files[stage].name, words, settings, array))
    return made


def parts(stage: str, tokenize_tasks: int) -> list[tuple[str, int, list[str]]]:
    """The jobs of a stage: name, tasks of an array or 0, further words.

    Only what an array works on has two: many workers that share the units, then one process that looks at the whole: it
    checks and closes the data set, or embeds what none of the workers has.
    """
    if stage == EMBED:
        return [(EMBED, tokenize_tasks, ["action=embed"]), (EMBED_CLOSE, 1, ["action=embed"])]
    if stage != "tokenize":
        return [(stage, 0, [])]
    return [("tokenize", tokenize_tasks, ["action=run"]), (CLOSE, 1, [])]


def queue(made: Sequence[Call], folder: Path, after: str = "") -> list[Job]:
    """Call `sbatch` for each. What was queued is cancelled when a later call is refused.

    Raises:
        EnvironmentRefused: With what `sbatch` said.
    """
    jobs: list[Job] = []
    for call in made:
        command = call.command(folder / f"{call.name}.settings", after)
        try:
            told = subprocess.run(command, capture_output=True, text=True, env=sbatch_environ(os.environ))
        except FileNotFoundError:
            raise EnvironmentRefused("sbatch: not found; submit from a login node, or see dry_run=true") from None
        if told.returncode != 0:
            if jobs:
                subprocess.run(["scancel", *(job.job for job in jobs)], capture_output=True)
            raise EnvironmentRefused(
                f"sbatch refused {call.name}: {told.stderr.strip()}\n  {shlex.join(command)}\n"
                "nothing stays queued; look at cluster.* (configs/cluster)"
            )
        after = told.stdout.strip().split(";")[0]
        jobs.append(Job(call.name, after, call.array))
    return jobs


def script(config: SubmitConfig, made: Sequence[Call], folder: Path, recipe: str) -> str:
    """A shell script that writes what the jobs refer to, and queues them, all or none."""
    where = shlex.quote(str(folder))
    lines = [
        "#!/usr/bin/env bash",
        "set -euo pipefail",
        f"mkdir -p {shlex.quote(str(folder.parent))} {shlex.quote(str(folder.parents[1] / 'logs'))}",
        f"mkdir {where}  # run once: print another script to submit again",
        "queued=()",
        "trap '((${#queued[@]} == 0)) || scancel \"${queued[@]}\"' ERR",
    ]
    files = {"recipe.yaml": recipe, COMMAND_FILE: _command()}
    files |= {f"{call.name}.settings": shell_settings(call.settings) for call in made}
    for name, text in files.items():
        lines.append(f"cat >{where}/{name} <<'END_OF_FILE'\n{text.rstrip()}\nEND_OF_FILE")
    if config.code == "frozen":
        lines.append(f"mkdir -p {where}/{CODE}")
        for name, source in code_sources().items():
            lines.append(f"cp -R {shlex.quote(str(source))} {where}/{CODE}/{name}")
        lines.append(f"find {where}/{CODE} -name __pycache__ -type d -prune -exec rm -r {{}} +")
        commit = environment(Comm(ProcessEnv()))["commit"]
        lines.append(f"echo {shlex.quote(commit or UNKNOWN)} >{where}/{CODE}/{COMMIT_FILE}")
    after, jobs = config.after, []
    for call in made:
        name = call.name.replace("-", "_")
        words = call.command(folder / f"{call.name}.settings", after)
        quoted = [word if word.startswith("--dependency=") else shlex.quote(word) for word in words]
        lines += [f"{name}=$({' '.join(quoted)})", f"queued+=(${{{name}%%;*}})"]
        after = f"${{{name}%%;*}}"
        jobs.append(Job(call.name, after, call.array))
    listed = jobs_text(jobs).replace("\\", "\\\\").replace('"', '\\"')
    return "\n".join([*lines, f'echo "{listed}" >{where}/{JOBS_FILE}'])


def _checked(config: SubmitConfig, stage: str, section: Mapping[str, Any]) -> dict[str, Any]:
    module = registry.import_stage(registry.find(PROGRAMS.get(stage, stage)))
    try:
        decoded: Any = decode(module.CONFIG, dict(section))
        if stage in SEVERAL_RANKS:
            nodes, tasks = config.cluster.tasks(stage)
            split_batch(decoded.batch_size, nodes * tasks, decoded.micro_batches)
        return encode(decoded)
    except ConfigError as error:
        raise ConfigError(f"section {stage}: {error}") from None


def _missing(config: SubmitConfig) -> SubmitConfig:
    """Exactly the stages whose last job is over and did not end well; they wait for those before them that live."""
    jobs = queued_jobs(config.run_dir)
    if not jobs:
        raise ConfigError(f"action=missing: nothing was submitted for {config.run_dir}; leave action out")
    if any(queued.state.state == "UNREACHABLE" for queued in jobs):
        raise EnvironmentRefused("action=missing: neither squeue nor sacct answers here; submit from a login node")
    lost = lost_jobs(config.run_dir, jobs)
    if lost and "stages" in config.model_fields_set:
        missing = ", ".join(dict.fromkeys(queued.stage for queued in lost))
        lost = [queued for queued in lost if queued.stage in config.stages]
        if not lost:
            raise ConfigError(f"action=missing: of stages={','.join(config.stages)} none is missing; {missing} is")
    if not lost:
        living = ", ".join(f"{q.job.name} {q.job.job} ({q.state.state.lower()})" for q in jobs if not q.state.over)
        still = f"; {living} may still do so" if living else ""
        raise ConfigError(f"action=missing: all jobs submitted for {config.run_dir} that are over ended well{still}")
    stages = tuple(dict.fromkeys(queued.stage for queued in lost))
    before = jobs[: jobs.index(lost[0])]
    waits = [queued.job.job for queued in before if not queued.state.over]
    return config.model_copy(update={"stages": stages, "after": ":".join(filter(None, [config.after, *waits[-1:]]))})


def _left_over(config: SubmitConfig) -> list[str]:
    """A line on jobs of earlier submissions that never ran or failed, if this one does not queue them either."""
    lost = lost_jobs(config.run_dir, queued_jobs(config.run_dir))
    missing = [queued for queued in lost if queued.stage not in config.stages]
    if not missing:
        return []
    named = ", ".join(f"{queued.job.name} {queued.job.job} ({queued.state.state.lower()})" for queued in missing)
    stages = ",".join(dict.fromkeys(queued.stage for queued in missing))
    return [f"of earlier submissions, not queued again: {named}; the same command with 'stages=[{stages}]' does it"]


def _command() -> str:
    """How this submission was typed, without what concerned it alone."""
    words = [word for word in sys.argv[1:] if not word.startswith(("action=", "stages=", "after=", "dry_run="))]
    return f"{shlex.join(['tokscale', *words])}\n"


def _root() -> Path:
    """The folder that a copy of the code repeats: a checkout, or where the package is installed."""
    return code_sources()[Path(tokscale.__file__).resolve().parent.name].parent
