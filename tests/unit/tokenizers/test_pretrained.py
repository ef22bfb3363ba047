import importlib.util
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.rng import generator
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.image import ImageTokenizerConfig, import_image_tokenizer, load_image_tokenizer
from tokscale.tokenizers.pretrained.openai_dvae import OpenAIDiscreteVAEConfig
from tokscale.tokenizers.pretrained.quantizers import GumbelQuantizer, NearestQuantizer, ResidualQuantizer
from tokscale.tokenizers.pretrained.taming import TamingConfig, TamingVQGAN
from tokscale.tokenizers.quantize.base import nearest

ASSETS = Path(__file__).parents[2] / "assets"
REFERENCE = np.load(ASSETS / "reference/tokenizer_cases.npz")
SMALL = {
    "image_size": 16,
    "resolution": 16,
    "num_tokens": 20,
    "embed_dim": 4,
    "z_channels": 8,
    "ch": 32,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (8,),
}
CONFIGS = {
    "taming": TamingConfig(**SMALL),
    "gumbel": TamingConfig(quantizer="gumbel", **SMALL),
    "llamagen": TamingConfig(quantizer="cosine", **SMALL),
    "rqvae": TamingConfig(quantizer="residual", levels=3, **SMALL),
    "openai": OpenAIDiscreteVAEConfig(image_size=16, num_tokens=512, hidden_dim=64, codebook_dim=8, blocks=1),
}


