"""`tokscale train-tokenizer`: an image tokenizer by the same loop and engines as every model, and the captions' BPE."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from tokscale.base.config import Config, PathKey, kind_of
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import Engine, TrainTask
from tokscale.base.registry import ConfigOf
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.warmstart import warm_start
from tokscale.data.loading import ImageLoader, ImageLoaderConfig
from tokscale.data.loading.held_out import SplitConfig
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.shards import RawDataset, shard_paths
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, OptimizerConfig, ScheduleConfig, TrainingEngineConfig
from tokscale.engine.schedule import Schedule
from tokscale.runs.arithmetic import arithmetic, in_recorded_arithmetic
from tokscale.runs.goodput import earlier
from tokscale.runs.guard import guarded, join
from tokscale.runs.run_folder import locked_run_dir, read_config, refuse_another_run
from tokscale.runs.segments import read_segments
from tokscale.runs.stage import StageResult, command
from tokscale.stages.inputs import open_images
from tokscale.stages.monitoring import MonitoredConfig, common_hooks, entropy_hook, held_out_hook, with_kept_split
from tokscale.stages.tokenizer_training import (
    DISCRIMINATOR,
    TOKENIZER,
    QualityConfig,
    first_images,
    measure,
    show,
    tokenizer_task,
)
from tokscale.stages.train import finished, seeded, split_batch, steady_metrics
from tokscale.stages.train_reconstructions import Reconstructions, ReconstructionsConfig
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.image import (
    IMAGE_TOKENIZERS,
    TrainableConfig,
    codec_class,
    is_trainable,
    load_image_tokenizer,
    save_image_tokenizer,
)
from tokscale.tokenizers.text import load_text_tokenizer, save_text_tokenizer
from tokscale.tokenizers.text.base import TextTrainingConfig
from tokscale.tokenizers.text.bpe import BPEConfig
from tokscale.tokenizers.text.registry import TEXT_TRAINING, AnyTraining, trained_class
from tokscale.train.hardware import peak_flops_here
from tokscale.train.hooks import Hook
from tokscale.train.loop import LoopConfig, Trainer
from tokscale.train.metrics import read_metrics
from tokscale.train.watchdog import Watchdog

FOLDER = "train-tokenizer"
"""Below `run_dir`: the training run's own folder, beside that of the model."""


class TrainTokenizerConfig(MonitoredConfig):
    """Keys of the `train-tokenizer` stage."""

    tokenizer: Annotated[
        Config, ConfigOf(IMAGE_TOKENIZERS, lambda codec: codec.config_class, is_trainable, also=TEXT_TRAINING)
    ]
    """What to train; `bpe`, or another kind of text tokenizer, trains that alone."""
    text: AnyTraining | None = BPEConfig()
    """The text tokenizer to train beside an image tokenizer, where there is none yet; null for none."""
    engine: TrainingEngineConfig = EagerConfig(dtype="auto")
    """Where state lives and in which precision."""
    optim: OptimizerConfig = AdamWConfig(lr=1e-3, weight_decay=0.0)
    """What moves the weights."""
    discriminator_optim: OptimizerConfig | None = None
    """What moves the weights of a discriminator; null for the same."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    data: ImageLoaderConfig = ImageLoaderConfig()
    """How the images are read."""
    loop: LoopConfig = LoopConfig()
    """How long, and how often to look."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often to save, and how much to keep."""
    batch_size: int = Field(default=64, ge=1)
    """Images of one optimizer step, over all ranks and micro batches."""
    micro_batches: int = Field(default=1, ge=1)
    """Parts into which a rank splits its share of the batch, to need less memory."""
    init_from: PathKey | None = None
    """Begin with the weights of an image tokenizer's folder, a checkpoint, or the newest of a folder of checkpoints."""
    init_exclude: tuple[str, ...] = ()
    """Names or patterns, e.g. `decoder.*`, of tensors not taken from `init_from`. All others must fit exactly."""
    reconstructions: ReconstructionsConfig = ReconstructionsConfig()
    """What to look at while it trains."""
    quality: QualityConfig = QualityConfig()
    """What to measure in the end."""


CONFIG = TrainTokenizerConfig


