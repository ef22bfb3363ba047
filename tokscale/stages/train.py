"""`tokscale train`: any model of the registry on its data, on any engine and any number of ranks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from tokscale.base import rng
from tokscale.base.config import Config, PathKey, encode, kind_of
from tokscale.base.errors import ConfigError
from tokscale.base.files import write_json
from tokscale.base.protocols import Engine, TextTokenizer
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.warmstart import warm_start
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import (
    COMPUTES_BF16,
    AdamWConfig,
    EagerConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingEngineConfig,
)
from tokscale.engine.construct import host_bytes
from tokscale.engine.groups import freeze
from tokscale.engine.schedule import Schedule
from tokscale.models.registry import build_model
from tokscale.nn.attention.module import training_backends
from tokscale.runs.arithmetic import arithmetic, in_recorded_arithmetic
from tokscale.runs.goodput import earlier, goodput
from tokscale.runs.guard import guarded, join
from tokscale.runs.run_folder import Products, locked_run_dir, refuse_another_run, update_env_json
from tokscale.runs.segments import cut_is_due, read_segments
from tokscale.runs.stage import StageConfig, StageResult, command
from tokscale.stages.fine_tuning import resizing_for
from tokscale.stages.inputs import CUT, Inputs, InputsConfig, TokenizerFacts, data_files, keep_class_names, open_inputs
from tokscale.stages.monitoring import common_hooks, ended_early, entropy_hook, held_out_hook, with_kept_split
from tokscale.stages.text_states import TextStates
from tokscale.stages.train_samples import SamplesConfig, samples_hook
from tokscale.train.best import BestConfig
from tokscale.train.hardware import arithmetic_here, peak_flops_here
from tokscale.train.hooks import Hook
from tokscale.train.loop import LoopConfig, Trainer, TrainResult
from tokscale.train.metrics import read_metrics
from tokscale.train.preflight import check_host_memory
from tokscale.train.task import SingleModelTask
from tokscale.train.watchdog import Watchdog


class TrainConfig(InputsConfig):
    """Keys of the `train` stage."""

    engine: TrainingEngineConfig = EagerConfig(dtype="auto")
    """Where state lives and in which precision."""
    optim: OptimizerConfig = AdamWConfig()
    """What moves the weights."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    loop: LoopConfig = LoopConfig()
    """How long, and how often to look."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often to save, and how much to keep."""
    samples: SamplesConfig = SamplesConfig()
    """Images drawn while it trains."""
    micro_batches: int = Field(default=1, ge=1)
    """Parts into which a rank splits its share of the batch, to need less memory. The result is the same."""
    init_from: PathKey | None = None
    """Begin with the weights of an export, a checkpoint, or the newest of a folder of checkpoints; with nothing else of
    them. A run that has a checkpoint of its own goes on from that instead."""
    init_exclude: tuple[str, ...] = ()
    """Names or patterns, e.g. `head.*`, of tensors not taken from `init_from`. All others must fit exactly."""
    init_resize: bool = False
    """Fine-tune an export with other captions, classes or sizes of images: rows of vocabularies are taken over by their
    words and names, codes where the image tokenizer is the same, and positions are stretched over another grid. What
    was done is said tensor by tensor, in the log and in `init_from.json`."""
    freeze: tuple[str, ...] = ()
    """Names or patterns, e.g. `*encoder*`, of parameters that are not trained. See `optim.lr_scales`, too."""
    init_weights: str = "raw"
    """Of checkpoints in `init_from`: `raw`, or an average such as `ema/0.999`."""

    @model_validator(mode="after")
    def _something_to_resize(self) -> "TrainConfig":
        if self.init_resize and self.init_from is None:
            raise ValueError("init_resize: fits the weights of init_from, which is not given")
        return self


CONFIG = TrainConfig


