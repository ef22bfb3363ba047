"""Every model with every option, from the registry: an option that nobody gave a value fails `test_fake_models.py`.

A switch is flipped and a choice takes each of its words by itself. What else can be given is in `VALUES`; what only
says how large something is, in `SIZES`.
"""

import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin
from unittest import mock

import torch
from ledger import DEVICE

from tokscale.base.batch import (
    LABELS,
    LOWRES_CODES,
    SOFT_TARGETS,
    TEXT_EMBEDS,
    TEXT_EMBEDS_MASK,
    ImageBatch,
    TokenBatch,
)
from tokscale.base.config import Config, decode
from tokscale.base.errors import ConfigError
from tokscale.models.common import condition_of
from tokscale.models.registry import MODELS, model_class
from tokscale.nn.conditioning import CaptionConfig, ClassesConfig, EmbeddingsConfig

BATCH, WORDS, GRID, LEVELS = 2, 4, (2, 3), 2
_SMALL = {"dim": 32, "heads": 2, "dim_head": 16}
_IMAGE = {"image_grid": GRID, "num_text_tokens": 50}
_CAPTION = {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 16}

OURS = {kind: model for kind, model in MODELS.usable().items() if model.__module__.startswith("tokscale.")}
"""Not those that other packages bring."""
BASES: dict[str, dict[str, Any]] = {
    "dalle": _SMALL | _IMAGE | {"depth": 2, "text_seq_len": WORDS, "num_image_tokens": 64},
    "clip": {
        **{"dim_text": 32, "dim_image": 32, "dim_latent": 16, "dim_head": 16, "text_seq_len": WORDS},
        **{"text_enc_depth": 2, "visual_enc_depth": 2, "text_heads": 2, "visual_heads": 2},
        **{"visual_image_size": 16, "visual_patch_size": 4, "num_text_tokens": 50},
    },
    "maskgit": _SMALL | _IMAGE | {"depth": 2, "text_seq_len": WORDS, "num_tokens": 64, "condition": _CAPTION},
    "parti": _SMALL | _IMAGE | {"depth": 2, "max_text_len": WORDS, "num_image_tokens": 64, "condition": _CAPTION},
    "rqtransformer": _SMALL
    | _IMAGE
    | {"spatial_layers": 2, "depth_layers": 1, "max_spatial_seq_len": 6, "depth_seq_len": LEVELS, "num_tokens": 64}
    | {"condition": _CAPTION, "text_seq_len": WORDS},
    "hierarchical": _SMALL
    | {"depth": (2, 1, 1), "max_seq_len": (2, 3, LEVELS), "num_tokens": 64, "returned_shape": (*GRID, LEVELS)}
    | {"num_text_tokens": 50, "text_seq_len": WORDS},
}
"""A small model of each kind."""

DEEPER: dict[str, tuple[dict[str, Any], int]] = {
    "dalle": ({"depth": 4}, 2),
    "clip": ({"text_enc_depth": 4, "visual_enc_depth": 4}, 4),
    "maskgit": ({"depth": 4}, 2),
    "parti": ({"depth": 4}, 2),
    "rqtransformer": ({"spatial_layers": 4}, 2),
    "hierarchical": ({"depth": (4, 1, 1)}, 2),
}
"""What makes it deeper, and by how many layers."""

SIZES = frozenset(
    [
        "kind",
        "dim",
        "depth",
        "heads",
        "dim_head",
        "ff_mult",
        "text_seq_len",
        "max_text_len",
        "num_text_tokens",
        "num_image_tokens",
        "num_tokens",
        "image_grid",
        "dim_text",
        "dim_image",
        "dim_latent",
        "text_enc_depth",
        "visual_enc_depth",
        "text_heads",
        "visual_heads",
        "visual_image_size",
        "visual_patch_size",
        "spatial_layers",
        "depth_layers",
        "max_spatial_seq_len",
        "depth_seq_len",
        "max_seq_len",
        "returned_shape",
    ]
)

