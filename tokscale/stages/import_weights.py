"""`tokscale import`: weights of the original implementations become an export folder, or a tokenizer folder."""

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from tokscale.base.config import PathKey, encode, kind_of
from tokscale.base.errors import ConfigError
from tokscale.base.files import read_json, sha256_file
from tokscale.checkpoint.card import model_card
from tokscale.checkpoint.export import ExportOptions, write_export
from tokscale.checkpoint.weights import read_export_manifest
from tokscale.dist.env import ProcessEnv
from tokscale.inference.text_encoder import needs_encoder
from tokscale.models.registry import build_model, model_class
from tokscale.runs.stage import StageConfig, StageResult, command
from tokscale.stages.export import example_prompts, use_of
from tokscale.stages.import_check import model_difference, tokenizer_difference
from tokscale.stages.originals import SOURCES, Asked, FoundModel
from tokscale.stages.text_states import imported_encoder
from tokscale.tokenizers.image import (
    PretrainedConfig,
    import_image_tokenizer,
    load_image_tokenizer,
    save_image_tokenizer,
)
from tokscale.tokenizers.pretrained.checkpoint_files import read_pickle
from tokscale.tokenizers.text import load_text_tokenizer

IMAGE_TOKENIZER = "image_tokenizer"
"""The source that is no implementation of a model: published image tokenizers, each with a configuration of ours."""


class ImportConfig(StageConfig):
    """Keys of the `import` stage."""

    source: str
    """Where the checkpoint comes from: `dalle_pytorch` (a DALL-E, a discrete VAE or a CLIP), `muse_maskgit` (a MaskGit,
    whose T5 is named by `text_encoder=`, or a VQGanVAE), `parti_pytorch` (T5, too), `rq_transformer` (told nothing
    beside its codes); or `image_tokenizer`, with `tokenizer=` saying which."""
    checkpoint: PathKey
    """The file as it was written or downloaded; a folder for some image tokenizers. Nothing in it is run."""
    out: PathKey
    """Receives the export, or the tokenizer's folder."""
    hparams: dict[str, Any] = {}
    """Arguments of the original's constructor that the checkpoint does not hold, or holds otherwise."""
    tokenizer: PretrainedConfig | None = None
    """With `source=image_tokenizer`: the network, e.g. `tokenizer=taming_f16_1024`."""
    dtype: Literal["fp32", "bf16", "fp16", "stored"] = "fp32"
    """Of the export's weights."""
    max_shard_gb: float = Field(default=5.0, gt=0)
    """Size limit of one safetensors file, in 10^9 bytes."""

    @model_validator(mode="after")
    def _known(self) -> "ImportConfig":
        known = [*SOURCES, IMAGE_TOKENIZER]
        if self.source not in known:
            raise ValueError(f"source={self.source}: not one of {', '.join(known)}")
        if (self.source == IMAGE_TOKENIZER) != (self.tokenizer is not None):
            raise ValueError(
                f"tokenizer= goes with source={IMAGE_TOKENIZER}, and with that alone; leave it out, or give both"
            )
        return self


CONFIG = ImportConfig


def run(config: ImportConfig, env: ProcessEnv) -> StageResult:
    """Read the checkpoint without running anything of it, and write it as ours.

    Raises:
        CheckpointError: When it cannot be read, or its weights do not fit its own options.
        ConfigError: Naming an option that cannot be carried over, or a tokenizer that is needed and not given.
        DataError: When a tokenizer folder is none.
    """
    if not env.is_main:
        return StageResult("rank 0 imports alone", skipped=True)
    if config.tokenizer is not None:
        return _imported_tokenizer(config, config.tokenizer)
    image = None if config.image_tokenizer is None else load_image_tokenizer(config.image_tokenizer)
    found = SOURCES[config.source](Asked(config.checkpoint, config.hparams, image), read_pickle(config.checkpoint))
    if isinstance(found, FoundModel):
        return _write_model(config, found)
    save_image_tokenizer(found, config.out)
    return _tokenizer_result(config, found.config.kind, tokenizer_difference(config.out, found))


def _imported_tokenizer(config: ImportConfig, tokenizer: PretrainedConfig) -> StageResult:
    described = config.out / "config.json"
    if described.exists() and read_json(described) != encode(tokenizer):
        raise ConfigError(f"out: {config.out} already holds another tokenizer; choose another folder, or move it away")
    import_image_tokenizer(tokenizer, config.checkpoint, config.out)
    return _tokenizer_result(config, kind_of(tokenizer))