def run(config: TrainConfig, env: ProcessEnv) -> StageResult:
    """Train to `loop.total_steps`, from the newest checkpoint of the run folder if it has one.

    Raises:
        ConfigError: When the batch does not divide, or the folder holds a different run.
        DataError: When the token shards hold ids of another tokenizer than the one named.
    """
    micro_batch_size = split_batch(config.batch_size, env.world, config.micro_batches)
    Schedule(config.schedule, config.loop.total_steps)  # refuses before the folder says that it holds such a run
    comm = join(config, env)
    if finished(config.run_dir, "train", config, config.loop.total_steps, comm, config.best):
        comm.close()
        return _result(config, skipped=True)
    for key in ("data", "images"):
        config = with_kept_split(config, key, config.run_dir, "train", comm)
    with (
        locked_run_dir(config.run_dir, "train", config, comm),
        guarded(config, comm, stage="train", folder=config.run_dir, files=lambda: data_files(config)) as watchdog,
    ):
        engine = in_recorded_arithmetic(config.run_dir, config.engine, comm)
        config = config.model_copy(update={"engine": engine})
        with arithmetic(comm.device, tf32=engine.tf32, deterministic=config.deterministic):
            result = _train(config, comm, micro_batch_size, watchdog)
    comm.close()
    return _result(config, result)


def _train(config: TrainConfig, comm: Comm, micro_batch_size: int, watchdog: Watchdog) -> TrainResult:
    inputs = open_inputs(config, comm)
    if comm.is_main:
        keep_class_names(config)
    if comm.is_main and inputs.cut:
        write_json(config.run_dir / CUT, {key: found.metrics() for key, found in inputs.cut.items()})
    check_host_memory(config.preflight, comm, host_bytes(config.engine, parameters_of(inputs.model), comm.world))
    engine = build_engine(
        "model",
        lambda: freeze(seeded(lambda: build_model(inputs.model), config.seed, "model")(), config.freeze),
        config=config.engine,
        optimizer=config.optim,
        schedule=config.schedule,
        comm=comm,
        micro_batches=config.micro_batches,
        micro_batch_size=micro_batch_size,
        total_steps=config.loop.total_steps,
    )
    queries = torch.bfloat16 if COMPUTES_BF16[engine.dtype] else torch.float32
    update_env_json(
        config.run_dir,
        comm,
        attention=training_backends(engine.model, comm.device, queries),
        mfu_over=arithmetic_here(comm.device, engine.dtype),
    )
    engine.keep_options = bool(read_segments(config.run_dir))
    store = CheckpointStore(config.run_dir / "checkpoints", config.checkpoint, comm)
    if config.init_from is not None and store.empty():
        resizing = None
        if config.init_resize:
            folders = {"image_tokenizer": config.image_tokenizer_folder, "run_dir": config.run_dir}
            resizing = resizing_for(inputs, config.init_from, **folders)
        started = warm_start(
            engine,
            config.init_from,
            comm,
            exclude=config.init_exclude,
            weights=config.init_weights,
            resizing=resizing,
        )
        if comm.is_main:
            write_json(config.run_dir / "init_from.json", asdict(started))
    trainer = Trainer(
        SingleModelTask(engine, config.micro_batches),
        inputs.loader,
        hooks=_hooks(config, inputs, engine, comm, micro_batch_size),
        config=config.loop,
        store=store,
        comm=comm,
        run_dir=config.run_dir,
        seed=config.seed,
        peak_flops=peak_flops_here(comm.device, engine.dtype),
        watchdog=watchdog,
        run_metadata=_described(config, inputs),
        earlier=partial(earlier, config.run_dir),
    )
    with closing(inputs.loader):
        return trainer.run()


def _described(config: TrainConfig, inputs: Inputs) -> dict[str, Any]:
    """What its checkpoints say of this run."""
    facts = (inputs.image, inputs.text, inputs.states)
    found = run_metadata(config, {"model": inputs.model}, *facts, further=inputs.further)
    return found | {"data": list(inputs.data)}


