"""CLIP's loss and encoders: against hand-written oracles, the original, and one process with the whole batch."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokscale.base import rng
from tokscale.base.batch import ImageBatch
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.protocols import using
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.models.clip import CLIP, CLIPConfig
from tokscale.models.clip.original import config_from_original, state_dict_from_original

CASE = np.load(Path(__file__).parents[2] / "assets" / "reference" / "clip_case.npz")
LISTING = json.loads(str(CASE["listing"]))


def make(**options: object) -> CLIP:
    sizes = {"num_text_tokens": 11, "text_seq_len": 5, "visual_image_size": 8, "visual_patch_size": 4}
    small = {"dim_text": 16, "dim_image": 12, "dim_latent": 8, "text_enc_depth": 1, "visual_enc_depth": 1}
    heads = {"text_heads": 2, "visual_heads": 2, "dim_head": 8}
    with rng.scope(0, "clip"):
        return CLIP(decode(CLIPConfig, sizes | small | heads | options))


def make_batch(size: int = 4) -> ImageBatch:
    stream = rng.generator(0, "pairs")
    text = torch.randint(1, 11, (size, 5), generator=stream)
    text[0, 2:] = 0
    pixels = torch.randint(0, 256, (size, 3, 8, 8), generator=stream).to(torch.uint8)
    return ImageBatch(positions=torch.arange(size), pixels=pixels, text=text, text_mask=text != 0)


def original() -> CLIP:
    config = config_from_original(LISTING["hparams"])
    state = {
        name: torch.from_numpy(np.asarray(CASE[f"weight/{key}"], np.float32)) for name, key in LISTING["names"].items()
    }
    model = CLIP(config)
    model.load_state_dict(state_dict_from_original(state, config), strict=True)
    return model.eval()


def original_batch() -> ImageBatch:
    text = torch.from_numpy(CASE["text"])
    return ImageBatch(torch.arange(3), torch.from_numpy(CASE["pixels"]), text=text, text_mask=text != 0)


def test_similarities_equal_the_original():
    model, batch = original(), original_batch()
    scores = model.score(batch.text, batch.text_mask, batch.pixels)
    torch.testing.assert_close(scores, torch.from_numpy(CASE["similarity"]), rtol=1e-5, atol=1e-5)
    unmasked = model.score(batch.text, None, batch.pixels)
    torch.testing.assert_close(unmasked, torch.from_numpy(CASE["unmasked"]), rtol=1e-5, atol=1e-5)


def test_loss_and_gradients_equal_the_original():
    model = original()
    out = model(original_batch())
    out.total.backward()
    torch.testing.assert_close(out.total.detach(), torch.from_numpy(CASE["loss"]), rtol=1e-6, atol=0)
    renamed = {"temperature": "logit_scale.temperature"}
    for name in ("temperature", "to_text_latent.weight", "to_visual_embedding.bias"):
        gradient = model.get_parameter(renamed.get(name, name)).grad
        wanted = torch.from_numpy(CASE[f"grad/{name}"]).view_as(gradient)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_the_loss_is_cross_entropy_both_ways():
    model, batch = make(), make_batch()
    text, image = model.encode_text(batch.text, batch.text_mask), model.encode_image(batch.pixels)
    similarity = text @ image.t() / 0.07
    wanted = (F.cross_entropy(similarity, torch.arange(4)) + F.cross_entropy(similarity.t(), torch.arange(4))) / 2
    out = model(batch)
    torch.testing.assert_close(out.total, wanted)
    assert out.metrics["logit_scale"] == pytest.approx(1 / 0.07)
    assert out.metrics["retrieval_accuracy"] == (similarity.argmax(1) == torch.arange(4)).float().mean()


def test_padding_does_not_change_a_caption():
    model, batch = make(), make_batch()
    other = torch.where(batch.text_mask, batch.text, 7)
    torch.testing.assert_close(
        model.encode_text(other, batch.text_mask), model.encode_text(batch.text, batch.text_mask), rtol=1e-5, atol=1e-6
    )


def test_a_caption_of_padding_alone_survives():
    model, batch = make(), make_batch()
    text = batch.text.clone()
    text[1] = 0
    empty = ImageBatch(batch.positions, batch.pixels, text=text, text_mask=text != 0)
    out = model(empty)
    out.total.backward()
    assert out.total.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert not model.encode_text(text, text != 0)[1].any()


def test_the_scale_is_clamped_and_finds_back():
    model = make(temperature_init=10.0).logit_scale
    assert model().item() == pytest.approx(100)
    model().backward()
    assert model.temperature.grad == pytest.approx(100)  # a larger scale costs: descent leads back below the bound
    model.temperature.grad = None
    (-model()).backward()
    assert model.temperature.grad == 0
    seed = make(temperature_init=10.0, temperature_max=None).logit_scale
    assert seed().item() == pytest.approx(math.exp(10))


def halves(comm: Comm) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of this rank's share of the batch, averaged over the ranks as an engine does."""
    model, whole = make(), make_batch(6)
    mine = whole.split(comm.world)[comm.rank]
    with using(comm):
        out = model(mine)
        out.total.backward()
    gradients = {name: comm.all_sum(p.grad) / comm.world for name, p in model.named_parameters()}
    return comm.mean({"loss": out.total.item()})["loss"], gradients


def test_negatives_of_all_ranks_equal_one_process_with_the_whole_batch():
    model = make()
    out = model(make_batch(6))
    out.total.backward()
    local = [model(part).total.item() for part in make_batch(6).split(2)]
    assert abs(sum(local) / 2 - out.total.item()) > 1e-2, "without gathering the loss is another"
    for loss, gradients in run_ranks(halves, 2):
        assert loss == pytest.approx(out.total.item(), rel=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_scoring_keeps_the_mode():
    model, batch = make().train(), make_batch()
    scores = model.score(batch.text, batch.text_mask, batch.pixels)
    assert scores.shape == (4,) and not scores.requires_grad and model.training


def test_bfloat16_trains():
    out = make().to(torch.bfloat16)(make_batch())
    out.total.backward()
    torch.testing.assert_close(out.total, make()(make_batch()).total, rtol=5e-2, atol=0)


def test_wrong_images_and_missing_captions_are_named():
    model, batch = make(), make_batch()
    with pytest.raises(DataError, match=r"images of shape \(3, 8, 4\) for a CLIP of 3 channels and 8 pixels"):
        model.encode_image(batch.pixels[..., :4])
    with pytest.raises(DataError, match="no caption ids"):
        model(ImageBatch(batch.positions, batch.pixels))


def test_sizes_come_from_the_tokenizers_and_are_checked():
    words = SimpleNamespace(num_tokens=11)
    config = CLIPConfig().fitted(SimpleNamespace(image_size=64), words)
    assert config.sizes == (11, 2)
    assert CLIPConfig(visual_image_size=64).fitted(None, words) == config
    with pytest.raises(ConfigError, match="32 does not divide images of 100 pixels"):
        CLIPConfig().fitted(SimpleNamespace(image_size=100), words)
    with pytest.raises(ConfigError, match="not a multiple of visual_patch_size"):
        decode(CLIPConfig, {"visual_image_size": 100}, where="model")
    with pytest.raises(ConfigError, match=r"model\.num_text_tokens"):
        CLIP(CLIPConfig())


def test_flops_follow_the_parameters():
    model = make()
    text = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("text_transformer"))
    image = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("visual_tr"))
    products = 6 * (5 * text + 4 * (image + model.to_visual_embedding.weight.numel()))
    assert products < model.train_flops() < 1.4 * products
