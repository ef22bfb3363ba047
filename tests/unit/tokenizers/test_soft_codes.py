"""Soft targets and drawn codes: against distances written out, and on what token shards hold."""

import pytest
import torch
from einops import rearrange

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.rng import generator
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.pretrained.taming import TamingConfig, TamingVQGAN
from tokscale.tokenizers.quantize.soft import SoftCodes, SoftCodesConfig, soft_codes
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.model import VQGAN

ROWS, VOCAB, DIM, LEVELS = 50, 16, 6, 3


def rqvae(shared: bool = False) -> FrozenImageTokenizer:
    quantizer = {"kind": "residual", "num_tokens": VOCAB, "dim": DIM, "levels": LEVELS, "shared_codebook": shared}
    network = {"kind": "resnet", "dim": 8, "layers": 2}
    config = decode(VQGANConfig, {"image_size": 16, "network": network, "quantizer": quantizer})
    return FrozenImageTokenizer(VQGAN(config))


def taming() -> FrozenImageTokenizer:
    sizes = {"image_size": 16, "resolution": 16, "ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "embed_dim": DIM}
    book = {"num_tokens": VOCAB, "z_channels": 32, "quantizer": "residual", "levels": LEVELS}
    return FrozenImageTokenizer(TamingVQGAN(decode(TamingConfig, sizes | book)))


def some(*shape: int, name: str) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, name))


@pytest.mark.parametrize("books", [1, LEVELS])
def test_distributions_are_the_softmax_of_squared_distances_level_by_level(books):
    features, entries = some(ROWS, DIM, name="features"), some(books, VOCAB, DIM, name="books")
    codes, probs = soft_codes(features, entries, LEVELS, 0.5)
    rest = features
    for level in range(LEVELS):
        book = entries[level % books]
        distances = (rest[:, None, :] - book).square().sum(dim=-1)
        assert torch.equal(codes[:, level], distances.argmin(dim=1))
        torch.testing.assert_close(probs[:, level], (-distances / 0.5).softmax(dim=1))
        rest = rest - book[codes[:, level]]


def test_codes_are_drawn_as_often_as_their_distribution_says():
    features, entries = some(1, DIM, name="features").expand(20_000, -1), some(LEVELS, VOCAB, DIM, name="books")
    draws = torch.rand(20_000, LEVELS, generator=generator(0, "draws"))
    codes, probs = soft_codes(features, entries, LEVELS, 2.0, draws)
    shares = torch.bincount(codes[:, 0], minlength=VOCAB) / 20_000
    torch.testing.assert_close(shares, probs[0, 0], atol=0.02, rtol=0)
    assert shares.max() < 0.9
    first = codes[:, 0].mode().values
    shares = torch.bincount(codes[codes[:, 0] == first, 1], minlength=VOCAB) / (codes[:, 0] == first).sum()
    torch.testing.assert_close(shares, probs[codes[:, 0] == first][0, 1], atol=0.03, rtol=0)


@pytest.mark.parametrize("tokenizer", [rqvae(), rqvae(shared=True), taming()], ids=["own", "shared", "taming"])
def test_stored_codes_come_back_when_it_is_cold_and_vary_with_the_position_when_not(tokenizer):
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator(0, "pixels"))
    codes, positions = tokenizer.encode(pixels), torch.tensor([0, 1, 2])
    features = tokenizer.codec.quantizer.lookup(codes)
    kept, probs = SoftCodes(tokenizer, SoftCodesConfig(temperature=1e-6, draw=False), 0)(codes, positions)
    wanted, _ = soft_codes(rearrange(features, "b d h w -> (b h w) d"), tokenizer.codec.quantizer.entries(), LEVELS, 1)
    assert torch.equal(kept.flatten(0, 2), wanted)
    assert torch.equal(probs.argmax(dim=-1), kept) and probs.shape == (*codes.shape, VOCAB)
    warm = SoftCodes(tokenizer, SoftCodesConfig(temperature=5.0), 0)
    drawn, _ = warm(codes, positions)
    assert torch.equal(warm(codes[1:2], positions[1:2])[0], drawn[1:2])
    assert not torch.equal(warm(codes, positions + 3)[0], drawn)
    assert not torch.equal(SoftCodes(tokenizer, SoftCodesConfig(temperature=5.0), 1)(codes, positions)[0], drawn)


def test_the_sum_of_entries_stands_for_features_that_lie_near_it():
    entries = some(LEVELS, VOCAB, DIM, name="books") * torch.tensor([4.0, 1.0, 0.25])[:, None, None]
    features = some(ROWS, DIM, name="features")
    codes, exactly = soft_codes(features, entries, LEVELS, 0.5)
    total = torch.stack([entries[at][codes[:, at]] for at in range(LEVELS)]).sum(dim=0)
    again, nearly = soft_codes(total, entries, LEVELS, 0.5)
    assert torch.equal(again[:, 2], codes[:, 2])
    assert (exactly - nearly).abs().sum(dim=-1).mean() < 0.7


def test_a_tokenizer_of_one_code_a_place_is_refused():
    dvae = FrozenImageTokenizer(DiscreteVAE(DiscreteVAEConfig(image_size=16, num_tokens=8)))
    with pytest.raises(ConfigError, match=r"data\.soft_codes: the image tokenizer \(kind 'dvae'\) has no residual"):
        SoftCodes(dvae, SoftCodesConfig(), 0)
