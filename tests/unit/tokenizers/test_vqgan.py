"""The trainable quantized autoencoder: every network and quantizer, its folder, its losses."""

import pytest
import torch
import torch.nn.functional as F
from vqgan_models import CNN, RESIDUAL, RESNET, TINY, VIT, VQ, images, make

from tokscale.base.config import decode, encode
from tokscale.base.errors import CheckpointError, ConfigError, DataError
from tokscale.base.protocols import LossModel
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.image import load_image_tokenizer, save_image_tokenizer
from tokscale.tokenizers.vqgan.config import VQGANConfig

CASES = {
    "cnn": {"network": CNN},
    "cnn with attention": {"network": CNN | {"attn_resolutions": (8,)}},
    "resnet": {},
    "resnet without blocks": {"network": RESNET | {"num_resnet_blocks": 0}},
    "vit": {"network": VIT},
    "vit with another decoder": {"network": VIT | {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 4}},
    "residual": {"quantizer": RESIDUAL},
    "residual, own codebooks": {"quantizer": RESIDUAL | {"shared_codebook": False}},
    "loss": {"quantizer": VQ | {"update": "loss"}},
    "cosine": {"network": VIT, "quantizer": VQ | {"cosine": True, "update": "loss"}},
    "lfq": {"quantizer": {"kind": "lfq", "num_tokens": 16}},
    "fsq": {"quantizer": {"kind": "fsq", "levels": (4, 3, 3)}},
    "grey": {"channels": 1},
    "transparent": {"channels": 4, "network": CNN},
    "l2": {"l1_weight": 0.0, "l2_weight": 1.0},
    "logit-laplace": {"network": VIT, "l1_weight": 0.0, "l2_weight": 1.0, "logit_laplace_weight": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_every_option_trains_and_round_trips(case, tmp_path):
    model = make(**CASES[case])
    assert isinstance(model, LossModel) and decode(VQGANConfig, encode(model.config)) == model.config
    batch = images(channels=model.channels)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    before = model.eval()(batch).metrics["reconstruction_error"]
    for step in range(12):
        model.anneal(step)
        optimizer.zero_grad()
        out = model.train()(batch)
        out.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    torch.testing.assert_close(out.total, sum(out.weights[name] * part for name, part in out.parts.items()))
    assert model.eval()(batch).metrics["reconstruction_error"] < before
    codes = model.encode(batch.pixels)
    assert codes.shape[1:] == model.code_shape and model.decode(codes).shape == batch.pixels.shape
    save_image_tokenizer(model, tmp_path)
    loaded = load_image_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(batch.pixels), codes) and torch.equal(loaded.decode(codes), model.decode(codes))
    assert model.train_flops() > 0


def test_evaluation_mode_measures_the_tokenizer_itself_and_moves_nothing():
    model, batch = make(quantizer=RESIDUAL).eval(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = model(batch)
    rebuilt = model.decode_to_unit_range(model.encode(batch.pixels))
    torch.testing.assert_close(out.parts["l1"], 2 * F.l1_loss(rebuilt, batch.pixels / 255))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_holders_training_mode_never_reaches_the_codebook():
    model, batch = make(), images()
    tokenizer = FrozenImageTokenizer(model)

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokenizer = tokenizer

    before = model.quantizer.codebook.clone()
    Holder().train()
    first = tokenizer.encode(batch.pixels)
    assert torch.equal(tokenizer.encode(batch.pixels), first) and torch.equal(model.quantizer.codebook, before)


def test_saving_and_loading_leave_the_callers_network_alone(tmp_path):
    model = make().train()
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    save_image_tokenizer(model, tmp_path)
    load_image_tokenizer(tmp_path)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def test_levels_are_the_last_axis_of_the_codes():
    model = make(quantizer=RESIDUAL)
    assert model.code_shape == (4, 4, 3) and model.encode(images().pixels).shape == (4, 4, 4, 3)
    with pytest.raises(DataError, match=r"\(4, 4\) given to a tokenizer of \(4, 4, 3\)"):
        model.decode(torch.zeros(1, 4, 4, dtype=torch.int64))


def test_the_fingerprint_follows_what_decides_ids():
    prints = {}
    for name in ("resnet", "vit", "fsq", "residual", "cosine", "grey"):
        prints[name] = FrozenImageTokenizer(make(**CASES[name])).fingerprint
    assert len(set(prints.values())) == len(prints)
    levels = [FrozenImageTokenizer(make(quantizer={"kind": "fsq", "levels": levels})) for levels in ((4, 3), (3, 4))]
    assert levels[0].fingerprint != levels[1].fingerprint


def test_weights_of_another_network_are_refused(tmp_path):
    save_image_tokenizer(make(), tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"dim": 8', '"dim": 16'))
    with pytest.raises(CheckpointError, match="has shape"):
        load_image_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, "image_size=18 is not a multiple of the network's reduction, 4"),
        ({"l1_weight": 0.0}, "all 0; nothing would ask for the image"),
        ({"network": VIT | {"dim": 25}}, "dim=25 does not divide into heads=2"),
        ({"network": VIT | {"decoder_dim": 15}}, "decoder_dim=15 does not divide into decoder_heads=2"),
        ({"network": CNN | {"dim": 8}}, "dim"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        decode(VQGANConfig, TINY | options)


def test_other_images_are_refused():
    with pytest.raises(DataError, match="set image_size and channels"):
        make()(images(size=8))
