"""A cluster as `submit` needs to know it: flags for `sbatch`, and variables for the files of `slurm/`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tokscale.base.config import Config

Env = dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]]

SEVERAL_RANKS = ("train", "train-tokenizer")
"""Stages of several ranks; the others have one task."""
WITHOUT_GPU = ("prepare", "export")


class ContainerConfig(Config):
    """What tasks run in."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """`pyxis` is Slurm's plugin for enroot."""
    image: str = ""
    """`registry#name:tag` or a `.sqsh` file for pyxis, a `.sif` file for apptainer."""
    mounts: tuple[str, ...] = ()
    """`from:to`."""

    @model_validator(mode="after")
    def _has_image(self) -> "ContainerConfig":
        if self.runtime != "none" and not self.image:
            raise ValueError(f"runtime={self.runtime} needs an image")
        return self


class ClusterConfig(Config):
    """One machine room. Nothing of it changes a result."""

    partition: str | None = None
    """For all stages; the site's default when left out."""
    cpu_partition: str | None = None
    """For stages without a GPU, where it differs."""
    account: str | None = None
    """To whom the time is charged."""
    qos: str | None = None
    """Quality of service."""
    nodes: int = Field(default=1, ge=1)
    """Of `train`."""
    tokenizer_nodes: int = Field(default=1, ge=1)
    """Of `train-tokenizer`."""
    gpus_per_node: int = Field(default=8, ge=0)
    """Also tasks of each node, one for each GPU; 0 takes `tasks_per_node`."""
    tasks_per_node: int = Field(default=1, ge=1)
    """Ranks of each node where there are no GPUs."""
    cpus_per_task: int = Field(default=8, ge=1)
    """Cores of each rank, for reading data."""
    memory: str | None = None
    """Of each node, e.g. `1000G`; the site's default when left out."""
    gpu_flag: str = "--gpus-per-node={count}"
    """How this site asks for GPUs: `--gres=gpu:h100:{count}`."""
    time: dict[str, str] = {}
    """Time limits by stage, `hours:minutes:seconds`; a run that needs longer comes again by itself."""
    signal_seconds: int = Field(default=180, ge=10)
    """How long before the end of the time Slurm warns: twice a step and a save, and up to a minute of its own."""
    max_restarts: int = Field(default=100, ge=0)
    """How often a job may be requeued."""
    python: str | None = None
    """Interpreter on the nodes (inside the container); by default the one that submits."""
    modules: tuple[str, ...] = ()
    """For `module load`."""
    container: ContainerConfig = ContainerConfig()
    """What tasks run in."""
    env: Env = {}
    """Further variables of every task: NCCL's interfaces, timeouts, caches."""
    flags: tuple[str, ...] = ()
    """Further flags of `sbatch`."""

    def sbatch_flags(self, stage: str, array: int = 0) -> list[str]:
        """Flags for one stage.

        Args:
            stage: By name.
            array: Tasks of an array; 0 means none.
        """
        several, gpu = stage in SEVERAL_RANKS, stage not in WITHOUT_GPU and self.gpus_per_node > 0
        nodes = {"train": self.nodes, "train-tokenizer": self.tokenizer_nodes}.get(stage, 1)
        tasks = (self.gpus_per_node or self.tasks_per_node) if several else 1
        partition = self.partition if gpu else self.cpu_partition or self.partition
        named = {"partition": partition, "account": self.account, "qos": self.qos, "mem": self.memory}
        named["time"] = self.time.get(stage)
        flags = [f"--{name}={value}" for name, value in named.items() if value]
        flags += [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--cpus-per-task={self.cpus_per_task}"]
        flags += [f"--signal=USR1@{self.signal_seconds}"]
        if stage not in WITHOUT_GPU:
            flags += [self.gpu_flag.format(count=self.gpus_per_node if several else min(1, self.gpus_per_node))]
        if array:
            flags += [f"--array=0-{array - 1}"]
        return flags + list(self.flags)

    def variables(self) -> dict[str, str]:
        """What the batch files read."""
        mounts = ",".join(self.container.mounts)
        found = {
            "TOKSCALE_MAX_RESTARTS": str(self.max_restarts),
            "TOKSCALE_MODULES": " ".join(self.modules),
            "TOKSCALE_CONTAINER": self.container.runtime,
            "TOKSCALE_CONTAINER_IMAGE": self.container.image,
            "TOKSCALE_CONTAINER_MOUNTS": mounts,
        }
        return {name: value for name, value in found.items() if value} | dict(self.env)
