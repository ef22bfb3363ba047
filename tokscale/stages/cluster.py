"""A cluster as `submit` needs to know it: flags for `sbatch`, and settings for the files of `slurm/`."""

import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tokscale.base.config import Config, did_you_mean
from tokscale.base.kinds import for_each
from tokscale.dist.slurm import SIGNAL_SECONDS

Env = dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Annotated[str, Field(coerce_numbers_to_str=True)]]

CLOSE = "tokenize-close"
"""The task that checks and closes what the workers of `tokenize` made."""
EMBED = "embed"
"""`tokenize action=embed`, for models that read stored states of a text encoder."""
EMBED_CLOSE = "embed-close"
"""The task that embeds what none of the workers of `embed` has; what that needs is what they need."""
STAGES = ("prepare", "train-tokenizer", "tokenize", CLOSE, EMBED, EMBED_CLOSE, "train", "export", "evaluate", "sample")
"""What has resources of its own."""
SEVERAL_RANKS = ("train", "train-tokenizer")
"""Stages of several ranks, which take whole nodes; the others have one task."""
ARRAYS = ("tokenize", EMBED)
WITHOUT_GPU = ("prepare", CLOSE, "export")
_MEMORY = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_IMAGES, _ARCHIVES = (".sif", ".sqsh"), (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_MEBI = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024 * 1024}


