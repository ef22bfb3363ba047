import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError, ConfigError, DataError
from tokscale.base.rng import generator, scope
from tokscale.tokenizers.codec import FrozenImageTokenizer, to_uint8
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.fingerprint import tokenizer_fingerprint, weights_sha256
from tokscale.tokenizers.image import load_image_tokenizer, save_image_tokenizer
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.model import VQGAN

TINY = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 8}


def codec(seed=0, **options) -> DiscreteVAE:
    with scope(seed, "weights"):
        return DiscreteVAE(DiscreteVAEConfig(**(TINY | options)))


def images(batch=3, channels=3):
    return torch.randint(0, 256, (batch, channels, 16, 16), generator=generator(0, "pictures"), dtype=torch.uint8)


def test_a_folder_gives_back_the_tokenizer(tmp_path):
    tokenizer = FrozenImageTokenizer(codec())
    save_image_tokenizer(tokenizer, tmp_path / "dvae")
    loaded = load_image_tokenizer(tmp_path / "dvae")
    assert (loaded.num_tokens, loaded.image_size, loaded.channels, loaded.code_shape) == (12, 16, 3, (4, 4))
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint == tokenizer.fingerprint
    codes = loaded.encode(images())
    assert torch.equal(codes, tokenizer.encode(images()))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert sorted(path.name for path in (tmp_path / "dvae").iterdir()) == ["config.json", "model.safetensors"]


def test_codes_can_index_embeddings_under_autograd():
    codes = FrozenImageTokenizer(codec()).encode(images())
    nn.Embedding(12, 4)(codes).sum().backward()


def test_a_frozen_tokenizer_stays_in_evaluation_mode_and_out_of_its_holder():
    class Holder(nn.Module):
        def __init__(self, tokenizer):
            super().__init__()
            self.tokenizer = tokenizer
            self.own = nn.Linear(2, 2)

    tokenizer = FrozenImageTokenizer(codec(num_resnet_blocks=1))
    holder = Holder(tokenizer).train()
    assert not any(module.training for module in tokenizer.codec.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.codec.parameters())
    assert [name for name, _ in holder.named_parameters()] == ["own.weight", "own.bias"]
    assert sorted(holder.state_dict()) == ["own.bias", "own.weight"]
    first = tokenizer.encode(images())
    with torch.random.fork_rng():
        torch.rand(5)
        assert torch.equal(tokenizer.encode(images()), first)


def test_ids_do_not_depend_on_the_callers_autocast_or_tf32():
    tokenizer = FrozenImageTokenizer(codec())
    seen = []
    tokenizer.codec.to_logits.register_forward_hook(
        lambda _, __, out: seen.append((out.dtype, torch.get_float32_matmul_precision()))
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokenizer.encode(images())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(torch.float32, "highest")]


def test_bf16_convolutions_quantize_in_fp32_under_another_fingerprint():
    exact, fast = FrozenImageTokenizer(codec()), FrozenImageTokenizer(codec(), precision="bf16")
    seen = []
    fast.codec.encoder[-1][0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    fast.codec.to_logits.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    fast.encode(images())
    assert seen == [torch.bfloat16, torch.float32]
    assert exact.fingerprint != fast.fingerprint


def test_decoded_images_are_denormalised():
    model = codec(normalization=((0.5, 0.4, 0.3), (0.2, 0.302, 0.4)))
    with torch.no_grad():  # a decoder that says exactly 0, 1 and -1 in normalised space
        model.decoder[-1].weight.zero_()
        model.decoder[-1].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    decoded = FrozenImageTokenizer(model).decode(torch.zeros(1, 4, 4, dtype=torch.int64))
    assert decoded.dtype == torch.uint8
    assert [decoded[0, c].unique().tolist() for c in range(3)] == [[128], [179], [0]]


def test_pixels_are_cut_before_they_become_bytes():
    pixels = torch.tensor([-1.0, -1e-3, 0.0, 0.5, 1.0, 1.01, 300.0])
    assert to_uint8(pixels).tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_codes_outside_the_vocabulary_or_of_another_shape_are_refused():
    tokenizer = FrozenImageTokenizer(codec())
    for bad in (-1, 12):
        with pytest.raises(DataError, match="tokenizer of 12 codes"):
            tokenizer.decode(torch.full((1, 4, 4), bad))
    with pytest.raises(DataError, match=r"tokenizer of \(4, 4\)"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64).reshape(1, 2, 8))


