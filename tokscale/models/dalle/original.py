"""DALL-E checkpoints of dalle-pytorch (written by 1.6.6; older ones where their options still exist)."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, repeat

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Shaped, Tensor
from tokscale.models.dalle.config import DALLEConfig
from tokscale.models.original import State, refuse_others, stack_from_original, take
from tokscale.nn.layout import TokenLayout
from tokscale.nn.rotary import DTYPES, rotary_angles

ORIGINAL_DEFAULTS = {"num_text_tokens": 10000, "text_seq_len": 256, "shift_tokens": True, "rotary_emb": True}
"""What the original takes for options that its checkpoints leave out, where ours differ or have none."""
_NEVER = -1e4
"""A logit without probability that half precision holds, too."""
ROTARY_TABLE = "transformer.pos_emb"
"""The one buffer that the original saves."""
_LOGITS_MASK = "logits_mask"
"""Which ids may stand where; versions before 1.6 saved it."""


def config_from_original(
    hparams: Mapping[str, Any], *, num_image_tokens: int, image_grid: tuple[int, int]
) -> DALLEConfig:
    """Options from a checkpoint's `hparams`; the image's sizes come from its image tokenizer.

    Raises:
        ConfigError: Naming every option that cannot be carried over.
    """
    values = {key: value for key, value in hparams.items() if key != "vae" and value is not None}
    config = decode(
        DALLEConfig,
        ORIGINAL_DEFAULTS | values | {"num_image_tokens": num_image_tokens, "image_grid": image_grid},
        where="hparams",
    )
    if "sparse" in config.layer_types():
        raise ConfigError(
            "hparams.attn_types: 'sparse' drew its blocks at random and did not store them in the checkpoint, so a "
            "model with it cannot be carried over"
        )
    return config


def state_dict_from_original(state: Mapping[str, Shaped[Tensor, "..."]], config: DALLEConfig) -> State:
    """Weights of a `DALLE` from those of the original; its image tokenizer, under `vae.`, is left out.

    Raises:
        ConfigError: For an entry that is missing, or has no place here.
    """
    words, _, (rows, cols) = config.sizes
    vocab = words + config.text_seq_len
    tables = () if config.rotary_emb else ("text_pos_emb.", "image_pos_emb.")
    refuse_others(state, [_LOGITS_MASK], ("vae.", "transformer.", "to_logits.", "text_emb.", "image_emb.", *tables))
    if _LOGITS_MASK in state:
        _check_logits_mask(state[_LOGITS_MASK], config.text_seq_len, vocab)
    weight, bias = take(state, "to_logits.1.weight"), take(state, "to_logits.1.bias")
    found = stack_from_original(state, config, source="transformer.", target="stack.") | {
        "norm.weight": take(state, "to_logits.0.weight"),
        "norm.bias": take(state, "to_logits.0.bias"),
        "text_head.weight": weight[:vocab],
        "text_head.bias": bias[:vocab],
        "image_head.weight": weight[vocab:],
        "image_head.bias": bias[vocab:],
    }
    if not config.share_input_output_emb:
        found["text_emb.weight"] = take(state, "text_emb.weight")
        found["image_emb.weight"] = take(state, "image_emb.weight")
    if not config.rotary_emb:
        row_table = take(state, "image_pos_emb.weights.0", "image_pos_emb.weights_0")
        col_table = take(state, "image_pos_emb.weights.1", "image_pos_emb.weights_1")
        found["positions.text"] = take(state, "text_pos_emb.weight")
        found["positions.rows"] = rearrange(row_table, "1 rows 1 dim -> rows dim", rows=rows)
        found["positions.cols"] = rearrange(col_table, "1 1 cols dim -> cols dim", cols=cols)
    return found


def _check_logits_mask(mask: Shaped[Tensor, "..."], text: int, vocab: int) -> None:
    rows, ids = (torch.arange(size) for size in mask.shape[-2:])
    if not torch.equal(mask[0].bool(), (rows[:, None] >= text) != (ids >= vocab)):
        raise ConfigError(
            f"{_LOGITS_MASK}: it forbids other ids than those of the other kind; it cannot be carried over"
        )


def with_rotary_table(state: Mapping[str, Shaped[Tensor, "..."]], config: DALLEConfig) -> DALLEConfig:
    """Options under which our rotary table is the one that the weights were trained with.

    The original keeps its table as a buffer: `--fp16` rounds it, trains with the rounded one and saves it.

    Raises:
        ConfigError: When the stored table is none of the precisions of `rotary_dtype`.
    """
    stored = state.get(ROTARY_TABLE)
    if stored is None:
        return config
    if not config.rotary_emb:
        raise ConfigError(
            f"{ROTARY_TABLE}: the checkpoint has a rotary table, its hparams say rotary_emb=false; "
            "give hparams.rotary_emb=true"
        )
    rows, cols = config.sizes[2]
    layout, table = TokenLayout(config.text_seq_len + 1, rows, cols), stored.float().flatten(0, -2)
    for name, dtype in DTYPES.items():
        ours = repeat(rotary_angles(layout, config.dim_head, name), "seq pairs -> seq (pairs two)", two=2)
        # One step of the precision: fp32 results of different processors may lie on both sides of a boundary.
        near = 8 if name == "fp32" else 1
        rtol = near * torch.finfo(dtype).eps
        if ours.shape != table.shape or not torch.equal(table.to(dtype).float(), table):
            continue
        if torch.allclose(table, ours, rtol=rtol, atol=1e-6):
            return config.model_copy(update={"rotary_dtype": name})
    raise ConfigError(
        f"{ROTARY_TABLE}: the stored rotary table, {tuple(stored.shape)} of {stored.dtype}, is not the original's for "
        f"these sizes in any of {', '.join(DTYPES)}, so the weights were trained as another function. Check hparams; "
        "to take the exact table all the same, delete this entry from the checkpoint"
    )


def with_padding_id(state: Mapping[str, Shaped[Tensor, "..."]], config: DALLEConfig) -> tuple[State, DALLEConfig]:
    """Weights and options for a text tokenizer whose ids are all one higher, since its id 0 is padding alone.

    The original has no id for padding: 0 is the tables' first token, padding and the start token at once (D17). Here
    the start token keeps row 0, and the first token gets a copy of it.
    """
    words = config.sizes[0]
    moved = dict(state)
    for name in ("text_emb.weight", "text_head.weight", "text_head.bias"):
        if name in moved:
            moved[name] = torch.cat([moved[name][:1], moved[name]])
    # Row 0 stands for nothing that could follow: it must not share the first token's probability.
    moved["text_head.bias"][0] = _NEVER
    return moved, config.model_copy(update={"num_text_tokens": words + 1})