def run(config: TrainTokenizerConfig, env: ProcessEnv) -> StageResult:
    """Train to `loop.total_steps` from the newest checkpoint, then write the tokenizer's folder.

    Raises:
        ConfigError: When the batch does not divide, or the folder holds a different run.
        DataError: When there are no raw shards, or too many of their images are unusable.
    """
    split_batch(config.batch_size, env.world, config.micro_batches)
    if not isinstance(config.tokenizer, TextTrainingConfig):
        Schedule(config.schedule, config.loop.total_steps)  # refuses before the folder says that it holds such a run
    comm = join(config, env)
    if _all_there(config, comm):
        comm.close()
        return _result(config, skipped=True)
    config = with_kept_split(config, "data", config.run_dir / FOLDER, FOLDER, comm)
    with locked_run_dir(config.run_dir / FOLDER, FOLDER, config, comm, _products(config)):
        comm.on_main("training the text tokenizer", lambda: _train_text(config))
        if not isinstance(config.tokenizer, TextTrainingConfig):
            folder, raw = config.run_dir / FOLDER, config.data_dir / "raw"
            with guarded(config, comm, stage=FOLDER, folder=folder, files=lambda: shard_paths(raw)) as watchdog:
                engine = in_recorded_arithmetic(config.run_dir / FOLDER, config.engine, comm)
                config = config.model_copy(update={"engine": engine})
                with arithmetic(comm.device, tf32=engine.tf32, deterministic=config.deterministic):
                    _train_image(config, config.tokenizer, comm, watchdog)
        comm.barrier()
    comm.close()
    return _result(config)


def _all_there(config: TrainTokenizerConfig, comm: Comm) -> bool:
    text, image = comm.on_main(
        "looking for tokenizers",
        lambda: (
            _text_config(config) is None or (config.text_tokenizer_folder / "config.json").exists(),
            (config.image_tokenizer_folder / "config.json").exists(),
        ),
    )
    folder, products = config.run_dir / FOLDER, _products(config)
    if isinstance(config.tokenizer, TextTrainingConfig):
        comm.on_main(f"looking into {folder}", lambda: _refuse_another_text(config))
        return text
    trained = finished(folder, FOLDER, config, config.loop.total_steps, comm, config.best, products)
    return text and trained and image


def _refuse_another_text(config: TrainTokenizerConfig) -> None:
    folder = config.run_dir / FOLDER
    there = read_config(folder).get(FOLDER, {}).get("tokenizer")
    if isinstance(there, Mapping) and there.get("kind") == kind_of(config.tokenizer):
        refuse_another_run(folder, FOLDER, config, _products(config))


def _products(config: TrainTokenizerConfig) -> dict[str, Path]:
    """The text tokenizer, which is there before the first step of an image tokenizer."""
    alone = isinstance(config.tokenizer, TextTrainingConfig)
    return {"tokenizer" if alone else "text": config.text_tokenizer_folder}


def _text_config(config: TrainTokenizerConfig) -> TextTrainingConfig | None:
    return config.tokenizer if isinstance(config.tokenizer, TextTrainingConfig) else config.text


def _train_text(config: TrainTokenizerConfig) -> None:
    asked, folder = _text_config(config), config.text_tokenizer_folder
    if asked is None or (folder / "config.json").exists():
        return
    captions = _captions(RawDataset(config.data_dir / "raw"))
    save_text_tokenizer(trained_class(asked).trained(asked, captions, folder), folder)


def _captions(dataset: RawDataset) -> Iterator[str]:
    for index in range(len(dataset)):
        shard, sample = dataset.sample(index)
        try:
            yield shard.caption(sample)
        except BadSample:
            continue  # tokenization counts and lists them