def _tokenizer_result(config: ImportConfig, kind: str, difference: float | None = None) -> StageResult:
    loaded = load_image_tokenizer(config.out)
    shape = "x".join(str(side) for side in loaded.code_shape)
    return StageResult(
        f"{config.out} holds the {kind} of {config.checkpoint.name}: {loaded.image_size} pixels as {shape} codes of "
        f"{loaded.num_tokens}{_measured(difference)}",
        {"image_tokenizer": config.out},
        {} if difference is None else {"largest_difference": difference},
        next_command=command("tokenize", config.model_copy(update={"image_tokenizer": config.out}))
        if (config.data_dir / "raw").is_dir()
        else command("prepare", config),
    )


def _write_model(config: ImportConfig, found: FoundModel) -> StageResult:
    about = {"source": config.source, "checkpoint": sha256_file(config.checkpoint), "file": config.checkpoint.name}
    before = read_export_manifest(config.out)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        fitted, state, extras = _with_captions(config, found, scratch)
        model = model_class(fitted)
        with torch.device("meta"):
            meta_model = build_model(fitted)
        if found.codec is not None:
            save_image_tokenizer(found.codec, scratch / "image_tokenizer")
            extras["image_tokenizer"] = scratch / "image_tokenizer"
        elif config.image_tokenizer is not None:
            extras["image_tokenizer"] = config.image_tokenizer
        write_export(
            config.out,
            meta_model=meta_model,
            model_config=encode(fitted),
            state_dict=state,
            options=ExportOptions(
                dtype=config.dtype,
                max_shard_size=int(config.max_shard_gb * 1e9),
                extras=extras,
                card=model_card(
                    folder=config.out.name,
                    model_config=encode(fitted),
                    task=model.hub_task,
                    example=model.example,
                    about=about,
                    facts={},
                ),
                about=about,
            ),
        )
    skipped = before is not None and before == read_export_manifest(config.out)
    caption = example_prompts(encode(fitted))[0].partition("=")[2]
    untold = needs_encoder(fitted) and config.text_encoder is None  # what it is told is not here
    difference = None if skipped or untold else model_difference(config.out, state, caption, config.text_encoder)
    return StageResult(
        f"{config.out} holds the {kind_of(fitted)} of {config.checkpoint.name}{_measured(difference)}",
        {"export": config.out},
        {} if difference is None else {"largest_difference": difference},
        next_command=use_of(config, config.out, encode(fitted)),
        next_suggested=example_prompts(encode(fitted)),
        skipped=skipped,
    )


def _measured(difference: float | None) -> str:
    if difference is None:
        return ""
    return f"; one image through it and through the weights that were read differs by {difference:.1e} at most"


def _with_captions(config: ImportConfig, found: FoundModel, scratch: Path) -> tuple[Any, Any, dict[str, Path]]:
    """Options and weights for what reads the captions here, and the files of that in the export, by name."""
    if getattr(found.config, "condition", found) is None:
        return found.config, found.state, {}  # it is told nothing beside its codes
    if needs_encoder(found.config):
        fitted, extras = imported_encoder(config, found.config, scratch)
        return fitted, found.state, extras
    fitted, state = _with_text_tokenizer(config, found)
    return fitted, state, {"text_tokenizer": config.text_tokenizer_folder}


def _with_text_tokenizer(config: ImportConfig, found: FoundModel) -> tuple[Any, Any]:
    """Options and weights for the ids of the text tokenizer that is given."""
    if config.text_tokenizer is None:
        raise ConfigError(
            "text_tokenizer: the checkpoint does not hold its text tokenizer; give its folder. dalle-pytorch's default "
            "is CLIP's vocabulary (vocab.json and merges.txt); --hug and --chinese were Hugging Face tokenizers"
        )
    text = load_text_tokenizer(config.text_tokenizer)
    model, state = found.config, found.state
    words = encode(model)["num_text_tokens"]
    if text.num_tokens - text.config.id_shift > words:
        raise ConfigError(
            f"text_tokenizer: {config.text_tokenizer} has {text.num_tokens - text.config.id_shift} ids, the checkpoint "
            f"knows {words}; it was trained with another tokenizer"
        )
    if text.config.id_shift and found.with_padding_id is not None:
        state, model = found.with_padding_id(state, model)
    return model, state