VALUES: dict[str, list[dict[str, Any]]] = {
    "attn_types": [
        {"attn_types": kind, "kernel_size": 3, "conv_window": window, "depth": 2, "rel_pos_bias": False}
        for kind, window in (
            ("axial_row", "centered"),
            ("axial_col", "centered"),
            ("conv_like", "centered"),
            ("conv_like", "corner"),
            ("sparse", "centered"),
            (("axial_row", "axial_col", "axial_row", "conv_like"), "corner"),
        )
    ],
    "attn_backend": [
        {"attn_backend": name, "attn_types": kind, "kernel_size": 3, "conv_window": "centered"}
        for name, kind in (
            *(("dense", "axial_col"), ("sdpa", "axial_col"), ("flex", "axial_col")),
            *(("fast", "axial_row"), ("natten", "conv_like")),
        )
    ],
    "attn_dropout": [{"attn_dropout": 0.1}, {"attn_dropout": 0.1, "reversible": True}],
    "channels": [{"channels": 1}],
    "cond_drop_prob": [{"cond_drop_prob": 0.9}, {"cond_drop_prob": 0.0}],
    "condition": [
        {"condition": {"kind": "embeddings", "width": 24}},
        {"condition": {"kind": "classes", "num_classes": 5}},
        {"condition": _CAPTION | {"remat": "block"}},
    ],
    "conv_window": [{"conv_window": "centered", "attn_types": "conv_like", "kernel_size": 3, "rel_pos_bias": False}],
    "critic_loss_weight": [{"critic_loss_weight": 0.5, "self_token_critic": True}],
    "dilation": [{"dilation": 2, "attn_types": "conv_like", "kernel_size": 3}],
    "dropout": [{"dropout": 0.1}],
    "ff_dropout": [{"ff_dropout": 0.1}, {"ff_dropout": 0.1, "remat": "block"}],
    "image_grids": [{"image_grids": (GRID, (3, 4)), "image_grid": (3, 4), "max_spatial_seq_len": 12}],
    "kernel_size": [{"kernel_size": 3, "attn_types": "conv_like", "rel_pos_bias": False}],
    "label_smoothing": [{"label_smoothing": 0.1}],
    "loss_img_weight": [{"loss_img_weight": 1.0}],
    "lowres": [
        {"lowres": {"image_grid": (1, 3), "layout": "cross"}},
        {"lowres": {"image_grid": (1, 3), "layout": "encoder", "depth": 1, "shared_emb": True}},
    ],
    "min_masking_rate": [{"min_masking_rate": 0.5}],
    "no_mask_token_prob": [{"no_mask_token_prob": 0.25}],
    "null_cond_prob": [{"null_cond_prob": 0.5}],
    "pad_id": [{"pad_id": -2}],
    "rel_pos_bias": [{"rel_pos_bias": False, "multi_query": False}],
    "rel_pos_index": [{"rel_pos_index": "sequence"}],
    "remat": [{"remat": "block"}, {"remat": "regions"}],
    "sample_temperature": [{"sample_temperature": 0.5, "self_token_critic": True}],
    "scale": [{"scale": 4.0}],
    "schedule_power": [{"noise_schedule": "pow", "schedule_power": 3.0}],
    "self_cond_prob": [{"self_cond": True, "self_cond_prob": 0.5}],
    "shared_attn_ids": [{"shared_attn_ids": (0,)}, {"shared_attn_ids": (0,), "reversible": True}],
    "shared_ff_ids": [{"shared_ff_ids": (0,)}, {"shared_ff_ids": (0,), "reversible": True}],
    "sparse": [
        {"attn_types": "sparse", "sparse": {"kind": kind, "block": 4}}
        for kind in ("variable", "fixed", "dense", "bigbird", "bslongformer", "local_sliding_window")
    ],
    "sparse_attn": [{"sparse_attn": True}],
    "temperature_init": [{"temperature_init": 1.0}],
    "temperature_max": [{"temperature_max": None}],
    "token_critic": [{"token_critic": _SMALL | {"depth": 1}}, {"token_critic": _SMALL | {"depth": 1, "scale": 4.0}}],
    "train_only_critic": [{"train_only_critic": True, "self_token_critic": True}],
    "train_only_generator": [{"train_only_generator": True, "self_token_critic": True}],
}

