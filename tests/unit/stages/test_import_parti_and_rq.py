"""Checkpoints of parti-pytorch and RQ-transformer become exports that compute what the originals computed."""

import json

import numpy as np
import pytest
import torch
from test_stage_import import REFERENCE, VAE, run, vae_state

import tokscale
from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK
from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.tokenizers.image import save_image_tokenizer
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.model import VQGAN

PARTI, RQ = np.load(REFERENCE / "parti_cases.npz"), np.load(REFERENCE / "rq_cases.npz")


def stored(cases, case: str, kind: str) -> dict[str, torch.Tensor]:
    start = f"{case}/{kind}/"
    names = [name for name in cases.files if name.startswith(start)]
    return {name.removeprefix(start): torch.from_numpy(cases[name].astype(np.float32)) for name in names}


@pytest.mark.parametrize("case", ["plain", "wide"])
def test_logits_of_an_imported_parti_equal_the_original(tmp_path, case):
    image = run(tmp_path, {"hparams": VAE, "weights": vae_state()}, out=tmp_path / "vae").outputs["image_tokenizer"]
    length = json.loads(str(PARTI["listing"]))[case]["hparams"]["max_text_len"]
    keys = {"source": "parti_pytorch", "image_tokenizer": image, "hparams": {"max_text_len": length}}
    state = stored(PARTI, case, "state") | {"vae.decoder.weight": torch.zeros(2)}
    result = run(tmp_path, state, **keys)
    assert run(tmp_path, torch.load(tmp_path / "given.pt"), **keys).skipped
    states, mask = (torch.from_numpy(PARTI[f"{case}/{name}"]) for name in ("states", "mask"))
    loaded = tokscale.load(result.outputs["export"], text_encoder=Encoder())
    text = torch.zeros(len(states), 1, dtype=torch.long)
    context = loaded.model.encode_condition(text, text > 0, {TEXT_EMBEDS: states, TEXT_EMBEDS_MASK: mask})
    found = loaded.model.logits(torch.from_numpy(PARTI[f"{case}/codes"])[:, :9], context)
    torch.testing.assert_close(found, torch.from_numpy(PARTI[f"{case}/logits_9"]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="image_tokenizer: Parti's own VitVQGanVAE is not carried over"):
        run(tmp_path, state, source="parti_pytorch")
    with pytest.raises(CheckpointError, match="no Parti of parti-pytorch"):
        run(tmp_path, {"start_token": torch.zeros(2)}, **keys)


class Encoder:
    """Stands where the states that a test brings would have come from."""

    width, fingerprint, length = 20, "states of the test", 8


def codes_of(folder, num_tokens: int, side: int, levels: int):
    network = {"kind": "resnet", "dim": 8, "layers": 1, "num_resnet_blocks": 0}
    quantizer = {"kind": "residual", "num_tokens": num_tokens, "dim": 4, "levels": levels}
    options = {"image_size": 2 * side, "network": network, "quantizer": quantizer}
    save_image_tokenizer(VQGAN(decode(VQGANConfig, options)), folder)
    return folder


def test_logits_of_an_imported_rq_transformer_equal_the_original(tmp_path):
    image = codes_of(tmp_path / "rqvae", num_tokens=11, side=2, levels=4)
    keys = {"source": "rq_transformer", "image_tokenizer": image, "hparams": {"dim_head": 8}}
    state = stored(RQ, "deep", "weights")
    loaded = tokscale.load(run(tmp_path, state, **keys).outputs["export"])
    assert loaded.text_tokenizer is None and loaded.config.lengths == (4, 4)
    logits = loaded.model.logits(torch.from_numpy(RQ["deep/part"]))
    torch.testing.assert_close(logits[:, 0], torch.from_numpy(RQ["deep/first"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, 1:], torch.from_numpy(RQ["deep/logits"]), rtol=1e-5, atol=1e-5)
    assert loaded.sample([""], seeds=[3]).shape == (1, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"hparams\.dim_head: attention of 16 channels has no heads of 64"):
        run(tmp_path, state, **keys | {"hparams": {}})
    with pytest.raises(ConfigError, match="image_tokenizer: an RQ-VAE is not carried over"):
        run(tmp_path, state, source="rq_transformer", hparams={"dim_head": 8})
    with pytest.raises(CheckpointError, match="HierarchicalCausalTransformer has other blocks"):
        run(tmp_path, {"token_emb.weight": torch.zeros(2, 2)}, **keys)
