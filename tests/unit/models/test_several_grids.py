"""A model of several grids is, on each of them, the model of that grid alone: with the tables' rows for its places."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import decode, encode
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.protocols import RegionCompiler, using
from tokscale.models.grids import MOST_GRIDS
from tokscale.models.registry import ModelConfig, build_model

WORDS, TEXT, CODES, LEVELS = 11, 5, 13, 2
GRIDS = ((3, 3), (2, 5), (4, 2))
MOST = (4, 5)
SMALL = {"dim": 16, "heads": 2, "dim_head": 8}
SIZES = {"num_text_tokens": WORDS, "text_seq_len": TEXT}
CAPTION = {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}
CRITIC = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
DALLE = SMALL | SIZES | {"kind": "dalle", "depth": 2, "num_image_tokens": CODES}
MASKGIT = SMALL | SIZES | {"kind": "maskgit", "depth": 2, "num_tokens": CODES, "condition": CAPTION}
PARTI = SMALL | {"kind": "parti", "depth": 2, "num_image_tokens": CODES, "condition": CAPTION}
PARTI |= {"num_text_tokens": WORDS, "max_text_len": TEXT}
RQ = SMALL | SIZES | {"kind": "rqtransformer", "num_tokens": CODES, "spatial_layers": 2, "depth_layers": 1}
RQ |= {"depth_seq_len": LEVELS, "condition": CAPTION}
KINDS = {"attn_types": ("axial_row", "axial_col", "conv_like", "sparse"), "kernel_size": 3, "depth": 4}
CASES = {
    "dalle": DALLE,
    "dalle, learned positions": DALLE | {"rotary_emb": False},
    "dalle, kinds": DALLE | KINDS | {"remat": "regions"},
    "dalle, reversible": DALLE | {"reversible": True, "attn_types": ("axial_col",)},
    "dalle, remat": DALLE | {"remat": "block", "rotary_emb": False, "share_input_output_emb": True},
    "maskgit": MASKGIT,
    "maskgit, self_cond": MASKGIT | {"self_cond": True, "self_token_critic": True},
    "maskgit, critic": MASKGIT | {"token_critic": CRITIC},
    "parti": PARTI,
    "parti, sequence": PARTI | {"rel_pos_index": "sequence", "remat": "block"},
    "parti, paper": PARTI | {"rel_pos_bias": False, "multi_query": False, "attn_types": "conv_like", "kernel_size": 3},
    "rq": RQ,
    "rq, rotary": RQ | {"rotary_emb": True, "shift_tokens": True, "attn_types": "axial_row"},
}


def make(values: Mapping[str, Any]) -> Any:
    config = decode(ModelConfig, dict(values))
    with rng.scope(0, "model"):
        return build_model(config)


def several(values: Mapping[str, Any], *grids: tuple[int, int]) -> Any:
    one = {"image_grid": GRIDS[0]} | ({"max_spatial_seq_len": 9} if values["kind"] == "rqtransformer" else {})
    return make(encode(decode(ModelConfig, dict(values) | one).with_grids(grids or GRIDS)))


def alone(model: Any, values: Mapping[str, Any], grid: tuple[int, int]) -> Any:
    """The model of one grid with the weights of that of several."""
    height, width = grid
    size = {"max_spatial_seq_len": height * width} if values["kind"] == "rqtransformer" else {}
    own = make(dict(values) | {"image_grid": grid} | size)
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith("positions.rows"):
            state[name] = weight[:height]
        elif name.endswith("positions.cols"):
            state[name] = weight[:width]
        elif name.endswith(("pos_emb.weight", "stages.0.positions.weight")):
            state[name] = weight.view(*MOST, -1)[:height, :width].flatten(0, 1)
        elif name.endswith("bias.table"):
            whole = weight[:-1].view(2 * MOST[0] - 1, 2 * MOST[1] - 1, -1)
            down = slice(MOST[0] - height, MOST[0] + height - 1)
            right = slice(MOST[1] - width, MOST[1] + width - 1)
            state[name] = torch.cat([whole[down, right].flatten(0, 1), weight[-1:]])
    own.load_state_dict(state)
    return own


def make_batch(grid: tuple[int, int], values: Mapping[str, Any], size: int = 3) -> TokenBatch:
    stream = rng.generator(0, "batch", *grid)
    text = torch.randint(1, WORDS, (size, TEXT), generator=stream)
    text[0, 2:] = 0
    shape = (*grid, LEVELS) if values["kind"] == "rqtransformer" else grid
    codes = torch.randint(0, CODES, (size, *shape), generator=stream)
    return TokenBatch(torch.arange(size), text, text != 0, codes)


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_a_model_of_that_grid_alone(values):
    model = several(values).train()
    for grid in GRIDS:
        own, batch = alone(model, values, grid).train(), make_batch(grid, values)
        assert model(batch).total.item() == pytest.approx(own(batch).total.item(), rel=1e-6)
        model.zero_grad()
        model(batch).total.backward()
        own(batch).total.backward()
        mine = dict(model.named_parameters())
        for name, parameter in own.named_parameters():
            given, wanted = mine[name].grad, parameter.grad
            if given is None or wanted is None:
                assert given is wanted, name
                continue
            # What the grid does not reach has no gradient: sums over a table's rows are those of the small one.
            torch.testing.assert_close(given.norm(), wanted.norm(), rtol=1e-4, atol=1e-7, msg=f"{grid}: {name}")


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_drawing_each_grid_is_drawing_with_a_model_of_it_alone(values):
    model = several(values).eval()
    options = model.sampling_config(cond_scale=2.0)
    for grid in GRIDS:
        batch, own = make_batch(grid, values), alone(model, values, grid).eval()
        asked = {"options": options, "seeds": range(3)}
        drawn = model.generate_codes(batch.text, batch.text_mask, grid=grid, **asked)
        assert drawn.shape == batch.codes.shape
        assert torch.equal(drawn, own.generate_codes(batch.text, batch.text_mask, **asked))
    first = model.generate_codes(batch.text, batch.text_mask, **asked)
    assert first.shape[1:3] == GRIDS[0]


CACHED = {name: values for name, values in CASES.items() if values["kind"] != "maskgit"}


@pytest.mark.parametrize("values", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize("grid", GRIDS)
def test_drawing_with_a_cache_is_drawing_anew_from_all_codes_so_far(values, grid):
    model, batch = several(values).eval(), make_batch(grid, values)
    greedy = model.sampling_config(temperature=0, cond_scale=1)
    drawn = model.generate_codes(batch.text, batch.text_mask, options=greedy, seeds=range(3), grid=grid).flatten(1)
    with torch.no_grad():
        if values["kind"] == "dalle":
            logits = model.logits(batch.text, drawn, grid)[:, TEXT:, WORDS + TEXT :]
        elif values["kind"] == "parti":
            context = model.encode_condition(batch.text, batch.text_mask, {})
            logits = model.logits(drawn[:, :-1], context, grid)
        else:
            logits = model.logits(drawn, model.context(batch.text, batch.text_mask), grid)
    assert torch.equal(logits.argmax(-1), drawn)


class Counting(RegionCompiler):
    """Compiles nothing; remembers what it would have compiled."""

    def __init__(self) -> None:
        self.asked: set[Any] = set()

    def compiled(self, function: Any, options: Mapping[str, Any]) -> None:
        self.asked.add((function, *sorted(options.items())))


def test_what_is_compiled_is_one_region_for_each_grid_however_often_they_come():
    model, looking = several(DALLE | KINDS).train(), Counting()
    with using(looking):
        for grid in GRIDS:
            model(make_batch(grid, DALLE)).total.backward()
        once = len(looking.asked)
        for grid in GRIDS * 2:
            model(make_batch(grid, DALLE)).total.backward()
    assert len(looking.asked) == once
    layouts = {dict(options)["layout"] for _, *options in looking.asked if "layout" in dict(options)}
    assert {(layout.grid_h, layout.grid_w) for layout in layouts} == set(GRIDS)


@pytest.mark.parametrize("values", [DALLE, MASKGIT, PARTI, RQ], ids=lambda values: values["kind"])
def test_a_grid_that_the_model_does_not_know_is_refused(values):
    model, batch = several(values), make_batch((4, 5), values)
    with pytest.raises(DataError, match=r"codes of shape \(4, 5.*image_grids=\[\(3, 3\), \(2, 5\), \(4, 2\)\]"):
        model(batch)
    options, seeds = model.sampling_config(), range(3)
    with pytest.raises(ConfigError, match=r"a grid of \(4, 5\) codes: this model draws \(3, 3\), \(2, 5\), \(4, 2\)"):
        model.generate_codes(batch.text, batch.text_mask, options=options, seeds=seeds, grid=(4, 5))


def test_a_model_of_one_grid_is_described_as_ever():
    config = decode(ModelConfig, DALLE | {"image_grid": (3, 3)})
    assert "image_grids" not in encode(config) and config.grids == ((3, 3),)
    more = config.with_grids(GRIDS)
    assert decode(ModelConfig, encode(more)) == more and more.image_grid == MOST


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"image_grids": [(3, 3), (2, 5)]},
            r"image_grids: .* go with image_grid=\(3, 5\), their most rows and columns",
        ),
        ({"image_grids": [(3, 3)], "image_grid": (3, 3)}, "image_grid alone for one"),
        ({"image_grids": [(3, 3)] * 2, "image_grid": (3, 3)}, f"give 2 to {MOST_GRIDS} different ones"),
        ({"image_grids": [(1, n) for n in range(1, 18)], "image_grid": (1, 17)}, f"give 2 to {MOST_GRIDS} different"),
    ],
)
def test_grids_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        decode(ModelConfig, DALLE | changes)


def test_a_model_that_reads_one_grid_says_which_key_picks_one():
    hierarchy = SMALL | {"kind": "hierarchical", "depth": [1, 1], "max_seq_len": [9, 2], "num_tokens": CODES}
    with pytest.raises(
        ConfigError, match=r"model\.kind=hierarchical trains on one shape .*codes of 3 x 3, .*buckets: \["
    ):
        decode(ModelConfig, hierarchy).with_grids(GRIDS)
    lowres = MASKGIT | {"lowres": {"image_grid": (2, 2)}, "image_grid": (3, 3)}
    with pytest.raises(ConfigError, match=r"model\.lowres: .*one shape of images; read one bucket"):
        decode(ModelConfig, lowres).with_grids(GRIDS)