def test_fingerprint_follows_what_decides_ids_and_nothing_else():
    base = FrozenImageTokenizer(codec()).fingerprint
    same = [{"temperature": 0.2}, {"kl_div_loss_weight": 0.1}, {"smooth_l1_loss": True}]
    other = [{"normalization": None}, {"normalization": ((0.4,) * 3, (0.5,) * 3)}]
    assert {FrozenImageTokenizer(codec(**options)).fingerprint for options in same} == {base}
    assert base not in {FrozenImageTokenizer(codec(**options)).fingerprint for options in other}
    assert FrozenImageTokenizer(codec(seed=1)).fingerprint != base
    assert tokenizer_fingerprint("a/1", {"x": 1}, "w") != tokenizer_fingerprint("a/2", {"x": 1}, "w")


def test_weights_sha256_sees_names_dtypes_shapes_and_values_but_not_order():
    tensors = {"a": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.bfloat16)}
    base = weights_sha256(tensors)
    assert weights_sha256(dict(reversed(tensors.items()))) == base
    for changed in (
        {"a": torch.arange(6.0).reshape(2, 3)},
        {"a": torch.arange(6.0) + 1e-6},
        {"b": torch.zeros(2, dtype=torch.float16)},
    ):
        assert weights_sha256(tensors | changed) != base
    assert weights_sha256({"a": tensors["a"], "c": tensors["b"]}) != base


def test_fingerprint_is_equal_in_another_process(tmp_path):
    save_image_tokenizer(codec(), tmp_path)
    program = (
        "import sys; from tokscale.tokenizers.image import load_image_tokenizer as l; print(l(sys.argv[1]).fingerprint)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True
    )
    assert out.stdout.decode().strip() == load_image_tokenizer(tmp_path).fingerprint


