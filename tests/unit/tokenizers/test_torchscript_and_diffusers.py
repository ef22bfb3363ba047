import json
import sys

import pytest
import torch
from torch import nn

from tokscale.base.errors import CheckpointError, ConfigError, DataError, EnvironmentRefused
from tokscale.base.rng import generator, scope
from tokscale.base.trust import allow_torchscript
from tokscale.cli import main
from tokscale.evaluation.quality import quality
from tokscale.tokenizers.image import import_image_tokenizer, load_image_tokenizer
from tokscale.tokenizers.pretrained.diffusers_vq import DiffusersVQ, DiffusersVQConfig
from tokscale.tokenizers.pretrained.torchscript import TorchScriptConfig

CONFIG = TorchScriptConfig(image_size=16, reduction=8, num_tokens=64, dtype="float32")


class Encode(nn.Module):
    """Mean brightness of each 8 x 8 patch as one of 64 ids, and something else beside it, as Cosmos does."""

    def __init__(self, offset: int = 0):
        super().__init__()
        self.offset = offset

    def forward(self, x: torch.Tensor):
        mean = nn.functional.avg_pool2d(x.mean(dim=1), 8)
        ids = ((mean + 1) * 31.5).round().to(torch.int32) + self.offset
        return ids, mean


class Decode(nn.Module):
    def forward(self, ids: torch.Tensor):
        mean = ids.to(torch.float32) / 31.5 - 1
        return mean[:, None].repeat(1, 3, 1, 1).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def programs(folder, offset=0):
    folder.mkdir(exist_ok=True)
    torch.jit.save(torch.jit.script(Encode(offset)), str(folder / "encoder.jit"))
    torch.jit.save(torch.jit.script(Decode()), str(folder / "decoder.jit"))
    return folder


@pytest.fixture
def trusted():
    with allow_torchscript():
        yield


@pytest.fixture
def patches():
    levels = torch.tensor([[[0, 255], [85, 170]]], dtype=torch.uint8)
    return levels[:, None].repeat(1, 3, 1, 1).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_a_torchscript_pair_is_a_tokenizer(tmp_path, patches, trusted):
    tokenizer = import_image_tokenizer(CONFIG, programs(tmp_path / "source"), tmp_path / "imported")
    assert tokenizer.encode(patches).tolist() == [[[0, 63], [21, 42]]]
    assert torch.equal(tokenizer.decode(tokenizer.encode(patches)), patches)
    loaded = load_image_tokenizer(tmp_path / "imported")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert torch.equal(loaded.encode(patches), tokenizer.encode(patches))
    assert sorted(path.name for path in (tmp_path / "imported").iterdir()) == [
        "config.json",
        "decoder.jit",
        "encoder.jit",
    ]


def test_a_torchscript_pair_that_does_not_fit_its_configuration_is_refused(tmp_path, patches, trusted):
    shifted = import_image_tokenizer(CONFIG, programs(tmp_path / "shifted", offset=1), tmp_path / "a")
    with pytest.raises(DataError, match="ids from 1 to 64, outside num_tokens=64"):
        shifted.encode(patches)
    config = CONFIG.model_copy(update={"reduction": 4})
    coarse = import_image_tokenizer(config, programs(tmp_path / "coarse"), tmp_path / "b")
    with pytest.raises(DataError, match="set image_size and reduction"):
        coarse.encode(patches)
    with pytest.raises(CheckpointError, match=r"encoder\.jit: no such file; put encoder\.jit and decoder\.jit"):
        import_image_tokenizer(CONFIG, tmp_path, tmp_path / "c")
    (tmp_path / "coarse/decoder.jit").write_bytes(b"no program")
    with pytest.raises(CheckpointError, match="not a TorchScript program"):
        import_image_tokenizer(CONFIG, tmp_path / "coarse", tmp_path / "c")


