"""Incremental decoding against one full pass: every kind, any split, with everything that has a memory."""

import pytest
import torch
from torch import nn

from tokscale.base import rng
from tokscale.base.errors import ConfigError
from tokscale.nn.attention import pattern as attention
from tokscale.nn.attention.decode import KeyValueCache
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.reference import dense_attention
from tokscale.nn.attention.retention import Retention
from tokscale.nn.attention.sparsity import VariableLayout
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.stack import Stack

LAYOUT = TokenLayout(6, 5, 7)
BASE = {"dim": 32, "depth": 3, "heads": 2, "dim_head": 16, "kernel_size": 3, "sparse": VariableLayout(block=4)}
VARIANTS = {"conv_like": {"dilated": {"dilation": 2}, "centered": {"conv_window": "centered"}}}
KINDS = {name: {"attn_types": name} for name in attention.KINDS}
KINDS |= {f"{name}-{key}": {"attn_types": name} | more for name in VARIANTS for key, more in VARIANTS[name].items()}
KINDS["mixed"] = {"attn_types": list(attention.KINDS), "depth": len(attention.KINDS)}
SPLITS = {
    "one by one": [1] * LAYOUT.seq,
    "text, then one by one": [6] + [1] * 35,
    "primed with a row and a half": [6, 11] + [1] * 24,
    "prefix and prime together": [17] + [1] * 24,
    "in the middle of the text": [3, 3] + [1] * 35,
    "across the border": [4, 5] + [1] * 4 + [13, 1, 9, 5],
    "two": [20, 21],
}


def stack(layout: TokenLayout = LAYOUT, **options) -> Stack:
    with rng.scope(0, "weights"):
        built = Stack(StackConfig.model_validate(BASE | options), layout).eval()
        for name, parameter in built.named_parameters():
            if name.endswith("scale.scale"):
                nn.init.normal_(parameter, 1.0, 0.3)
    return built


def tokens(batch: int = 2, layout: TokenLayout = LAYOUT, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, layout.seq, 32, generator=torch.Generator().manual_seed(seed))


def decoded(model: Stack, x: torch.Tensor, split: list[int], key_mask: torch.Tensor | None = None) -> torch.Tensor:
    cache = model.new_cache(len(x), device="cpu", dtype=x.dtype)
    outputs = []
    for new in split:
        start, stop = cache.offset, cache.offset + new
        mask = None if key_mask is None else key_mask[:, :stop]
        outputs.append(model(x[:, start:stop], key_mask=mask, cache=cache))
        assert outputs[-1].shape[1] == new and cache.offset == stop
    return torch.cat(outputs, dim=1)


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_full_pass(kind: str, split: str):
    assert sum(SPLITS[split]) == LAYOUT.seq
    model, x = stack(**KINDS[kind]), tokens()
    with torch.no_grad():
        assert gap(decoded(model, x, SPLITS[split]), model(x)) < 1e-6


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "options",
    [
        {"shift_tokens": True},
        {"shared_attn_ids": [0], "shared_ff_ids": [0, 1, 0]},
        {"reversible": True, "shift_tokens": True},
        {"sandwich_norm": True, "stable": True, "attn_backend": "dense"},
        {"rotary_emb": False, "shift_tokens": True, "optimize_for_inference": True},
    ],
    ids=lambda options: "+".join(options),
)
def test_what_remembers_is_exact_after_any_priming(options, split):
    model, x = stack(**options), tokens()
    with torch.no_grad():
        assert gap(decoded(model, x, SPLITS[split]), model(x)) < 1e-6


@pytest.mark.parametrize("kind", ["mixed", "full"])
def test_padded_keys_stay_unseen(kind):
    model, x = stack(**KINDS[kind], shift_tokens=True), tokens()
    key_mask = torch.rand(2, LAYOUT.seq, generator=torch.Generator().manual_seed(2)) > 0.2
    key_mask[:, 0] = True
    with torch.no_grad():
        expected = model(x, key_mask=key_mask)
        assert gap(expected, model(x)) > 1e-2
        assert gap(decoded(model, x, SPLITS["primed with a row and a half"], key_mask), expected) < 1e-6