def _train_image(config: TrainTokenizerConfig, tokenizer: TrainableConfig, comm: Comm, watchdog: Watchdog) -> None:
    with torch.device("meta"):
        shape = codec_class(tokenizer)(tokenizer)
    read = partial(
        ImageLoader,
        image_size=shape.image_size,
        channels=shape.channels,
        comm_rank=comm.rank,
        comm_world=comm.world,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    dataset = comm.on_main("opening the data", lambda: RawDataset(config.data_dir / "raw"))
    loader, held_out = open_images(config.data, dataset, read)
    task = tokenizer_task(tokenizer, partial(_engine, config, comm), comm, config.micro_batches)
    engine = task.engines[TOKENIZER]
    for trained in task.engines.values():
        trained.keep_options = bool(read_segments(config.run_dir / FOLDER))
    store = CheckpointStore(config.run_dir / FOLDER / "checkpoints", config.checkpoint, comm)
    if store.empty():
        comm.on_main("looking for an image tokenizer", lambda: _refuse_to_replace(config.image_tokenizer_folder))
        if config.init_from is not None:
            warm_start(engine, config.init_from, comm, exclude=config.init_exclude)
    trainer = Trainer(
        task,
        loader,
        hooks=_hooks(config, tokenizer, task, held_out, comm),
        config=config.loop,
        store=store,
        comm=comm,
        run_dir=config.run_dir / FOLDER,
        seed=config.seed,
        peak_flops=peak_flops_here(comm.device, engine.dtype),
        watchdog=watchdog,
        run_metadata={
            "config": config.model_dump(mode="json"),
            "models": {"tokenizer": tokenizer.model_dump(mode="json")},
        },
        earlier=partial(earlier, config.run_dir / FOLDER),
    )
    with closing(loader):
        trainer.run()
    with engine.gathered() as model, comm.raise_together("writing the image tokenizer"):
        if comm.is_main:
            made = codec_class(tokenizer)
            codec = made(made.published(tokenizer))
            codec.load_state_dict({name: value.detach().float().cpu() for name, value in model.state_dict().items()})
            save_image_tokenizer(codec, config.image_tokenizer_folder)


def _refuse_to_replace(folder: Path) -> None:
    if (folder / "config.json").exists():
        raise ConfigError(
            f"image_tokenizer: {folder} is there already, and this run has no checkpoint that it could be of; give "
            "image_tokenizer=FOLDER for another place, or move it away"
        )


def _hooks(
    config: TrainTokenizerConfig, tokenizer: TrainableConfig, task: TrainTask, held_out: ImageLoader | None, comm: Comm
) -> list[Hook]:
    """What is looked at while it trains; what measures comes first."""
    folder, total, engine = config.run_dir / FOLDER, config.loop.total_steps, task.engines[TOKENIZER]
    hooks: list[Hook] = []
    if held_out is not None:
        micro_batch = split_batch(config.batch_size, comm.world, config.micro_batches)
        hooks.append(held_out_hook(config, engine, [held_out], comm, micro_batch, total))
        if (looks := config.reconstructions).every_steps:
            looking = Reconstructions(looks, tokenizer, engine, held_out, comm, total_steps=total, run_dir=folder)
            hooks.append(looking)
    if config.diagnostics.attention_entropy_every:
        hooks.append(entropy_hook(config, engine, [] if held_out is None else [held_out], comm))
    return hooks + common_hooks(config, comm, folder, task.engines)


def _engine(config: TrainTokenizerConfig, comm: Comm, name: str, make: Callable[[], nn.Module]) -> Engine:
    """The engine of a network by name."""
    # A discriminator is small, the generator looks through it in the middle of its own forward pass, and its gradient
    # penalty is differentiated twice: an engine that divides weights could follow neither.
    judging = name == DISCRIMINATOR
    return build_engine(
        name,
        seeded(make, config.seed, name),
        config=config.engine.with_whole_weights() if judging else config.engine,
        optimizer=(config.discriminator_optim if judging else None) or config.optim,
        schedule=config.schedule,
        comm=comm,
        micro_batches=config.micro_batches,
        micro_batch_size=split_batch(config.batch_size, comm.world, config.micro_batches),
        total_steps=config.loop.total_steps,
    )


def _measured(config: TrainTokenizerConfig, tokenizer: FrozenImageTokenizer) -> dict[str, float]:
    options = config.quality
    folder = options.data_dir or config.data_dir
    data = config.data if options.data_dir is None else config.data.model_copy(update={"held_out": SplitConfig()})
    images = first_images(folder, tokenizer, data, options.images, config.seed)
    show(tokenizer, images, config.run_dir / FOLDER / "samples" / "reconstructions.png")
    return measure(tokenizer, images, options.features)


def _result(config: TrainTokenizerConfig, *, skipped: bool = False) -> StageResult:
    outputs, words, metrics = {}, [], {}
    if _text_config(config) is not None:
        text = load_text_tokenizer(config.text_tokenizer_folder)
        outputs["text_tokenizer"] = config.text_tokenizer_folder
        words.append(f"{text.num_tokens} text ids in {config.text_tokenizer_folder}")
    if not isinstance(config.tokenizer, TextTrainingConfig):
        folder = config.image_tokenizer_folder
        metrics = steady_metrics(read_metrics(config.run_dir / FOLDER))
        if not skipped:
            metrics |= _measured(config, load_image_tokenizer(folder))
        outputs |= {"image_tokenizer": folder, "reconstructions": config.run_dir / FOLDER / "samples"}
        words.append(f"{kind_of(config.tokenizer)} in {folder}, loss {metrics.get('loss', float('nan')):.4g}")
        if "psnr" in metrics:
            unseen = config.quality.data_dir or config.data.held_out.share or config.data.held_out.path
            seen = "" if unseen else " (on training images)"
            rfid = f"rFID {metrics['rfid']:.4g}" if "rfid" in metrics else "no rFID without quality.features"
            words.append(f"{metrics['codes_used']:.0f} codes used, PSNR {metrics['psnr']:.1f} dB, {rfid}{seen}")
    return StageResult("; ".join(words), outputs, metrics, command("tokenize", config), skipped=skipped)