SAMPLING: dict[str, list[dict[str, Any]]] = {
    "choice_temperature": [{"choice_temperature": 4.5}],
    "cond_scale": [{"cond_scale": 1.0}, {"cond_scale": 3.0}],
    "cond_scale_interval": [{"cond_scale": 3.0, "cond_scale_interval": (0.25, 0.75)}],
    "cond_scale_power": [{"cond_scale": 3.0, "cond_scale_schedule": "power", "cond_scale_power": 3.0}],
    "cond_scale_schedule": [
        {"cond_scale": 3.0, "cond_scale_schedule": way} for way in ("constant", "linear", "cosine", "power")
    ],
    "cond_scale_start": [{"cond_scale": 3.0, "cond_scale_start": 1.0}],
    "critic_noise_scale": [{"critic_noise_scale": 0.0}],
    "edit_iterations": [],  # `edited` below
    "edit_rate": [],
    "filter_thres": [{"filter_thres": 0.0}],
    "negative_prompt": [],  # `told_against` below: a model reads ids
    "num_init_img_tokens": [],  # `primed` below
    "temperature": [{"temperature": 0.0}],
    "timesteps": [{"timesteps": 3}],
    "top_p": [{"top_p": 0.9}],
    "topk_filter_thres": [{"topk_filter_thres": 0.0}],
}

LEARNT_FOR: dict[str, dict[str, Any]] = {"can_remask_prev_masked": {"no_mask_token_prob": 0.25}}
"""What a model must have been trained with for a way of drawing; others refuse it."""

REFUSED = frozenset({"attn_backend=fast", "attn_backend=natten"})
"""Backends for other devices, or of a library that is not here: an error says so."""


class Case(NamedTuple):
    """A configuration, and what is said of it in a test's name."""

    kind: str
    name: str
    config: Config


def cases() -> Iterator[Case]:
    """Each kind as it is, and with each value of each option."""
    for kind, model in OURS.items():
        cls = model.config_class
        assert kind in BASES, f"model kind {kind!r} has no small model in BASES"
        yield Case(kind, "base", decode(cls, BASES[kind] | {"kind": kind}))
        for name, field in cls.model_fields.items():
            values = _values(cls, name, field)
            fitting = [value for value in values if _fits(cls, kind, value)]
            assert fitting or not values, f"no value of option {name!r} fits kind {kind!r}: add one to model_cases.py"
            for number, change in enumerate(fitting):
                changed = _changed(cls, kind, change)
                shown = change[name] if isinstance(change.get(name), str | bool | float) else number
                yield Case(kind, f"{name}={shown}", changed)


def sampling_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each kind's ways of drawing, one option at a time."""
    for kind, model in OURS.items():
        options: type[Config] | None = getattr(model, "sampling_config", None)
        if options is not None:
            for name, field in options.model_fields.items():
                found = SAMPLING[name] if name in SAMPLING else _automatic(name, field.annotation, field.default)
                yield from ((kind, change) for change in found)


def base(kind: str, **changes: Any) -> Config:
    """The small model of a kind, changed."""
    return decode(OURS[kind].config_class, BASES[kind] | {"kind": kind} | changes)


def _values(cls: type[Config], name: str, field: Any) -> list[dict[str, Any]]:
    if name in SIZES:
        return []
    return VALUES[name] if name in VALUES else _automatic(name, field.annotation, field.default)


def _automatic(name: str, annotation: Any, default: Any) -> list[dict[str, Any]]:
    if annotation is bool:
        return [{name: not default}]
    words = [word for word in _words(annotation) if word != default]
    assert words or get_origin(annotation) is Literal, f"option {name!r} has no value in model_cases.py: add one"
    return [{name: word} for word in words if isinstance(word, str)]