def _generator_script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("tokenizer_reference", ASSETS / "make_tokenizer_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _generator_script()


def original_state(case: str) -> dict[str, torch.Tensor]:
    """Weights in the original's own key layout."""
    return SCRIPT.filled({name: tuple(shape) for name, shape in json.loads(str(REFERENCE[f"{case}/shapes"])).items()})


def pickled_by_a_missing_library(path: Path, value, *, lightning: bool = False) -> Path:
    """Save as a file that names classes which do not exist here."""
    library = types.ModuleType("vanished_library")
    callback = type("ModelCheckpoint", (), {"__module__": "vanished_library", "__init__": lambda self: None})
    library.ModelCheckpoint = callback
    sys.modules["vanished_library"] = library
    try:
        extras = {"callbacks": {callback: {"best": 0.1}}, "hyper": callback()} if lightning else {}
        torch.save(value | extras, path)
    finally:
        del sys.modules["vanished_library"]
    return path


def source_of(case: str, folder: Path) -> Path:
    """The checkpoint as its authors publish it."""
    state = original_state(case)
    match case:
        case "taming" | "gumbel":
            state["loss.discriminator.main.0.weight"] = torch.zeros(3)
            return pickled_by_a_missing_library(folder / "last.ckpt", {"state_dict": state}, lightning=True)
        case "llamagen":
            torch.save({"model": state, "steps": 3}, folder / "vq.pt")
            return folder / "vq.pt"
        case "rqvae":
            torch.save({"state_dict": state, "epoch": 10}, folder / "model.pt")
            return folder / "model.pt"
        case "openai":
            return save_pickled_modules(state, folder)


def save_pickled_modules(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """`encoder.pkl` and `decoder.pkl`: whole modules of classes that are gone when they are read."""
    library = types.ModuleType("dall_e_gone")
    library.Part = type("Part", (nn.Module,), {"__module__": "dall_e_gone"})
    sys.modules["dall_e_gone"] = library
    try:
        for part in ("encoder", "decoder"):
            root = library.Part()
            root.n_hid = 64
            for name, tensor in state.items():
                head, _, rest = name.partition(".")
                if head == part:
                    *path, leaf = rest.split(".")
                    module = root
                    for step in path:
                        if step not in module._modules:
                            module.add_module(step, library.Part())
                        module = module._modules[step]
                    setattr(module, leaf, nn.Parameter(tensor))
            torch.save(root, folder / f"{part}.pkl")
    finally:
        del sys.modules["dall_e_gone"]
    return folder


@pytest.mark.parametrize("case", CONFIGS)
def test_published_weights_give_the_ids_and_images_of_their_own_code(case, tmp_path):
    tokenizer = import_image_tokenizer(CONFIGS[case], source_of(case, tmp_path), tmp_path / "imported")
    expected = {key: torch.from_numpy(REFERENCE[f"{case}/{key}"]) for key in ("features", "ids", "decoded")}
    pixels = SCRIPT.images()
    with torch.no_grad():
        features = tokenizer.codec.features(pixels / 255)
        features = tokenizer.codec.to_logits(features) if case == "openai" else features
        rendered = tokenizer.codec.decode_to_unit_range(expected["ids"])
    torch.testing.assert_close(features, expected["features"], atol=1e-5, rtol=1e-5)
    assert torch.equal(tokenizer.encode(pixels), expected["ids"])
    decoded = expected["decoded"] if case == "openai" else (expected["decoded"] + 1) / 2
    torch.testing.assert_close(rendered.clamp(0, 1), decoded.clamp(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CONFIGS)
def test_an_imported_folder_loads_like_any_other(case, tmp_path):
    tokenizer = import_image_tokenizer(CONFIGS[case], source_of(case, tmp_path), tmp_path / "imported")
    loaded = load_image_tokenizer(tmp_path / "imported")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.config == CONFIGS[case]
    codes = loaded.encode(SCRIPT.images())
    assert codes.shape[1:] == loaded.code_shape
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_every_case_has_its_own_fingerprint(tmp_path):
    prints = set()
    for case, config in CONFIGS.items():
        (tmp_path / case).mkdir()
        folder = source_of(case, tmp_path / case)
        prints.add(import_image_tokenizer(config, folder, tmp_path / case / "imported").fingerprint)
    assert len(prints) == len(CONFIGS)


def test_gumbel_codes_are_the_same_every_time():
    with torch.random.fork_rng():
        quantizer = GumbelQuantizer(30, 4, features=6)
    features = torch.randn(2, 6, 5, 5, generator=generator(0, "features"))
    ids = [quantizer(features) for _ in range(3)]
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[0], quantizer.proj(features).argmax(dim=1))


def test_nearest_equals_all_distances_across_chunks(monkeypatch):
    monkeypatch.setattr("tokscale.tokenizers.quantize.base._ROWS", 7)
    rows, vectors = (torch.randn(n, 5, generator=generator(0, "rows", n)) for n in (40, 33))
    assert torch.equal(nearest(rows, vectors), torch.cdist(rows, vectors).argmin(dim=1))


def test_cosine_codes_ignore_lengths():
    with torch.random.fork_rng():
        quantizer = NearestQuantizer(30, 4, cosine=True)
    features = torch.randn(1, 4, 3, 3, generator=generator(0, "features"))
    ids = quantizer(features)
    with torch.no_grad():
        quantizer.codebook.weight.mul_(torch.linspace(0.1, 9, 30)[:, None])
    assert torch.equal(quantizer(5 * features), ids)
    torch.testing.assert_close(quantizer.lookup(ids).square().sum(dim=1), torch.ones(1, 3, 3))


def test_each_residual_level_brings_the_sum_nearer():
    with torch.random.fork_rng():
        quantizer = ResidualQuantizer(64, 4, 3, shared_codebook=False)
    features = torch.randn(2, 4, 5, 5, generator=generator(0, "features"))
    ids = quantizer(features)
    rest = features.movedim(1, -1)
    for level in range(3):
        expected = torch.cdist(rest.reshape(-1, 4), quantizer.codebooks[level].weight).argmin(dim=1)
        assert torch.equal(ids[..., level].flatten(), expected)
        rest = rest - quantizer.codebooks[level](ids[..., level])
    torch.testing.assert_close(features - quantizer.lookup(ids), rest.movedim(-1, 1))


def test_padding_row_of_the_residual_codebook_is_no_code(tmp_path):
    state = original_state("rqvae")
    assert len(state["quantizer.codebooks.0.weight"]) == 21
    tokenizer = import_image_tokenizer(CONFIGS["rqvae"], source_of("rqvae", tmp_path), tmp_path / "imported")
    assert tokenizer.codec.quantizer.codebooks[0].weight.shape == (20, 4)


def test_codebooks_that_differ_are_not_shared(tmp_path):
    state = original_state("rqvae")
    state["quantizer.codebooks.1.weight"] = state["quantizer.codebooks.1.weight"] + 1
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"set tokenizer\.shared_codebook=false"):
        import_image_tokenizer(CONFIGS["rqvae"], tmp_path / "model.pt", tmp_path / "imported")
    own = CONFIGS["rqvae"].model_copy(update={"shared_codebook": False})
    tokenizer = import_image_tokenizer(own, tmp_path / "model.pt", tmp_path / "imported")
    assert len(tokenizer.codec.quantizer.codebooks) == 3


def test_weights_of_another_network_are_refused_with_names(tmp_path):
    config = CONFIGS["taming"].model_copy(update={"num_tokens": 21})
    with pytest.raises(CheckpointError, match=r"quantizer.codebook.weight has shape \(20, 4\)"):
        import_image_tokenizer(config, source_of("taming", tmp_path), tmp_path / "imported")
    with pytest.raises(CheckpointError, match=r"missing quantizer.proj.bias"):
        import_image_tokenizer(CONFIGS["gumbel"], source_of("taming", tmp_path), tmp_path / "imported")
    state = {**original_state("taming"), "surprise.weight": torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown surprise.weight"):
        import_image_tokenizer(CONFIGS["taming"], tmp_path / "model.safetensors", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_missing_files_are_named_with_their_source(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.ckpt: no such file; download it first"):
        import_image_tokenizer(CONFIGS["taming"], tmp_path / "nowhere.ckpt", tmp_path / "imported")
    with pytest.raises(CheckpointError, match=r"cdn.openai.com/dall-e/encoder.pkl"):
        import_image_tokenizer(CONFIGS["openai"], tmp_path, tmp_path / "imported")


def test_nothing_that_a_checkpoint_names_is_run(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (shutil.copyfile, (str(tmp_path / "evil.ckpt"), str(tmp_path / "copied")))

    torch.save({"state_dict": original_state("taming"), "payload": Exploit()}, tmp_path / "evil.ckpt")
    import_image_tokenizer(CONFIGS["taming"], tmp_path / "evil.ckpt", tmp_path / "imported")
    assert not (tmp_path / "copied").exists()

    class SystemExploit:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    torch.save({"payload": SystemExploit()}, tmp_path / "worse.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read without running code"):
        import_image_tokenizer(CONFIGS["taming"], tmp_path / "worse.ckpt", tmp_path / "imported")
    assert not (tmp_path / "made").exists()


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"last.ckpt: cannot be read"):
        import_image_tokenizer(CONFIGS["taming"], tmp_path / "last.ckpt", tmp_path / "imported")
    (tmp_path / "last.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        import_image_tokenizer(CONFIGS["taming"], tmp_path / "last.safetensors", tmp_path / "imported")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        import_image_tokenizer(CONFIGS["taming"], tmp_path / "list.pt", tmp_path / "imported")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "must be multiples of 16"),
        ({"ch": 48}, "multiple of 32"),
        ({"levels": 4}, "needs quantizer=residual"),
        ({"quantizer": "gumble"}, "did you mean 'gumbel'"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        decode(ImageTokenizerConfig, {"kind": "taming"} | options)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (16, 16)),
        ({"ch_mult": (1, 1, 2, 4), "attn_resolutions": (32,), "quantizer": "gumbel", "num_tokens": 8192}, (32, 32)),
        (
            {"ch_mult": (1, 1, 2, 2, 4, 4), "attn_resolutions": (8,), "quantizer": "residual", "levels": 4},
            (8, 8, 4),
        ),
    ],
)
def test_published_sizes_build(options, shape):
    with torch.device("meta"):
        codec = TamingVQGAN(TamingConfig(**options))
    assert codec.code_shape == shape
    assert not codec.encoder.down[0].attn
    assert codec.encoder.down[-1].attn


def test_quantizer_stays_fp32_when_the_convolutions_do_not(tmp_path):
    import_image_tokenizer(CONFIGS["taming"], source_of("taming", tmp_path), tmp_path / "imported")
    tokenizer = load_image_tokenizer(tmp_path / "imported", precision="bf16")
    assert isinstance(tokenizer, FrozenImageTokenizer)
    seen = []
    tokenizer.codec.encoder.conv_out.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    tokenizer.codec.quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    tokenizer.encode(SCRIPT.images())
    assert seen == [torch.bfloat16, torch.float32]
