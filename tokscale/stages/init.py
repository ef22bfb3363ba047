"""`tokscale init pictures`: looks at images, captions and the machine, and writes a recipe for all stages."""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokscale.base.config import PathKey
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.files import atomic_write
from tokscale.base.log import logger
from tokscale.data.raw.survey import Survey, survey
from tokscale.dist.device import choose_device
from tokscale.dist.env import ProcessEnv
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages.init_sizes import Choice, Machine, choose, this_machine
from tokscale.tokenizers.text import train_bpe

_PROMPTS = 8
_LONGEST = 256
log = logger("init")


class InitConfig(StageConfig):
    """Keys of the `init` stage."""

    source: PathKey
    """What you have: a folder of images (with captions beside them, in class folders, or of the `datasets` library), a
    folder of tars, or a table. Also the first bare word: `tokscale init pictures`."""
    out: PathKey = Path("mine.yaml")
    """The recipe."""
    model: Literal["auto", "dalle", "maskgit", "parti", "rqtransformer"] = "auto"
    """`auto`: DALL-E for captions, MaskGIT for classes, RQ-Transformer for images alone."""
    hours: float = Field(default=2.0, gt=0)
    """How long the two trainings together may take on this machine."""
    image_size: Literal[32, 64, 128, 256] | None = None
    """Side of the images in pixels; by default what the data, the machine and the hours allow."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA when there is one."""
    flops: float | None = Field(default=None, gt=0)
    """Floating-point operations a second of the machine that will train, if it is another; measured here by default."""
    memory: float | None = Field(default=None, gt=0)
    """Its memory in GB; this machine's by default."""
    overwrite: bool = False
    """Replace `out` when it is there."""


CONFIG = InitConfig


def run(config: InitConfig, env: ProcessEnv) -> StageResult:
    """Write the recipe.

    Raises:
        ConfigError: When the model does not suit the data, or the recipe is there already.
        DataError: When there is nothing to train on.
    """
    if config.out.exists() and not config.overwrite:
        raise ConfigError(f"out: {config.out} is there already; choose another name, or overwrite=true")
    if config.out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"out: got {config.out}; a recipe's name ends in .yaml")
    found = survey(config.source)
    kind = _model_kind(config, found)
    machine = this_machine(choose_device(config.device, env.local_rank), config.flops)
    if config.memory is not None:
        machine = Machine(machine.device, config.memory * 1e9, machine.flops)
    vocabulary, words, cut = _text(found)
    chosen = choose(found, kind, machine, config.hours, image_size=config.image_size, words=words)
    run_dir = config.run_dir if config.run_dir != Path("runs/default") else Path("runs") / config.out.stem
    seen = _seen(found) + cut + _sized(chosen, machine, config.hours)
    text = _recipe(config, found, chosen, run_dir, vocabulary, seen)
    with atomic_write(config.out, "w") as file:
        file.write(text)
    if found.source is None:
        _link_tars(config.source, run_dir / "data" / "raw")
    recipe = config.out if config.out.is_absolute() else f"./{config.out}"
    first = "prepare" if found.source is not None else "train-tokenizer"
    return StageResult(
        "\n".join([*seen, f"written to {config.out}; look at it, every key is yours"]),
        outputs={"recipe": config.out},
        metrics={"images": float(found.images), "parameters": float(chosen.parameters)},
        next_command=f"tokscale {first} recipe={recipe}",
    )


def _model_kind(config: InitConfig, found: Survey) -> str:
    told = "captions" if found.captions else "classes" if found.classes is not None else "nothing"
    if found.classes is not None and found.source is not None and found.source.get("labels"):
        told = "classes"
    able = {"captions": ("dalle", "maskgit", "parti", "rqtransformer"), "classes": ("maskgit", "rqtransformer")}
    kinds = able.get(told, ("rqtransformer", "maskgit"))
    if config.model == "auto":
        return kinds[0]
    if config.model not in kinds:
        raise ConfigError(f"model: got {config.model}, but the images come with {told}; choose {' or '.join(kinds)}")
    return config.model


