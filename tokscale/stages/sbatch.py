"""What surrounds a call of `sbatch`: its environment, a job's settings, and where its output goes."""

import re
import shlex
from collections.abc import Mapping

_OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_HOME")
_OF_EACH_JOB = re.compile(r"SBATCH_(GPU|GRES|ARRAY|(NO_)?REQUEUE$|OPEN_MODE$|SIGNAL$|WAIT$|MEM_PER_|CPUS_PER_GPU$)")
"""A person's habits for sbatch that would be added to what a cluster file asks for, or win over the batch files."""


def sbatch_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a call of `sbatch`, which jobs inherit, without what belongs to the job that submits.

    A shell inside an allocation has limits and bindings of its own (`SLURM_MEM_PER_CPU`, `SLURM_CPU_BIND`, ...), which
    contradict those of the new job. Of a person's own variables those stay that say who and where (`SBATCH_ACCOUNT`).
    """
    return {
        name: value
        for name, value in environ.items()
        if (not name.startswith("SLURM_") or name in _OF_THE_SITE) and not _OF_EACH_JOB.match(name)
    }


def output_flag(folder: str, name: str) -> str:
    """Where a job's output goes; of the whole path, only `name` may hold Slurm's patterns."""
    return f"--output={folder.replace('%', '%%')}/{name}"


def shell_settings(variables: Mapping[str, str]) -> str:
    """Variables as a file that a batch script sources."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