def _words(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif typing.get_args(annotation):
        for part in get_args(annotation):
            yield from _words(part)


def _changed(cls: type[Config], kind: str, change: Mapping[str, Any]) -> Config:
    """The small model with what it knows of a change; `depth` is left to who counts stages."""
    known = {name: value for name, value in change.items() if name in cls.model_fields}
    if kind == "hierarchical":
        known.pop("depth", None)
    return decode(cls, BASES[kind] | {"kind": kind} | known)


def _fits(cls: type[Config], kind: str, change: Mapping[str, Any]) -> bool:
    """Whether a kind takes it: values are shared by kinds that differ in what they know."""
    try:
        _changed(cls, kind, change)
    except ConfigError:
        return False
    return True


def tokens(config: Config) -> TokenBatch | ImageBatch:
    """A batch on the device, as the loader delivers it."""
    positions = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
    text = torch.zeros(BATCH, WORDS, dtype=torch.int64, device=DEVICE)
    if model_class(config).reads == "images":
        channels = getattr(config, "channels", 3)
        pixels = torch.zeros(BATCH, channels, 16, 16, dtype=torch.uint8, device=DEVICE)
        return ImageBatch(positions=positions, pixels=pixels, text=text, text_mask=text == 0)
    shape = (*GRID, LEVELS) if model_class(config).reads_soft_codes else GRID
    codes = torch.zeros(BATCH, *shape, dtype=torch.int64, device=DEVICE)
    return TokenBatch(positions=positions, text=text, text_mask=text == 0, codes=codes, extra=told(config))


def told(config: Config) -> dict[str, torch.Tensor]:
    """What a batch says beside captions and codes."""
    extra: dict[str, torch.Tensor] = {}
    match condition_of(config):
        case EmbeddingsConfig(width=width):
            extra[TEXT_EMBEDS] = torch.zeros(BATCH, WORDS, width or 0, device=DEVICE, dtype=torch.bfloat16)
            extra[TEXT_EMBEDS_MASK] = torch.ones(BATCH, WORDS, device=DEVICE, dtype=torch.bool)
        case ClassesConfig():
            extra[LABELS] = torch.zeros(BATCH, device=DEVICE, dtype=torch.int64)
        case CaptionConfig():
            pass
    lowres = getattr(config, "lowres", None)
    if lowres is not None:
        extra[LOWRES_CODES] = torch.zeros(BATCH, *lowres.image_grid, dtype=torch.int64, device=DEVICE)
    return extra


def soft(config: Config) -> dict[str, torch.Tensor]:
    """Distributions of codes as targets."""
    if not model_class(config).reads_soft_codes:
        return {}
    return {SOFT_TARGETS: torch.zeros(BATCH, *GRID, LEVELS, 64, device=DEVICE)}


def draw(model: Any, config: Config, options: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """Every way of drawing that a model offers: from what it is told, on from a beginning, and as a change."""
    batch = tokens(config)
    if isinstance(batch, ImageBatch):
        assert batch.text is not None and batch.text_mask is not None
        yield "score", model.score(batch.text, batch.text_mask, batch.pixels)
        return
    how = {"timesteps": 2} | dict(options or {})
    fields = model.sampling_config.model_fields
    sampling = decode(model.sampling_config, {name: value for name, value in how.items() if name in fields})
    common = {"options": sampling, "seeds": list(range(BATCH)), "extra": batch.extra}
    given = set(inspect.signature(model.generate_codes).parameters) - {"text", "text_mask", "grid", "progress", *common}
    yield "sample", model.generate_codes(batch.text, batch.text_mask, **common)
    begun = batch.codes.flatten(1)[:, :3]
    ways: dict[frozenset[str], list[tuple[str, dict[str, Any]]]] = {
        frozenset({"img"}): [("prime", {"img": batch.codes})],
        frozenset({"prime"}): [("prime", {"prime": begun})],
        frozenset({"codes", "redraw"}): [
            ("edit", {"codes": batch.codes, "redraw": batch.codes == 0}),
            ("edit freely", {"codes": batch.codes, "options": sampling.model_copy(update={"edit_iterations": 2})}),
            ("negative", {"extra": {**batch.extra, **_against(batch)}}),
        ],
        frozenset(): [],
    }
    assert frozenset(given) in ways, f"{type(model).__name__}.generate_codes takes {sorted(given)}: give it a way here"
    for name, more in ways[frozenset(given)]:
        yield name, model.generate_codes(batch.text, batch.text_mask, **(common | more))
    if hasattr(model, "generate_texts"):
        yield "caption", write(model, sampling)


def write(model: Any, options: Config) -> torch.Tensor:
    """Captions that a model writes by itself, as ids."""
    words, begun = mock.Mock(), torch.ones(BATCH, WORDS, dtype=torch.int64, device="cpu")
    words.encode.return_value = (begun, begun == 1)
    ids: torch.Tensor = model.generate_texts(words, ["a"] * BATCH, options=options, seeds=list(range(BATCH)))[0]
    return ids


def _against(batch: TokenBatch) -> dict[str, torch.Tensor]:
    entries = {"text": batch.text, "text_mask": batch.text_mask, **batch.extra}
    return {f"negative.{name}": value for name, value in entries.items() if name != LOWRES_CODES}