def _text(found: Survey) -> tuple[int | None, int, list[str]]:
    """A vocabulary for the captions, how long they are in it, and how many that cuts; None where there are none."""
    if not found.captions or (found.classes is not None):
        return None, 16, []
    vocabulary = 512 if found.images < 2_000 else 4096 if found.images < 100_000 else 16_384
    with tempfile.TemporaryDirectory() as folder:
        lengths = sorted(map(len, train_bpe(found.captions, vocabulary, folder).encode_ragged(found.captions)))
    long = lengths[min(len(lengths) * 99 // 100, len(lengths) - 1)]
    words = min(max(-(-long // 8) * 8, 8), _LONGEST)
    share = sum(length > words for length in lengths) / len(lengths)
    return vocabulary, words, [f"captions of up to {lengths[-1]} tokens; a length of {words} cuts {share:.1%} of them"]


def _seen(found: Survey) -> list[str]:
    heights, widths = (sorted(size[axis] for size in found.sizes) for axis in (0, 1))
    middle = len(found.sizes) // 2
    lines = [f"{found.images} samples, of which {found.looked} were looked at"]
    sizes = [f"{widths[at]}x{heights[at]}" for at in (0, -1, middle)]
    lines.append(f"sizes {sizes[0]} to {sizes[1]}, in the middle {sizes[2]}")
    if found.captions:
        letters = sorted(map(len, found.captions))
        lines.append(
            f"captions for {found.captioned} of {len(found.sizes)}, of {letters[0]} to {letters[-1]} letters, in the "
            f"middle {letters[len(letters) // 2]}"
        )
    if found.classes is not None:
        lines.append(f"{len(found.classes)} classes: {', '.join(found.classes[:8])}")
    if found.unusable:
        lines.append("cannot be used: " + ", ".join(f"{count} {reason}" for reason, count in found.unusable.items()))
    return lines


def _sized(chosen: Choice, machine: Machine, hours: float) -> list[str]:
    model = f"{chosen.model['kind']} of {chosen.parameters / 1e6:.1f} million weights"
    memory = f"{chosen.need / 1e9:.1f} of {machine.memory / 1e9:.0f} GB of memory, as counted, not measured"
    lines = [
        f"images of {chosen.image_size} pixels; {model}, {memory}",
        f"{chosen.tokenizer_steps} steps for the image tokenizer and {chosen.steps} for the model: about "
        f"{chosen.hours:.1f} hours, estimated from {machine.flops / 1e9:.0f} GFLOP/s of products of matrices, on a "
        "machine that does nothing else: what others do on it comes on top",
    ]
    if chosen.hours > 1.2 * hours:
        lines.append(f"that is more than hours={hours:g}: fewer steps would learn nothing")
    return lines


def _recipe(
    config: InitConfig, found: Survey, chosen: Choice, run_dir: Path, vocabulary: int | None, seen: list[str]
) -> str:
    every = max(chosen.steps // 10, 50)
    sections: dict[str, dict[str, Any]] = {
        "shared": {"run_dir": str(run_dir), "data_dir": "${run_dir}/data", "seed": config.seed},
        "prepare": {"source": found.source} if found.source is not None else {},
        "train-tokenizer": {
            "tokenizer": chosen.tokenizer,
            "text": None if vocabulary is None else {"vocab_size": vocabulary},
            "optim": {"lr": 1e-3, "weight_decay": 0.0},
            "schedule": {"warmup_steps": 50, "final_ratio": 0.02},
            "loop": {"total_steps": chosen.tokenizer_steps, "log_every": 20},
            "checkpoint": {"every_steps": max(chosen.tokenizer_steps // 5, 50)},
            "batch_size": chosen.batch_size,
        },
        "train": {
            "model": chosen.model,
            "engine": {"dtype": "auto"},
            "optim": {"lr": chosen.lr, "betas": [0.9, 0.98], "weight_decay": 0.05},
            "schedule": {"warmup_steps": min(500, chosen.steps // 10), "final_ratio": 0.05},
            "loop": {"total_steps": chosen.steps, "log_every": 10},
            "checkpoint": {"every_steps": every, "keep_last": 2},
            "batch_size": chosen.batch_size,
        },
        "sample": {"prompts": _prompts(found), "num_images": 4},
        "evaluate": {"judge": False},
    }
    head = [f"# COMMAND   tokscale init {config.source} out={config.out} hours={config.hours:g}"]
    head += [f"# {line}" for line in seen]
    body = ["\n".join(_yaml(name, section)) for name, section in sections.items() if section]
    return "\n".join(head) + "\n\n" + "\n\n".join(body) + "\n"


def _yaml(name: str, value: Any, indent: str = "") -> list[str]:
    """A key and its value: on one line as JSON, which YAML reads, where that is short."""
    plain = json.dumps(value, ensure_ascii=False)
    texts = isinstance(value, list) and any(isinstance(item, str) for item in value)
    if (isinstance(value, dict) and indent == "") or (len(plain) > 90 and isinstance(value, dict)):
        return [f"{indent}{name}:", *(line for key in value for line in _yaml(key, value[key], indent + "  "))]
    if texts and len(plain) > 60:
        return [f"{indent}{name}:", *(f"{indent}  - {json.dumps(item, ensure_ascii=False)}" for item in value)]
    return [f"{indent}{name}: {plain}"]


def _prompts(found: Survey) -> list[str]:
    if found.classes is not None:
        return list(found.classes[:_PROMPTS])
    distinct = list(dict.fromkeys(caption for caption in found.captions if "${" not in caption))
    step = max(len(distinct) // _PROMPTS, 1)
    return distinct[::step][:_PROMPTS] or ["an image"]


def _link_tars(tars: Path, raw: Path) -> None:
    """Tars are read where they lie; the recipe's data folder only points there."""
    if raw.is_symlink() and raw.resolve() == tars.resolve():
        return
    if raw.exists() or raw.is_symlink():
        raise DataError(f"{raw}: is there already and is not {tars}; choose another run_dir")
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.symlink_to(tars.resolve(), target_is_directory=True)
    log.info("%s points to %s", raw, tars)
