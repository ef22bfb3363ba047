"""Entries of an original's checkpoint that are no weights are compared, carried over, or refused by name."""

import json

import numpy as np
import pytest
import torch
from test_stage_import import CASES, CLIP, CLIP_LISTING, REFERENCE, dalle_checkpoint, run, words

import tokscale
from tokscale.base.errors import ConfigError
from tokscale.models.parti.original import config_from_original, state_dict_from_original
from tokscale.nn.layout import TokenLayout
from tokscale.nn.rotary import rotary_angles

PARTI = np.load(REFERENCE / "parti_cases.npz")
TABLE = "transformer.pos_emb"


def stored_table(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The original's buffer for the case `full`, by its own expressions: 6 caption tokens and a start, 4x4 codes."""
    text, image, side, axis = 7, 16, 4, 16 // 3

    def turn(places: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        return torch.einsum("i,j->ij", places.float(), frequencies).repeat_interleave(2, dim=-1)

    words = 1.0 / (10000 ** (torch.arange(0, axis, 2)[: axis // 2].float() / axis))
    pixels = torch.linspace(1.0, 10.0 / 2, axis // 2) * torch.pi
    along_text = turn(torch.cat([torch.arange(text), torch.full((image,), 8192)]), words)
    line = turn(torch.linspace(-1, 1, side), pixels)
    rows, columns = line.repeat_interleave(side, 0), line.repeat(side, 1)
    outside = turn(torch.full((text,), -10.0), pixels)
    along_image = torch.cat([torch.cat([outside, outside], -1), torch.cat([rows, columns], -1)])
    return torch.cat([along_text, along_image], dim=-1)[None].to(dtype)


def imported(tmp_path, table, **changes):
    values = dalle_checkpoint("full")
    values["weights"] |= {TABLE: table} | changes
    result = run(tmp_path, values, text_tokenizer=words(tmp_path / "words", padded=True))
    return tokscale.load(result.outputs["export"])


def test_the_exact_rotary_table_changes_nothing(tmp_path):
    loaded = imported(tmp_path, stored_table())
    text, codes, wanted = (torch.from_numpy(CASES[f"full/{name}"]) for name in ("text", "codes", "logits"))
    assert loaded.config.rotary_dtype == "fp32"
    torch.testing.assert_close(loaded.model.logits(text, codes), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("kept_as", ["half", "float"])
def test_a_rotary_table_of_half_precision_is_carried_over(tmp_path, name, dtype, kept_as):
    table = stored_table(dtype)
    loaded = imported(tmp_path, table if kept_as == "half" else table.float())
    assert loaded.config.rotary_dtype == name
    ours = rotary_angles(TokenLayout(7, 4, 4), 16, name)
    torch.testing.assert_close(ours.repeat_interleave(2, dim=-1), table[0].float(), rtol=0, atol=0)
    text, codes, exact = (torch.from_numpy(CASES[f"full/{part}"]) for part in ("text", "codes", "logits"))
    found = loaded.model.logits(text, codes)
    assert (found - exact).abs().max() > 1e-3
    # The oracle: the model whose table is replaced by the stored one.
    net = imported(tmp_path / "again", stored_table())
    angles = table[0, :, ::2].float()
    angles = torch.nn.functional.pad(angles, (0, 8 - angles.shape[1]))
    turns = torch.stack([angles.cos(), angles.sin()], dim=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokscale.nn.stack.rotary_table", lambda *options: turns)
        torch.testing.assert_close(found, net.model.logits(text, codes), rtol=1e-6, atol=1e-6)


def test_a_rotary_table_of_other_values_is_refused_by_name(tmp_path):
    for wrong in (stored_table() * 1.001, stored_table()[:, :-1], stored_table(torch.float16) + 8):
        with pytest.raises(ConfigError, match=r"transformer\.pos_emb: the stored rotary table.*delete this entry"):
            imported(tmp_path, wrong)


def test_entries_that_nobody_reads_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"text_pos_emb\.weight: nothing here takes this entry"):
        imported(tmp_path, stored_table(), **{"text_pos_emb.weight": torch.zeros(7, 32)})
    rows, ids = torch.arange(22), torch.arange(20 + 6 + 24)
    mask = ((rows[:, None] >= 6) & (ids < 26)) | ((rows[:, None] < 6) & (ids >= 26))
    imported(tmp_path, stored_table(), logits_mask=mask[None])
    with pytest.raises(ConfigError, match="logits_mask: it forbids other ids"):
        imported(tmp_path, stored_table(), logits_mask=~mask[None])
    with pytest.raises(ConfigError, match=r"text_transformer\.pos_emb: nothing here takes this entry"):
        run(tmp_path, clip_state() | {"text_transformer.pos_emb": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"token_bias: nothing here takes this entry"):
        run(tmp_path, clip_state() | {"token_bias": torch.zeros(1)})


def clip_state() -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.asarray(CLIP[f"weight/{key}"], np.float32))
        for name, key in CLIP_LISTING["names"].items()
    }


def test_a_clip_of_grey_images_comes_in_once_its_channels_are_named(tmp_path):
    state = clip_state()
    colour = state["to_visual_embedding.weight"].unflatten(1, (-1, 3))
    grey = state | {"to_visual_embedding.weight": colour.sum(dim=-1)}
    count = CLIP_LISTING["hparams"]["num_text_tokens"]
    keys = {"text_tokenizer": words(tmp_path / "words", padded=True, count=count)}
    with pytest.raises(ConfigError, match=r"a patch of 64 values is no square of 3 channels.*hparams\.channels=1"):
        run(tmp_path, grey, **keys)
    loaded = tokscale.load(run(tmp_path, grey, hparams={"channels": 1}, **keys).outputs["export"])
    every = tokscale.load(run(tmp_path, state, out=tmp_path / "colour", **keys).outputs["export"])
    pixels = torch.from_numpy(CLIP["pixels"])[:, :1]
    expected = every.model.encode_image(pixels.expand(-1, 3, -1, -1))
    torch.testing.assert_close(loaded.model.encode_image(pixels), expected, rtol=1e-5, atol=1e-5)


def test_buffers_of_a_parti_are_compared():
    about = json.loads(str(PARTI["listing"]))["plain"]
    state = {
        name.removeprefix("plain/state/"): torch.from_numpy(PARTI[name].astype(np.float32))
        for name in PARTI.files
        if name.startswith("plain/state/")
    }
    config = config_from_original(about["hparams"], image_grid=(4, 4), num_image_tokens=about["num_image_tokens"])
    at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), dim=-1).flatten(0, 1)
    down, right = (at[:, None] - at + 3).unbind(-1)
    buffers = {"layers.0.0.rel_pos_bias.pos_indices": down * 7 + right, "layers.1.2.3.beta": torch.zeros(128)}
    assert state_dict_from_original(state | buffers, config).keys() == state_dict_from_original(state, config).keys()
    for name, value, why in (
        ("layers.0.0.rel_pos_bias.pos_indices", right * 7 + down, "other places than the original's of 4 rows"),
        ("layers.1.2.3.beta", torch.ones(128), "an offset that is not zero"),
        ("layers.0.0.q_scale", torch.ones(16), "nothing here takes this entry"),
    ):
        with pytest.raises(ConfigError, match=f"{name}: {why}"):
            state_dict_from_original(state | {name: value}, config)
