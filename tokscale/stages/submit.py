"""`tokscale submit recipe=... cluster=...`: queue the stages of a recipe on a Slurm cluster, each after the one before.

Keys of a stage are given below its name: `train.loop.total_steps=5000`. Everything is decoded before anything is
queued, and written to `run_dir/submitted/`, from where the jobs read it: what is edited later concerns later jobs only.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from tokscale.base.config import decode, did_you_mean, encode
from tokscale.base.errors import ConfigError, EnvironmentRefused
from tokscale.base.files import atomic_write, write_json
from tokscale.base.package_data import package_data_path
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.runs.environment import environment, git_diff
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages import registry
from tokscale.stages.cluster import ClusterConfig

PIPELINE = ("prepare", "train-tokenizer", "tokenize", "train", "export", "evaluate")
JOBS_FILE = "jobs.json"


class SubmitConfig(StageConfig):
    """Keys of the `submit` stage."""

    stages: tuple[str, ...] = PIPELINE
    """What to queue, in this order; each stage waits for the one before."""
    cluster: ClusterConfig = ClusterConfig()
    """The machine room."""
    tokenize_tasks: int = Field(default=8, ge=1)
    """Tasks of the array that tokenizes."""
    after: str = Field(default="", coerce_numbers_to_str=True)
    """A job that the first stage waits for."""
    dry_run: bool = False
    """Print a shell script that does the same; queue and write nothing."""
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


@dataclass(frozen=True)
class Call:
    """One call of `sbatch`."""

    stage: str
    flags: list[str]
    file: Path
    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    def command(self, after: str = "") -> list[str]:
        """The words of the call; `after` is the job that must have succeeded."""
        wait = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *self.flags, *wait, str(self.file), *self.words]


def batch_files() -> dict[str, Path]:
    """The files of `slurm/`, by stage."""
    return {path.stem: path for path in sorted(package_data_path("slurm").glob("*.sbatch"))}


def run(config: SubmitConfig, env: ProcessEnv) -> StageResult:
    """Check every stage's configuration, write it down, and queue the jobs.

    Raises:
        ConfigError: When a stage's section cannot be honoured.
        EnvironmentRefused: When `sbatch` is missing or refuses.
    """
    sections = {stage: _checked(stage, config.sections.get(stage, {})) for stage in config.stages}
    folder = config.run_dir / "submitted" / time.strftime("%Y%m%d_%H%M%S")
    made = calls(config, folder / "recipe.yaml")
    if config.dry_run:
        print(script(made, config.after))
        return StageResult(f"would queue {len(made)} jobs; nothing was written")
    with atomic_write(folder / "recipe.yaml", "w") as file:
        yaml.safe_dump(sections, file, sort_keys=False, allow_unicode=True)
    write_json(folder / "code.json", environment(Comm(ProcessEnv())))
    if patch := git_diff():
        (folder / "changes.patch").write_text(patch)
    (config.run_dir / "logs").mkdir(exist_ok=True)  # Slurm does not make the folder of a job's output
    jobs = queue(made, config.after)
    write_json(folder / JOBS_FILE, jobs)
    listed = ", ".join(f"{stage} {job}" for stage, job in jobs.items())
    return StageResult(
        f"queued {listed}", {"submitted": folder}, next_command=f"squeue --jobs {','.join(jobs.values())}"
    )


def calls(config: SubmitConfig, recipe: Path) -> list[Call]:
    """The calls of `sbatch`, in order; all jobs read `recipe`."""
    files = batch_files()
    python = config.cluster.python or sys.executable
    variables = {
        "TOKSCALE_SLURM": str(package_data_path("slurm")),
        "TOKSCALE_PYTHON": python,
    } | config.cluster.variables()
    logs = config.run_dir.absolute() / "logs"
    made = []
    for stage in config.stages:
        for name, array, words in parts(stage, config.tokenize_tasks):
            log = f"{logs}/slurm-{name}-{'%A_%a' if array else '%j'}.log"
            flags = [*config.cluster.sbatch_flags(stage, array), f"--job-name=tokscale-{name}", f"--output={log}"]
            made.append(Call(name, flags, files[stage], [f"recipe={recipe.absolute()}", *words], variables))
    return made


def parts(stage: str, tokenize_tasks: int) -> list[tuple[str, int, list[str]]]:
    """The jobs of a stage: name, tasks of an array or 0, further words.

    Only tokenization has two: many workers that share the units, then one process that checks and closes the data set.
    """
    if stage != "tokenize":
        return [(stage, 0, [])]
    return [("tokenize", tokenize_tasks, ["action=run"]), ("tokenize-close", 1, [])]


def queue(made: Sequence[Call], after: str = "") -> dict[str, str]:
    """Call `sbatch` for each; the job ids by stage. What was queued is cancelled when a later call is refused.

    Raises:
        EnvironmentRefused: With what `sbatch` said.
    """
    jobs: dict[str, str] = {}
    for call in made:
        command = call.command(after)
        try:
            told = subprocess.run(command, capture_output=True, text=True, env=os.environ | call.variables)
        except FileNotFoundError:
            raise EnvironmentRefused("sbatch: not found; submit from a login node, or see dry_run=true") from None
        if told.returncode != 0:
            if jobs:
                subprocess.run(["scancel", *jobs.values()], capture_output=True)
            raise EnvironmentRefused(
                f"sbatch refused {call.stage}: {told.stderr.strip()}\n  {shlex.join(command)}\n"
                "nothing stays queued; look at cluster.* (configs/cluster)"
            )
        after = jobs[call.stage] = told.stdout.strip().split(";")[0]
    return jobs


def script(made: Sequence[Call], after: str = "") -> str:
    """The calls as a shell script."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in (made[0].variables if made else {}).items()]
    for call in made:
        name = call.stage.replace("-", "_")
        quoted = [word if "afterok:$" in word else shlex.quote(word) for word in call.command(after)]
        lines.append(f"{name}=$({' '.join(quoted)})")
        after = f"${name}"
    return "\n".join(lines)


def _checked(stage: str, section: Mapping[str, Any]) -> dict[str, Any]:
    module = registry.load(registry.find(stage))
    try:
        return encode(decode(module.CONFIG, dict(section)))
    except ConfigError as error:
        raise ConfigError(f"section {stage}: {error}") from None