def test_a_program_is_refused_until_the_user_allows_it(tmp_path, patches):
    source = programs(tmp_path / "source")
    with allow_torchscript():
        import_image_tokenizer(CONFIG, source, tmp_path / "imported")
    for untrusted in (
        lambda: import_image_tokenizer(CONFIG, source, tmp_path / "again"),
        lambda: load_image_tokenizer(tmp_path / "imported"),
        lambda: quality(patches, patches, source / "encoder.jit"),
    ):
        with pytest.raises(ConfigError, match=r"allow_torchscript: .*encoder\.jit is a TorchScript program"):
            untrusted()
    described = json.loads((tmp_path / "imported/config.json").read_text())
    (tmp_path / "imported/config.json").write_text(json.dumps(described | {"allow_torchscript": True}))
    with pytest.raises(DataError, match="allow_torchscript: unknown key"):
        load_image_tokenizer(tmp_path / "imported")  # a folder cannot trust itself


def test_the_key_of_a_stage_allows_programs_for_that_stage_alone(tmp_path, capsys):
    source = programs(tmp_path / "source")
    words = ["import", "source=image_tokenizer", f"checkpoint={source}", f"out={tmp_path / 'out'}"]
    words += [f"tokenizer.{key}={value}" for key, value in CONFIG.model_dump(exclude_defaults=True).items()]
    words += ["tokenizer.kind=torchscript"]
    assert main(words) == 64 and "set allow_torchscript=true" in capsys.readouterr().err
    assert main([*words, "allow_torchscript=true"]) == 0
    assert main(words) == 64


def random_images():
    return torch.randint(0, 256, (2, 3, 16, 16), generator=generator(0, "pictures"), dtype=torch.uint8)


@pytest.fixture
def diffusers_folder(tmp_path):
    vq_model = pytest.importorskip("diffusers.models.autoencoders.vq_model")
    with scope(0, "weights"):
        model = vq_model.VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            num_vq_embeddings=20,
            norm_num_groups=4,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )
    with torch.no_grad():  # codes that are met: features of the images below
        features = model.encode(random_images() / 255).latents.movedim(1, -1).reshape(-1, 4)
        model.quantize.embedding.weight.copy_(features[::6][:20])
    model.save_pretrained(tmp_path / "vqvae")
    return tmp_path / "vqvae", model.eval()


def test_a_diffusers_model_gives_its_own_ids_and_images(diffusers_folder, tmp_path):
    folder, model = diffusers_folder
    tokenizer = import_image_tokenizer(DiffusersVQConfig(image_size=16), folder, tmp_path / "imported")
    assert (tokenizer.num_tokens, tokenizer.code_shape) == (20, (8, 8))
    pixels = random_images()
    with torch.no_grad():
        expected = model.quantize(model.encode(pixels / 255).latents)[2][2].reshape(2, 8, 8)
        decoded = model.decode(expected, force_not_quantize=True, shape=(2, 8, 8, 4)).sample
    ids = tokenizer.encode(pixels)
    assert torch.equal(ids, expected)
    assert len(ids.unique()) == 20
    torch.testing.assert_close(tokenizer.codec.decode_to_unit_range(ids), decoded, atol=1e-5, rtol=1e-5)
    loaded = load_image_tokenizer(tmp_path / "imported")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert torch.equal(loaded.encode(pixels), ids)


def test_diffusers_folders_that_do_not_fit_are_refused(diffusers_folder, tmp_path):
    folder, _ = diffusers_folder
    with pytest.raises(CheckpointError, match="image_size: got 17; this network needs a multiple of 2"):
        import_image_tokenizer(DiffusersVQConfig(image_size=17), folder, tmp_path / "imported")
    with pytest.raises(CheckpointError, match=r"needs config\.json and diffusion_pytorch_model"):
        import_image_tokenizer(DiffusersVQConfig(), tmp_path, tmp_path / "imported")
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | {"num_vq_embeddings": 21}))
    with pytest.raises(CheckpointError, match=r"model\.quantize\.embedding\.weight has shape \(20, 4\)"):
        import_image_tokenizer(DiffusersVQConfig(image_size=16), folder, tmp_path / "imported")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.vq_model", None)
    with pytest.raises(EnvironmentRefused, match=r"pip install 'tokscale\[diffusers\]'"):
        DiffusersVQ(DiffusersVQConfig())