def parameters_of(model: Config) -> int:
    """Of a fitted configuration; takes no memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(model).parameters())


def _hooks(config: TrainConfig, inputs: Inputs, engine: Engine, comm: Comm, micro_batch_size: int) -> list[Hook]:
    """What is looked at while it trains; what measures comes first."""
    hooks: list[Hook] = []
    if inputs.held_out:
        measured = held_out_hook(config, engine, inputs.held_out, comm, micro_batch_size, config.loop.total_steps)
        hooks.append(measured)
    if config.samples.every_steps:
        drawn = samples_hook(config, config.samples, inputs, engine, comm)
        hooks += [] if drawn is None else [drawn]
    if config.diagnostics.attention_entropy_every:
        hooks.append(entropy_hook(config, engine, inputs.held_out, comm))
    return hooks + common_hooks(config, comm, config.run_dir, {engine.name: engine})


def split_batch(batch_size: int, world: int, micro_batches: int) -> int:
    """Samples of one micro batch on one rank.

    Raises:
        ConfigError: When the ranks and micro batches do not divide the batch.
    """
    if batch_size % (world * micro_batches):
        raise ConfigError(
            f"batch_size={batch_size} does not divide into {world} ranks x micro_batches={micro_batches}; "
            f"take a multiple of {world * micro_batches}"
        )
    return batch_size // (world * micro_batches)


def finished(
    folder: Path,
    stage: str,
    config: StageConfig,
    total_steps: int,
    comm: Comm,
    best: BestConfig | None = None,
    products: Products | None = None,
) -> bool:
    """Whether this very run has its last step saved already. Collective; reads only.

    Raises:
        ConfigError: When the folder holds a different run.
    """

    def goes_on() -> bool:
        refuse_another_run(folder, stage, config, products or {})
        return cut_is_due(folder, config)

    if comm.on_main(f"looking into {folder}", goes_on):
        return False
    last = comm.on_main("looking at what was measured", lambda: ended_early(folder, best)) or total_steps
    return CheckpointStore(folder / "checkpoints", CheckpointConfig(async_save=False), comm).holds(last)


def seeded(make: Callable[[], nn.Module], seed: int, name: str) -> Callable[[], nn.Module]:
    """`make` under a random stream of its own: the same initial weights whatever ran before, on every rank."""

    def made() -> nn.Module:
        with rng.scope(seed, "init", name):
            return make()

    return made


def run_metadata(
    config: StageConfig,
    models: Mapping[str, Config],
    image: TokenizerFacts | None,
    text: TextTokenizer | None,
    states: TextStates | None = None,
    *,
    further: Sequence[TokenizerFacts] = (),
) -> dict[str, Any]:
    """What a checkpoint says of its run: enough to export it without the run's own configuration.

    Args:
        config: Of the stage.
        models: Fitted configuration of each engine's model, by the engine's name.
        image: Whose ids were trained on; None for a model of images themselves.
        text: Likewise; None for a model that reads no caption ids.
        states: Of a text encoder that were trained on, if any.
        further: The image tokenizer for other shapes of images that were trained on.
    """
    tokenizers: dict[str, Any] = {}
    if image is not None:
        path = str(config.image_tokenizer_folder.resolve())
        tokenizers["image"] = {"path": path, "fingerprint": image.fingerprint, "code_shape": list(image.code_shape)}
        if further:
            shapes = [{"fingerprint": each.fingerprint, "code_shape": list(each.code_shape)} for each in further]
            tokenizers["image"]["further"] = shapes
    if text is not None:
        tokenizers["text"] = {"path": str(config.text_tokenizer_folder.resolve()), "fingerprint": text.fingerprint}
    return {
        "config": encode(config),
        "models": {name: encode(model) for name, model in models.items()},
        "tokenizers": tokenizers,
        **({} if states is None else {"text_encoder": encode(states.record)}),
    }


def steady_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rates as the median over the run's lines, peaks as their largest, everything else as it was last."""
    metrics: dict[str, float] = {}
    for name in rows[-1] if rows else ():
        values = sorted(row[name] for row in rows if row.get(name) is not None)
        if not values or name == "time":
            continue
        if name.endswith("_per_second") or name in ("mfu", "data_wait", "seconds_per_step"):
            metrics[name] = values[len(values) // 2]
        elif name.startswith("memory_"):
            metrics[name] = values[-1]
        elif rows[-1][name] is not None:
            metrics[name] = rows[-1][name]
    return metrics


def _result(config: TrainConfig, result: TrainResult | None = None, *, skipped: bool = False) -> StageResult:
    metrics = steady_metrics(read_metrics(config.run_dir))
    if (found := goodput(config.run_dir)) is not None:
        metrics |= {"goodput": found.share, "useful_steps": found.useful_steps}
    seconds = "" if result is None else f" in {result.seconds:.0f} s"
    return StageResult(
        f"{kind_of(config.model)} at step {_last_step(config)}{seconds}, loss {metrics.get('loss', float('nan')):.4g}",
        outputs={"checkpoints": config.run_dir / "checkpoints", "metrics": config.run_dir / "metrics.jsonl"},
        metrics=metrics,
        next_command=command("export", config),
        skipped=skipped,
    )


def _last_step(config: TrainConfig) -> int:
    rows = read_metrics(config.run_dir)
    return rows[-1]["step"] if rows else config.loop.total_steps