def test_damaged_or_foreign_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json"):
        load_image_tokenizer(tmp_path)
    save_image_tokenizer(codec(), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()

    config.write_text(json.dumps(json.loads(good_config) | {"hidden_dim": 4}))
    with pytest.raises(CheckpointError, match=r"do not fit 'dvae'.*the configuration says"):
        load_image_tokenizer(tmp_path)
    config.write_text(json.dumps(json.loads(good_config) | {"hiden_dim": 4}))
    with pytest.raises(DataError, match="did you mean 'hidden_dim'"):
        load_image_tokenizer(tmp_path)
    config.write_text(good_config)

    weights.write_bytes(good_weights[:-1] + bytes([good_weights[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="do not match their sha256"):
        load_image_tokenizer(tmp_path)
    weights.write_bytes(good_weights[: len(good_weights) // 2])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_image_tokenizer(tmp_path)
    weights.write_bytes(good_weights)
    tensors = load_file(weights)
    tensors["extra"] = tensors.pop("to_logits.bias")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"missing to_logits\.bias; unknown extra"):
        load_image_tokenizer(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_image_tokenizer(tmp_path)


NETWORKS = {
    "dvae": lambda: codec(num_resnet_blocks=1),
    "cnn": lambda: VQGAN(vqgan_config({"kind": "cnn", "ch": 32, "ch_mult": (1, 1), "attn_resolutions": (8,)})),
    "resnet": lambda: VQGAN(vqgan_config({"kind": "resnet", "dim": 8, "layers": 1})),
    "residual": lambda: VQGAN(
        vqgan_config({"kind": "resnet", "dim": 8, "layers": 1}, {"kind": "residual", "num_tokens": 12, "levels": 2})
    ),
}


def vqgan_config(network, quantizer=None):
    values = {"image_size": 16, "network": network, "quantizer": quantizer or {"kind": "vq", "num_tokens": 12}}
    return decode(VQGANConfig, values)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_convolutional_tokenizer_reads_images_of_other_shapes(kind, tmp_path):
    with scope(1, "weights"):
        square = FrozenImageTokenizer(NETWORKS[kind]())
    wide = square.resized((8, 24))
    reduction, levels = 16 // square.code_shape[0], square.code_shape[2:]
    assert wide.code_shape == (8 // reduction, 24 // reduction, *levels) and wide.num_tokens == square.num_tokens
    assert (wide.image_hw, wide.image_size, square.image_hw) == ((8, 24), 8, (16, 16))
    assert next(wide.codec.parameters()).data_ptr() == next(square.codec.parameters()).data_ptr()
    pixels = torch.randint(0, 256, (2, 3, 8, 24), generator=generator(0, "wide"), dtype=torch.uint8)
    codes = wide.encode(pixels)
    assert codes.shape[1:] == wide.code_shape and wide.decode(codes).shape == pixels.shape
    with pytest.raises(DataError, match="given to a tokenizer that takes"):
        square.encode(pixels)
    with pytest.raises(DataError, match="given to a tokenizer"):
        square.decode(codes)
    # The fingerprint says the size, the way back finds it, and a folder keeps it.
    assert len({square.fingerprint, wide.fingerprint, square.resized((24, 8)).fingerprint}) == 3
    assert square.matching(wide.fingerprint, wide.code_shape).fingerprint == wide.fingerprint
    assert square.matching("another", wide.code_shape) is square and square.resized((16, 16)) is square
    save_image_tokenizer(wide, tmp_path)
    loaded = load_image_tokenizer(tmp_path)
    assert loaded.fingerprint == wide.fingerprint and torch.equal(loaded.encode(pixels), codes)


@pytest.mark.parametrize("kind", ["dvae", "resnet", "residual"])
def test_another_square_is_what_a_network_made_for_it_would_be(kind, tmp_path):
    tokenizer = FrozenImageTokenizer(NETWORKS[kind]())
    save_image_tokenizer(tokenizer, tmp_path)
    made = load_image_tokenizer(tmp_path, image_size=8)
    assert tokenizer.fingerprint != made.fingerprint == tokenizer.resized((8, 8)).fingerprint
    assert tokenizer.matching(made.fingerprint, made.code_shape).image_hw == (8, 8)


def test_places_away_from_the_edge_do_not_know_the_shape():
    square, wide = FrozenImageTokenizer(codec()), FrozenImageTokenizer(codec()).resized((16, 48))
    pixels = torch.randint(0, 256, (1, 3, 16, 48), generator=generator(0, "wide"), dtype=torch.uint8)
    # Two convolutions of four with stride two: a code sees 10 pixels, 3 of them beyond its own.
    assert torch.equal(wide.encode(pixels)[:, :, 5:7], square.encode(pixels[..., 16:32])[:, :, 1:3])


def test_sizes_that_a_tokenizer_cannot_read_are_refused():
    with pytest.raises(ConfigError, match=r"images of 10x8: .* every 4 x 4 pixels; give multiples of 4"):
        FrozenImageTokenizer(codec()).resized((8, 10))
    vit = {"kind": "vit", "patch_size": 4, "dim": 16, "depth": 1, "heads": 2}
    tokenizer = FrozenImageTokenizer(VQGAN(vqgan_config(vit)))
    with pytest.raises(ConfigError, match=r"images of 24x8 .* of 16x16 only; take a convolutional one"):
        tokenizer.resized((8, 24))
    assert tokenizer.matching("another", (2, 6)) is tokenizer