def test_guidance_decodes_both_branches_in_one_batch():
    """D05, D06: each branch has its own rows of one cache; neither the keys nor the shift's memory are shared."""
    model = stack(**KINDS["mixed"], shift_tokens=True)
    image = tokens(2, seed=1)
    conditional, null = tokens(2, seed=2), tokens(2, seed=3)
    conditional[:, 6:] = null[:, 6:] = image[:, 6:]
    both = torch.cat([conditional, null])
    with torch.no_grad():
        found = decoded(model, both, SPLITS["text, then one by one"])
        assert gap(found[:2], model(conditional)) < 1e-6
        assert gap(found[2:], model(null)) < 1e-6
        assert gap(found[:2], found[2:]) > 1e-2


@pytest.mark.parametrize("layout", [TokenLayout(0, 4, 6), TokenLayout(9)], ids=["image", "text"])
def test_layouts_of_one_part(layout):
    kinds = [name for name, kind in attention.KINDS.items() if layout.image or not kind.needs_grid]
    model, x = stack(layout, attn_types=kinds, depth=len(kinds), shift_tokens=True), tokens(layout=layout)
    with torch.no_grad():
        assert gap(decoded(model, x, [2, 1, 3] + [1] * (layout.seq - 6)), model(x)) < 1e-6


def test_bfloat16_caches():
    model, x = stack(**KINDS["mixed"]).bfloat16(), tokens().bfloat16()
    with torch.no_grad():
        assert gap(decoded(model, x, SPLITS["text, then one by one"]), model(x)) < 2e-2


def test_the_result_carries_no_gradient():
    model, x = stack(), tokens()
    assert not decoded(model, x, [20, 21]).requires_grad


RETAINED = [{"kind": name} for name, kind in attention.KINDS.items() if name != "conv_like"]
RETAINED += [
    {"kind": "conv_like", "kernel_size": 3},
    {"kind": "conv_like", "kernel_size": 3, "dilation": 2},
    {"kind": "conv_like", "kernel_size": 5, "conv_window": "centered"},
]


@pytest.mark.parametrize("options", RETAINED, ids=str)
def test_what_is_kept_is_what_the_mask_shows(options):
    """Every key that a query may see is still in its slot when the query comes, and its window holds no other."""
    pattern = AttentionPattern(layout=LAYOUT, **options)
    retention = pattern.parts.retention(pattern)
    windows = retention.step_keys(torch.zeros(1, 1, 1, 1)) is None  # else steps do not read windows
    holds: dict[int, int] = {}
    for query in range(LAYOUT.image):
        holds[int(retention.slot(torch.tensor([query])))] = query
        assert len(holds) <= retention.slots
        seen = pattern.dense(LAYOUT.seq, "cpu")[0, LAYOUT.text + query, LAYOUT.text :].nonzero().flatten().tolist()
        if windows:
            window = retention.window(query, torch.device("cpu"))
            slots = range(window.start, window.stop) if isinstance(window, slice) else window.tolist()
            assert sorted(holds[slot] for slot in slots) == seen
        assert {position for position in holds.values()} >= set(seen)
        assert not seen or seen[0] >= retention.first_kept(query)


@pytest.mark.parametrize("options", RETAINED, ids=str)
def test_a_position_that_only_the_device_knows_finds_its_keys_by_a_mask_over_all_slots(options):
    pattern = AttentionPattern(layout=LAYOUT, **options)
    retention, sees = pattern.parts.retention(pattern), pattern.mask_mod("cpu")
    head = torch.zeros((), dtype=torch.long)
    for query in range(LAYOUT.image):
        held = retention.held(torch.tensor(query))
        assert held.shape == (retention.slots,)
        shown = sees(head, head, torch.tensor(query + LAYOUT.text), held.clamp(min=0) + LAYOUT.text) & (held >= 0)
        seen = pattern.dense(LAYOUT.seq, "cpu")[0, LAYOUT.text + query, LAYOUT.text :].nonzero().flatten()
        assert sorted(held[shown].tolist()) == seen.tolist()
        assert torch.equal(retention.slot(held[shown]), shown.nonzero().flatten())


