"""The trained quantizers against loops that are easy to believe, and against vector-quantize-pytorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from vector_quantize_pytorch import FSQ, LFQ, VectorQuantize

from tokscale.base.config import decode, encode
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import Collectives, using
from tokscale.base.rng import generator, scope
from tokscale.tokenizers.quantize import base
from tokscale.tokenizers.quantize.build import build_quantizer
from tokscale.tokenizers.quantize.config import FSQConfig, LFQConfig, QuantizerConfig, ResidualConfig, VQConfig
from tokscale.tokenizers.quantize.entropy import entropy_loss

CONFIGS = {
    "vq": {"kind": "vq", "num_tokens": 16, "dim": 4},
    "vq loss": {"kind": "vq", "num_tokens": 16, "dim": 4, "update": "loss"},
    "vq cosine": {"kind": "vq", "num_tokens": 16, "dim": 4, "cosine": True},
    "vq cosine loss": {"kind": "vq", "num_tokens": 16, "dim": 4, "cosine": True, "update": "loss"},
    "vq entropy": {"kind": "vq", "num_tokens": 16, "dim": 4, "entropy_weight": 0.1, "entropy_temperature": 0.5},
    "residual": {"kind": "residual", "num_tokens": 16, "dim": 4, "levels": 3},
    "residual own": {"kind": "residual", "num_tokens": 16, "dim": 4, "levels": 3, "shared_codebook": False},
    "residual loss": {"kind": "residual", "num_tokens": 16, "dim": 4, "levels": 2, "update": "loss"},
    "lfq": {"kind": "lfq", "num_tokens": 16},
    "lfq plain": {"kind": "lfq", "num_tokens": 16, "entropy_weight": 0},
    "fsq": {"kind": "fsq", "levels": (4, 3, 2, 2)},
}


def make(**options):
    with scope(0, "codebook"):
        return build_quantizer(decode(QuantizerConfig, options))


def maps(*, batch=3, dim=4, side=4, name="features", grad=False) -> torch.Tensor:
    return torch.randn(batch, dim, side, side, generator=generator(0, name)).requires_grad_(grad)


def total(quantized) -> torch.Tensor:
    return sum(quantized.weights[name] * part for name, part in quantized.parts.items())


@pytest.mark.parametrize("case", CONFIGS)
def test_every_quantizer_and_option_works_and_round_trips(case):
    quantizer, features = make(**CONFIGS[case]), maps(grad=True)
    assert decode(QuantizerConfig, encode(quantizer.config)) == quantizer.config
    out = quantizer(features)
    levels = () if quantizer.levels is None else (quantizer.levels,)
    assert out.codes.shape == (3, 4, 4, *levels) and out.codes.dtype == torch.int64
    assert 0 <= out.codes.min() and out.codes.max() < quantizer.num_tokens
    assert set(out.parts) == set(out.weights)
    (out.vectors.sum() + total(out) if out.parts else out.vectors.sum()).backward()
    assert features.grad.isfinite().all() and features.grad.abs().sum() > 0
    # Straight after, nothing learnt in between: the codes, looked up, are what the decoder was given.
    quantizer.eval()
    codes = quantizer.ids(features)
    torch.testing.assert_close(quantizer.lookup(codes), quantizer(features).vectors.detach())
    assert torch.equal(quantizer(features).codes, codes)
    usage = quantizer.usage(codes)
    assert 1 <= usage["codebook_perplexity"] <= 16 * (quantizer.levels or 1)


@pytest.mark.parametrize("case", [case for case in CONFIGS if "fsq" not in case])
def test_the_gradient_passes_as_if_nothing_had_happened(case):
    quantizer, features = make(**CONFIGS[case]).eval(), maps(grad=True)
    upstream = maps(name="upstream")
    (quantizer(features).vectors * upstream).sum().backward()
    copy = features.detach().requires_grad_()
    ((F.normalize(copy, dim=1) if "cosine" in case else copy) * upstream).sum().backward()
    torch.testing.assert_close(features.grad, copy.grad)


def test_codes_are_the_nearest_entries_and_levels_quantize_what_is_left():
    quantizer, features = make(**CONFIGS["residual own"]), maps()
    residual = rearrange(features, "b d h w -> (b h w) d").double()
    for level, book in enumerate(quantizer.codebook.double()):
        ids = torch.cdist(residual, book).argmin(dim=1)
        assert torch.equal(quantizer.ids(features)[..., level].flatten(), ids)
        residual = residual - book[ids]


def test_commitment_is_over_partial_sums():
    quantizer, features = make(**CONFIGS["residual"]).eval(), maps()
    out, sums, losses = quantizer(features), torch.zeros_like(maps()), []
    for level in range(3):
        sums = sums + rearrange(quantizer.codebook[0][out.codes[..., level]], "b h w d -> b d h w")
        losses.append((features - sums).square().mean())
    torch.testing.assert_close(out.parts["commitment"], torch.stack(losses).mean())


@pytest.mark.parametrize("case", ["vq loss", "residual loss"])
def test_commitment_moves_the_features_alone_and_the_codebook_loss_the_entries_alone(case):
    quantizer = make(**CONFIGS[case])
    features = maps(grad=True)
    parts = quantizer(features).parts
    by = [features, quantizer.codebook]
    to_features, to_entries = torch.autograd.grad(parts["commitment"], by, retain_graph=True, allow_unused=True)
    assert to_features.abs().sum() > 0 and to_entries is None
    to_features, to_entries = torch.autograd.grad(parts["codebook"], by, allow_unused=True)
    assert to_features is None and to_entries.abs().sum() > 0


@pytest.mark.parametrize("case", ["vq", "vq cosine", "residual", "residual own"])
def test_moving_averages_equal_a_loop_over_rows(case):
    quantizer = make(**CONFIGS[case], decay=0.7, revive_below=0)
    codebooks, levels = quantizer.codebooks, quantizer.levels or 1
    expected = quantizer.codebook.double().clone()
    count, sums = torch.zeros(codebooks, 16).double(), torch.zeros(codebooks, 16, 4).double()
    for step in range(3):
        features = maps(name=f"step {step}")
        rows = rearrange(features, "b d h w -> (b h w) d").double()
        rows = F.normalize(rows, dim=1) if "cosine" in case else rows
        found, added = torch.zeros_like(count), torch.zeros_like(sums)
        for row in rows:
            residual = row.clone()
            for level in range(levels):
                book = level % codebooks
                table = F.normalize(expected[book], dim=1) if "cosine" in case else expected[book]
                index = (table - residual).square().sum(dim=1).argmin()
                found[book, index] += 1
                added[book, index] += residual
                residual = residual - table[index]
        count, sums = 0.7 * count + 0.3 * found, 0.7 * sums + 0.3 * added
        seen = count > 1e-6
        expected[seen] = sums[seen] / count[seen][:, None]
        expected = F.normalize(expected, dim=-1) if "cosine" in case else expected
        quantizer(features)
        torch.testing.assert_close(quantizer.codebook.double(), expected, atol=1e-5, rtol=1e-5)


def test_moving_averages_agree_with_vector_quantize_pytorch():
    ours = make(**CONFIGS["vq"], decay=0.8, revive_below=0)
    theirs = VectorQuantize(dim=4, codebook_size=16, decay=0.8, eps=1e-8, channel_last=False, accept_image_fmap=True)
    state = theirs._codebook
    state.embed.data.copy_(ours.codebook)
    ours.ema_count.fill_(1.0)
    ours.ema_sum.copy_(ours.codebook)
    state.cluster_size.data.fill_(1.0)
    state.embed_avg.data.copy_(ours.codebook)
    for step in range(4):
        features = maps(name=f"step {step}")
        _, ids, _ = theirs(features)
        assert torch.equal(ours(features).codes, ids)
        torch.testing.assert_close(ours.codebook, state.embed, atol=1e-5, rtol=1e-5)


def test_only_training_moves_the_codebook():
    quantizer, features = make(**CONFIGS["residual"]), maps()
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    quantizer.eval()(features)
    quantizer.ids(features)
    assert all(torch.equal(before[name], value) for name, value in quantizer.named_buffers())
    quantizer.train()(features)
    assert not any(torch.equal(before[name], value) for name, value in quantizer.named_buffers())


def test_entries_of_moving_averages_are_buffers_and_those_of_a_loss_a_parameter_that_does_not_decay():
    assert not list(make(**CONFIGS["residual"]).parameters())
    trained = make(**CONFIGS["vq loss"])
    assert [name for name, _ in trained.named_parameters()] == ["codebook"] and trained.no_decay
    out = trained(maps())
    out.parts["codebook"].backward()
    used = torch.zeros(16, dtype=torch.bool)
    used[out.codes.unique()] = True
    assert torch.equal(trained.codebook.grad[0].abs().sum(dim=1) > 0, used)


def test_the_dead_and_only_they_move_to_features_of_the_batch():
    reviving = make(**CONFIGS["vq"], revive_below=0.1, revive_every=4, decay=0.5)
    leaving = make(**CONFIGS["vq"], revive_below=0, decay=0.5)
    features = maps()
    rows = rearrange(features, "b d h w -> (b h w) d")
    for quantizer in (reviving, leaving):
        quantizer.codebook[0, 3:] = 100.0  # nothing is near these
        quantizer.anneal(3)
        quantizer(features)
        assert (quantizer.codebook[0, 3:] == 100).all()
        assert quantizer.usage(quantizer.ids(features))["codebook_dead"] >= 13
        quantizer.anneal(4)
        quantizer(features)
    moved = reviving.codebook[0, 3:]
    assert (moved[:, None] == rows).all(dim=-1).any(dim=1).all() and len(moved.unique(dim=0)) > 5
    assert torch.equal(reviving.codebook[0, :3], leaving.codebook[0, :3])
    assert (leaving.codebook[0, 3:] == 100).all()
    assert torch.equal(reviving.ema_count[0, 3:], leaving.ema_count.mean().expand(13))
    assert reviving.usage(reviving.ids(features))["codebook_dead"] < 8


def test_a_batch_that_is_not_finite_leaves_no_trace():
    quantizer = make(**CONFIGS["residual"])
    quantizer(maps())
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    poisoned = maps()
    poisoned[0, 0, 0, 0] = float("nan")
    quantizer(poisoned)
    assert all(torch.equal(before[name], value) for name, value in quantizer.named_buffers())


class Half(Collectives):
    """One of two ranks, told beforehand what the other would say."""

    def __init__(self, rank: int, said: list[torch.Tensor]):
        self.rank, self.said, self.own = rank, list(said), []

    def all_sum(self, local):
        self.own.append(local.clone())
        return local + self.said.pop(0) if self.said else local

    def rank_offset(self, batch):
        return self.rank * batch


def test_statistics_and_revival_are_those_of_the_whole_batch():
    features = maps(batch=4)
    whole = make(**CONFIGS["residual"])
    whole(features)
    said = []
    for _ in range(3):  # what each says depends on what the other said before, so the talk settles after two rounds
        spoken = []
        for rank in range(2):
            half, others = make(**CONFIGS["residual"]), Half(rank, said[1 - rank] if said else [])
            with using(others):
                half(features[2 * rank : 2 * rank + 2])
            spoken.append(others.own)
        said = spoken
    torch.testing.assert_close(half.codebook, whole.codebook)
    torch.testing.assert_close(half.ema_count, whole.ema_count)


def test_everything_is_fp32_whatever_the_features_are():
    quantizer, features = make(**CONFIGS["residual"]).eval(), maps().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(features)
    assert out.vectors.dtype == torch.float32 and out.parts["commitment"].dtype == torch.float32
    assert torch.equal(out.codes, quantizer.ids(features.float()))


def test_counts_and_sums_are_right_across_chunks(monkeypatch):
    monkeypatch.setattr(base, "_ROWS", 7)
    rows = torch.randn(40, 3, generator=generator(0, "rows"))
    ids = torch.randint(0, 5, (40,), generator=generator(0, "ids"))
    found = base.assigned(rows, ids, 5)
    assert torch.equal(found[:, 0], torch.bincount(ids, minlength=5).float())
    torch.testing.assert_close(found[:, 1:], torch.zeros(5, 3).index_add(0, ids, rows))


def test_levels_bring_the_sum_nearer_after_training():
    quantizer = make(kind="residual", num_tokens=32, dim=4, levels=4, decay=0.8)
    for step in range(30):
        quantizer.anneal(step)
        quantizer(maps(batch=16, name=f"step {step}"))
    features = maps(batch=16)
    codes = quantizer.eval().ids(features)
    vectors = [quantizer.codebook[0][codes[..., :levels]].sum(dim=-2) for levels in range(5)]
    errors = [(rearrange(v, "b h w d -> b d h w") - features).square().mean().item() for v in vectors]
    assert errors == sorted(errors, reverse=True) and errors[4] < 0.1 * errors[0]


def test_usage_counts_the_codebooks_of_all_levels():
    own = make(**CONFIGS["residual own"])
    codes = torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    assert own.usage(codes)["codebook_dead"] == 3 * 16 - 3
    assert make(**CONFIGS["residual"]).usage(codes)["codebook_dead"] == 15


def test_lfq_equals_vector_quantize_pytorch():
    # At 5 no probability falls below the 1e-5 at which theirs cuts.
    options = {"commitment_weight": 0.25, "entropy_weight": 0.1, "diversity_gamma": 4, "entropy_inv_temperature": 5}
    ours = make(kind="lfq", num_tokens=64, **options)
    theirs = LFQ(codebook_size=64, dim=6, entropy_loss_weight=0.1, commitment_loss_weight=0.25, diversity_gamma=4.0)
    mine, other = (0.05 * maps(dim=6)).requires_grad_(), (0.05 * maps(dim=6)).requires_grad_()
    out, (vectors, ids, aux) = ours(mine), theirs(other, inv_temperature=5.0)
    assert torch.equal(out.codes, ids) and torch.equal(out.vectors, vectors)
    torch.testing.assert_close(total(out), aux, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.lookup(ids), theirs.indices_to_codes(ids))
    total(out).backward()
    aux.backward()
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_lfq_codes_count_bits_from_the_highest():
    features = torch.tensor([1.0, -1.0, 1.0, 1.0]).view(1, 4, 1, 1)
    quantizer = make(kind="lfq", num_tokens=16)
    assert quantizer.ids(features).item() == 0b1011 and torch.equal(quantizer.lookup(torch.tensor([[[11]]])), features)


def test_lfq_groups_of_bits_bound_the_entropy_of_the_mean_from_above():
    rows = 0.02 * maps(dim=6)
    exact = make(kind="lfq", num_tokens=64, entropy_bits=6)(rows).parts["entropy"]
    grouped = make(kind="lfq", num_tokens=64, entropy_bits=2)(rows).parts["entropy"]
    assert grouped < exact < 0


def test_fsq_equals_vector_quantize_pytorch():
    levels = (8, 6, 5, 3)
    ours, theirs = make(kind="fsq", levels=levels), FSQ(list(levels))
    mine, other = maps(grad=True), maps(grad=True)
    out, (vectors, ids) = ours(mine), theirs(other)
    torch.testing.assert_close(out.vectors, vectors)
    assert torch.equal(out.codes, ids.long())
    torch.testing.assert_close(ours.lookup(out.codes), theirs.indices_to_codes(ids))
    for result in (out.vectors, vectors):
        (result * maps(name="upstream")).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)


def test_every_fsq_code_stands_for_values_of_its_own():
    quantizer = make(kind="fsq", levels=(4, 3, 2))
    values = rearrange(quantizer.lookup(torch.arange(24).view(1, 4, 6)), "b d h w -> (b h w) d")
    assert len(values.unique(dim=0)) == 24 and values.abs().max() == 1


def test_entropy_loss_prefers_sure_places_and_even_use():
    sure = 50 * torch.eye(4)
    assert entropy_loss(sure) == pytest.approx(-math.log(4), abs=1e-4)
    assert entropy_loss(torch.zeros(4, 4)) == pytest.approx(0, abs=1e-5)
    assert entropy_loss(sure[:1].expand(4, 4)) == pytest.approx(0, abs=1e-4)
    logits = torch.full((2, 3), -200.0).fill_diagonal_(0).requires_grad_()
    entropy_loss(logits).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vq", "update": "loss", "revive_below": 0.1}, "revive_below=0.1 moves entries that update=loss"),
        ({"kind": "lfq", "num_tokens": 1000}, "num_tokens=1000 is no power of two.*try 1024"),
        ({"kind": "vq", "decay": 1.0}, "decay"),
        ({"kind": "vq", "levels": 2}, "levels"),
        ({"kind": "residual", "cosine": True}, "cosine"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        decode(QuantizerConfig, options)


def test_sizes_follow_the_configuration():
    assert LFQConfig(num_tokens=1 << 18).dim == 18
    assert (FSQConfig().num_tokens, FSQConfig().dim) == (1000, 4)
    assert ResidualConfig().revives == VQConfig().revives == 0.03 and VQConfig(update="loss").revives == 0