class Resources(Config):
    """What a job asks the scheduler for. What is left out is the site's default."""

    partition: str | None = None
    """Where it runs."""
    account: str | None = None
    """To whom the time is charged."""
    qos: str | None = None
    """Quality of service."""
    reservation: str | None = None
    """Nodes that were set aside."""
    constraint: str | None = None
    """Features that the nodes must have, e.g. `h100&ib`."""
    time: str | None = None
    """Time limit, `hours:minutes:seconds` or `days-hours`; a stage that keeps its progress and needs longer comes
    again by itself."""
    memory: str | None = None
    """Of each node, e.g. `900G`; `0` is all that a node has."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores of each task, for reading data."""
    exclusive: bool | None = None
    """Whole nodes, with all their memory unless `memory` says otherwise."""
    mail_type: str | None = None
    """When the scheduler writes a mail, e.g. `END,FAIL`."""
    mail_user: str | None = None
    """To whom."""
    flags: tuple[str, ...] = ()
    """Further flags of `sbatch`."""

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            hours, rest = divmod(value, 3600)
            shown = f"{hours}:{rest // 60:02}:{rest % 60:02}"
            raise ValueError(f'YAML reads hours:minutes:seconds without quotes as a number; write "{shown}" in quotes')
        return value

    @field_validator("memory", mode="before")
    @classmethod
    def _zero_is_all(cls, value: Any) -> Any:
        return "0" if value == 0 and not isinstance(value, bool) else value

    @field_validator("memory")
    @classmethod
    def _a_size(cls, value: str | None) -> str | None:
        if value is not None and not _MEMORY.fullmatch(value):
            raise ValueError(f"{value!r} is no amount of memory; write e.g. 900G, or 0 for all of a node")
        return value

    @field_validator("flags")
    @classmethod
    def _are_flags(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        for flag in flags:
            if not flag.startswith("-"):
                raise ValueError(f"{flag!r} is no flag of sbatch; write e.g. --comment=text")
            if re.fullmatch(r"-\S+\s.*", flag) and "=" not in flag.split()[0]:
                raise ValueError(f"{flag!r} is one word to sbatch; write {flag.split()[0]}={flag.split(None, 1)[1]}")
        return flags

    @field_validator("time")
    @classmethod
    def _a_time(cls, value: str | None) -> str | None:
        if value is not None and not _TIME.fullmatch(value):
            raise ValueError(f"{value!r} is no time limit; write hours:minutes:seconds, days-hours, or minutes")
        return value


class StageResources(Resources):
    """What one stage asks for; what is left out is as for all stages."""

    nodes: int | None = Field(default=None, ge=1)
    """Of a stage of several ranks."""
    tasks_per_node: int | None = Field(default=None, ge=1)
    """Ranks of each node, of a stage of several ranks; by default one for each GPU."""
    at_once: int | None = Field(default=None, ge=1)
    """Tasks of an array that may run at the same time."""
    max_failures: int | None = Field(default=None, ge=0)
    """How often the stage's job may come again after a killed, lost or stalled rank."""


Runtime = Literal["none", "pyxis", "apptainer", "singularity", "command"]
_IMAGE, _COMMAND = (("image",), ("command",)), (("command",), ("image", "mounts", "flags"))
_OF_RUNTIMES = for_each(
    Runtime,
    {"none": ((), ()), "pyxis": _IMAGE, "apptainer": _IMAGE, "singularity": _IMAGE, "command": _COMMAND},
)
"""The keys that each runtime needs, and those that it refuses."""


class ContainerConfig(Config):
    """What tasks run in. The image needs no program of Slurm: the batch script asks the scheduler, outside of it."""

    runtime: Runtime = "none"
    """`pyxis` is Slurm's plugin for enroot; `command` is any other runtime, see there."""
    image: str = ""
    """`registry#name:tag` or a `.sqsh` file for pyxis, a `.sif` file for apptainer."""
    mounts: tuple[str, ...] = ()
    """`from:to`. The run folder, the data, the code and the folder you submit from must be inside."""
    flags: tuple[str, ...] = ()
    """Further flags of the runtime: `--rocm`, of pyxis those of srun such as `--no-container-remap-root`."""
    command: tuple[str, ...] = ()
    """With `runtime=command`: the words in front of the program, e.g. `[podman-hpc, run, --rm, --gpu, --env-host, -v,
    "/shared:/shared", -w, /shared, registry/image:tag]`. It must hand on the variables of the task."""

    @model_validator(mode="after")
    def _says_what_it_needs(self) -> "ContainerConfig":
        needed, refused = _OF_RUNTIMES[self.runtime]
        for key in needed:
            if not getattr(self, key):
                raise ValueError(f"runtime={self.runtime} needs {'an' if key[0] in 'aeiou' else 'a'} {key}")
        for key in refused:
            if getattr(self, key):
                raise ValueError(f"runtime={self.runtime} takes no {key}; command is all words in front of the program")
        return self

    @field_validator("mounts")
    @classmethod
    def _from_to(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            if not mount.startswith("/") or "," in mount:
                raise ValueError(f"{mount!r} is no mount; write e.g. /shared:/shared")
        return mounts


class ClusterConfig(Resources):
    """One machine room. Nothing of it changes a result.

    Keys of `Resources` are those of all stages; `memory` is that of a whole node, of which a stage with one GPU takes
    its share, and a stage without GPUs nothing. `cpu` and `stages` say what differs.
    """

    cpus_per_task: int | None = Field(default=8, ge=1)
    """Cores of each task, for reading data."""
    cpu: Resources = Resources()
    """What differs for stages without a GPU: prepare, export and the end of tokenize."""
    stages: dict[str, StageResources] = {}
    """What differs for single stages, by name."""
    nodes: int = Field(default=1, ge=1)
    """Of `train`."""
    tokenizer_nodes: int = Field(default=1, ge=1)
    """Of `train-tokenizer`."""
    gpus_per_node: int = Field(default=8, ge=0)
    """Also tasks of each node, one for each GPU; 0 takes `tasks_per_node`."""
    tasks_per_node: int = Field(default=1, ge=1)
    """Ranks of each node where there are no GPUs."""
    gpu_flag: str = "--gpus-per-node={count}"
    """How this site asks for GPUs, `{count}` of each node or `{total}` of the job: `--gres=gpu:h100:{count}`,
    `--gpus={total}`, `--gpus-per-task=1`, or several; empty where they come with the partition or a constraint."""
    signal_seconds: int = Field(default=180, ge=10)
    """How long before the end of the time Slurm warns, and up to a minute earlier; of a short `time` its last quarter.
    Training saves sooner by itself when its steps and saves take longer (`loop.end_margin_seconds`)."""
    max_preemptions: int = Field(default=1000, ge=0)
    """How often a job may come again because its time was over, it was preempted, or Slurm itself put it back."""
    max_failures: int | None = Field(default=None, ge=0)
    """How often a job may come again after a killed, lost or stalled rank; by default 20 for stages of several ranks,
    3 for others. A job that ends before its program has started comes again at most three times."""
    max_bad_nodes: int = Field(default=10, ge=0)
    """How often a job may come again to leave out nodes that preflight refused."""
    python: str | None = None
    """Interpreter on the nodes (inside the container); by default the one that submits."""
    environment: str | None = None
    """A packed environment (`.tar`, `.tar.gz`, `.tar.zst` with `bin/python` in it) or an image (`.sif`, `.sqsh`) that
    is copied to each node's own disk once, so that ranks do not read thousands of small files from a shared one. An
    image takes the place of `container.image`, an environment that of `python`."""
    modules: tuple[str, ...] = ()
    """For `module load`."""
    container: ContainerConfig = ContainerConfig()
    """What tasks run in."""
    interface: str | None = None
    """Network interface between nodes, e.g. `ib0`, for gloo and NCCL alike (`ip -brief address` lists them)."""
    env: Env = {}
    """Further variables of every task: NCCL's, timeouts."""

    @field_validator("stages")
    @classmethod
    def _known_stages(cls, stages: dict[str, StageResources]) -> dict[str, StageResources]:
        for stage, own in stages.items():
            if stage not in STAGES:
                raise ValueError(f"no stage {stage!r} is submitted{did_you_mean(stage, STAGES)}")
            if stage not in SEVERAL_RANKS and (own.nodes or own.tasks_per_node):
                raise ValueError(
                    f"{stage}: has one task a job; nodes and tasks_per_node are of {' and '.join(SEVERAL_RANKS)}"
                )
            if stage not in ARRAYS and own.at_once:
                raise ValueError(f"{stage}: is no array; at_once is of {' and '.join(ARRAYS)}")
        return stages

    @field_validator("gpu_flag")
    @classmethod
    def _counts(cls, flag: str) -> str:
        unknown = set(re.findall(r"{([^{}]*)}", flag)) - {"count", "total"}
        if unknown or flag.count("{") != flag.count("}"):
            raise ValueError(
                f"{flag!r}: only {{count}} is filled in, with the GPUs of a node, and {{total}}, of the job"
            )
        try:
            words = shlex.split(flag)
        except ValueError as error:
            raise ValueError(f"{flag!r}: {error}") from None
        if words and not words[0].startswith("-"):
            raise ValueError(f"{flag!r} is no flag of sbatch; write e.g. --gres=gpu:h100:{{count}}")
        return flag

    @field_validator("interface")
    @classmethod
    def _is_a_name(cls, interface: str | None) -> str | None:
        if interface and re.search(r"[\^=\s/]", interface):
            raise ValueError(
                f"{interface!r} is no name of an interface, and gloo knows no patterns; give those of NCCL by "
                "env.NCCL_SOCKET_IFNAME"
            )
        return interface

    @model_validator(mode="after")
    def _one_word_for_gpus(self) -> "ClusterConfig":
        """Flags for GPUs are added up by sbatch, and a second `--gres` takes the place of the first."""
        for flag in (flag for place in (self, self.cpu, *self.stages.values()) for flag in place.flags):
            option, _, value = flag.partition("=")
            asks = option.startswith(("--gpus", "-G")) or (option in ("--gres", "--tres-per-task") and "gpu" in value)
            replaces = option == "--gres" and "--gres" in self.gpu_flag
            if self.gpu_flag and self.gpus_per_node and (asks or replaces):
                raise ValueError(
                    f"flags: {flag} contradicts gpu_flag={self.gpu_flag!r}; say all of it there, or set gpu_flag=''"
                )
        return self

    @model_validator(mode="after")
    def _honours_what_it_takes(self) -> "ClusterConfig":
        if self.gpus_per_node and self.tasks_per_node > 1:
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node}: is for nodes without GPUs, others have a task for each; give "
                "stages.train.tasks_per_node for another number, or set gpus_per_node=0"
            )
        image = self.environment is not None and self.environment.endswith(_IMAGES)
        if image and _OF_RUNTIMES[self.container.runtime] != _IMAGE:
            raise ValueError(
                f"environment={self.environment} is an image; container.runtime={self.container.runtime} runs none"
            )
        if self.environment is not None and not self.environment.endswith((*_IMAGES, *_ARCHIVES)):
            raise ValueError(f"environment={self.environment}: is none of {', '.join((*_ARCHIVES, *_IMAGES))}")
        return self

    def tasks(self, stage: str) -> tuple[int, int]:
        """Nodes of a stage, and its tasks on each."""
        if stage not in SEVERAL_RANKS:
            return 1, 1
        own = self.stages.get(stage, StageResources())
        nodes = own.nodes or {"train": self.nodes, "train-tokenizer": self.tokenizer_nodes}[stage]
        return nodes, own.tasks_per_node or self.gpus_per_node or self.tasks_per_node

    def resources(self, stage: str) -> Resources:
        """What a stage asks for, of the three places that may say so."""
        own = self._own(stage)
        places = (self, self.cpu, *own) if stage in WITHOUT_GPU else (self, *own)
        found = {name: _last(getattr(place, name) for place in places) for name in Resources.model_fields}
        found["flags"] = tuple(flag for place in places for flag in place.flags)
        if stage in SEVERAL_RANKS and found["exclusive"] is None:
            found["exclusive"] = self.gpus_per_node > 0
        whole_nodes = _last(place.memory for place in places[1:])
        if whole_nodes is None and self.memory is not None and stage not in SEVERAL_RANKS:
            shared = stage not in WITHOUT_GPU and self.gpus_per_node > 0
            found["memory"] = _share(self.memory, self.gpus_per_node) if shared else None
        if found["exclusive"] and found["memory"] is None:
            found["memory"] = "0"  # otherwise many sites give their default for each requested core
        return Resources(**found)

    def _own(self, stage: str) -> tuple[StageResources, ...]:
        names = (EMBED, EMBED_CLOSE) if stage == EMBED_CLOSE else (stage,)
        return tuple(self.stages[name] for name in names if name in self.stages)

    def sbatch_flags(self, stage: str, array: int = 0) -> list[str]:
        """Flags for one stage.

        Args:
            stage: By name, `tokenize-close` included.
            array: Tasks of an array; 0 means none.
        """
        wanted, (nodes, tasks) = self.resources(stage), self.tasks(stage)
        named = {
            "partition": wanted.partition,
            "account": wanted.account,
            "qos": wanted.qos,
            "reservation": wanted.reservation,
            "constraint": wanted.constraint,
            "mem": wanted.memory,
            "time": wanted.time,
            "mail-type": wanted.mail_type,
            "mail-user": wanted.mail_user,
        }
        flags = [f"--{name}={value}" for name, value in named.items() if value]
        flags += [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--cpus-per-task={wanted.cpus_per_task or 1}"]
        flags += [f"--signal=USR1@{min(self.signal_seconds, _seconds(wanted.time) // 4)}"]
        flags += ["--exclusive"] if wanted.exclusive else []
        if stage not in WITHOUT_GPU and self.gpus_per_node and self.gpu_flag:
            count = self.gpus_per_node if stage in SEVERAL_RANKS else 1
            flags += shlex.split(self.gpu_flag.format(count=count, total=count * nodes))
        if array:
            at_once = self.stages.get(stage, StageResources()).at_once
            flags += [f"--array=0-{array - 1}" + (f"%{at_once}" if at_once else "")]
        return flags + list(wanted.flags)

    def settings(self, stage: str) -> dict[str, str]:
        """What the batch file of a stage reads, as variables of the shell."""
        own = (place.max_failures for place in self._own(stage))
        failures = _last((20 if stage in SEVERAL_RANKS else 3, self.max_failures, *own))
        found = {
            "TOKSCALE_MAX_PREEMPTIONS": str(self.max_preemptions),
            "TOKSCALE_MAX_FAILURES": str(failures),
            "TOKSCALE_MAX_BAD_NODES": str(self.max_bad_nodes),
            SIGNAL_SECONDS: str(self.signal_seconds),
            "TOKSCALE_MODULES": " ".join(self.modules),
            "TOKSCALE_ENVIRONMENT": self.environment or "",
            "TOKSCALE_CONTAINER": self.container.runtime,
            "TOKSCALE_CONTAINER_IMAGE": self.container.image,
            "TOKSCALE_CONTAINER_MOUNTS": ",".join(self.container.mounts),
            "TOKSCALE_CONTAINER_FLAGS": shlex.join(self.container.flags),
            "TOKSCALE_CONTAINER_COMMAND": shlex.join(self.container.command),
            "TOKSCALE_INTERFACE": self.interface or "",
        }
        return {name: value for name, value in found.items() if value} | dict(self.env)


def _last(values: Any) -> Any:
    """The last of some values that is given, None when none is."""
    given = [value for value in values if value is not None]
    return given[-1] if given else None


def _seconds(time: str | None) -> int:
    """Of a time limit as Slurm writes it; very many where none is given."""
    if time is None or not time[0].isdigit():
        return 10**9
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


def _share(memory: str, parts: int) -> str:
    found = _MEMORY.fullmatch(memory)
    assert found is not None, "was checked"
    return f"{int(int(found[1]) * _MEBI[found[2].upper()] / parts)}M" if int(found[1]) else "0"