def retention(kind: str, layout: TokenLayout) -> Retention:
    pattern = AttentionPattern(kind, layout)
    return pattern.parts.retention(pattern)


def test_memory_and_keys_read_do_not_grow_with_the_image_for_line_and_window_kinds():
    def slots(kind: str, height: int) -> int:
        return retention(kind, TokenLayout(6, height, 7)).slots

    for kind in ("axial_row", "conv_like"):
        assert slots(kind, 8) == slots(kind, 80)
    assert slots("full", 80) == slots("axial_col", 80) == 10 * slots("full", 8)
    tall = retention("axial_col", TokenLayout(6, 8, 700))
    last = tall.window(8 * 700 - 1, torch.device("cpu"))
    assert isinstance(last, slice) and last.stop - last.start == 8


def test_shapes_are_static():
    model, x = stack(**KINDS["mixed"], shift_tokens=True), tokens()
    cache = model.new_cache(2, device="cpu", dtype=torch.float32)
    before = cache.nbytes()
    addresses = [layer.keys.data_ptr() for layer in cache.attn]
    for new in SPLITS["across the border"]:
        model(x[:, cache.offset : cache.offset + new], cache=cache)
    assert cache.nbytes() == before
    assert [layer.keys.data_ptr() for layer in cache.attn] == addresses


def test_misuse_is_explained():
    model, x = stack(), tokens()
    cache = model.new_cache(2, device="cpu", dtype=torch.float32)
    with pytest.raises(ConfigError, match="made for a batch of 2, got 1"):
        model(x[:1], cache=cache)
    model(x, cache=cache)
    with pytest.raises(ConfigError, match="42 positions does not fit the layout of 41"):
        model(x[:, :1], cache=cache)
    with pytest.raises(ConfigError, match="bidirectional stack cannot decode"):
        Stack(StackConfig(dim=32, depth=1), LAYOUT, causal=False).new_cache(1, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("per_head", [False, True])
def test_sparse_steps_never_read_what_was_overwritten(per_head):
    """A row of blocks keeps a copy of what it sees; whatever else writes to the cache must not leave it stale."""
    sparse = VariableLayout(block=4, num_random_blocks=2, different_layout_per_head=per_head)
    pattern = AttentionPattern("sparse", TokenLayout(6, 5, 5), heads=3, sparse=sparse)
    drawn = rng.generator(0, "test", "sparse steps")
    q, k, v = (torch.randn(2, 3, 31, 8, generator=drawn, dtype=torch.float64) for _ in range(3))
    cache = KeyValueCache(pattern, 2, 8, device=torch.device("cpu"), dtype=torch.float64)
    keys, values = k.clone(), v.clone()

    def goes_on(at: int, new: int, mask: torch.Tensor | None = None) -> None:
        stop = at + new
        out = cache.extend(q[:, :, at:stop], keys[:, :, at:stop], values[:, :, at:stop], at, mask)
        expected = dense_attention(q[:, :, :stop], keys[:, :, :stop], values[:, :, :stop], pattern)
        torch.testing.assert_close(out, expected[:, :, at:stop], atol=1e-12, rtol=0)

    cache.append(keys[:, :, :3], values[:, :, :3], 0)
    for at in range(3, 14):
        goes_on(at, 1)
    goes_on(14, 1, torch.ones(2, 15, dtype=torch.bool))  # one position on the way of several
    for at in range(15, 18):
        goes_on(at, 1)
    goes_on(18, 3)
    goes_on(21, 1)
    keys[:, :, 8:], values[:, :, 8:] = -k[:, :, 8:], -v[:, :, 8:]
    cache.append(keys[:, :, 8:20], values[:, :, 8:20], 8)  # another continuation of the same beginning
    for at in range(20, 31):
        goes_on(at, 1)
