"""The import stage: checkpoints in the originals' layout become exports that compute what the originals computed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_encoders import save_t5
from tokenizers import Tokenizer, models, pre_tokenizers

import tokscale
from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK
from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.dist.env import ProcessEnv
from tokscale.stages import import_weights
from tokscale.stages.import_weights import ImportConfig
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import SubwordTokenizer, TextTokenizerConfig, save_text_tokenizer

REFERENCE = Path(__file__).parents[2] / "assets" / "reference"
CASES, WEIGHTS = np.load(REFERENCE / "dalle_cases.npz"), np.load(REFERENCE / "dalle_weights.npz")
LISTING = json.loads(str(CASES["listing"]))
CLIP = np.load(REFERENCE / "clip_case.npz")
CLIP_LISTING = json.loads(str(CLIP["listing"]))
MUSE, MUSE_WEIGHTS = np.load(REFERENCE / "maskgit_cases.npz"), np.load(REFERENCE / "maskgit_weights.npz")
MUSE_VAE = np.load(REFERENCE / "muse_vae.npz")
MUSE_NAMES = json.loads(str(MUSE["listing"]))["names"]
WORDS = LISTING["full"]["hparams"]["num_text_tokens"]
VAE = {"image_size": 8, "num_layers": 1, "num_tokens": 24, "codebook_dim": 4, "hidden_dim": 4}


def words(folder: Path, *, padded: bool, count: int = WORDS) -> Path:
    """A tokenizer of `count` ids, the first of which is padding or a word."""
    names = ["[PAD]" if padded else "zero", *(f"w{number}" for number in range(1, count))]
    tables = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=names[1]))
    tables.pre_tokenizer = pre_tokenizers.Whitespace()
    config = TextTokenizerConfig(kind="hf", id_shift=0 if padded else 1)
    save_text_tokenizer(SubwordTokenizer(tables, config), folder)
    return folder


def vae_state(options: dict[str, Any] = VAE) -> dict[str, torch.Tensor]:
    """A discrete VAE under the original's names: there the logits are the encoder's last layer."""
    from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
    from tokscale.tokenizers.dvae.model import DiscreteVAE

    state = DiscreteVAE(decode(DiscreteVAEConfig, options)).state_dict()
    return {name.replace("to_logits.", f"encoder.{options['num_layers']}."): value for name, value in state.items()}


def dalle_checkpoint(case: str = "full", **changes: Any) -> dict[str, Any]:
    """What the original's training script saves."""
    names = LISTING[case]["names"]
    weights = {name: torch.from_numpy(WEIGHTS[key].astype(np.float32)) for name, key in names.items()}
    return {
        "hparams": LISTING[case]["hparams"],
        "vae_params": VAE,
        "epoch": 3,
        "version": "1.6.6",
        "vae_class_name": "DiscreteVAE",
        "weights": weights | {f"vae.{name}": value for name, value in vae_state().items()},
        "opt_state": {"state": {0: {"step": 7}}, "param_groups": []},
        "scheduler_state": None,
    } | changes


def run(tmp_path: Path, values: Any, **options: Any) -> Any:
    torch.save(values, tmp_path / "given.pt")
    keys = {"source": "dalle_pytorch", "checkpoint": tmp_path / "given.pt", "out": tmp_path / "out"}
    return import_weights.run(decode(ImportConfig, keys | options), ProcessEnv())


@pytest.mark.parametrize("case", ["full", "tied", "learned_positions", "reversible_shared_tied"])
def test_logits_of_an_imported_dalle_equal_the_original(tmp_path, case):
    result = run(tmp_path, dalle_checkpoint(case), text_tokenizer=words(tmp_path / "words", padded=True))
    loaded = tokscale.load(result.outputs["export"])
    text, codes = (torch.from_numpy(CASES[f"{case}/{name}"]) for name in ("text", "codes"))
    wanted = torch.from_numpy(CASES[f"{case}/logits"])
    torch.testing.assert_close(loaded.model.logits(text, codes), wanted, rtol=1e-5, atol=1e-5)
    assert loaded.image_tokenizer.code_shape == (4, 4) and loaded.text_tokenizer.num_tokens == WORDS
    images = loaded.sample(["w3 w4"], temperature=0)
    assert images.shape == (1, 3, 8, 8)
    assert run(tmp_path, torch.load(tmp_path / "given.pt"), text_tokenizer=tmp_path / "words").skipped


@pytest.mark.parametrize("case", ["full", "tied"])
def test_a_tokenizer_with_a_padding_id_of_its_own_gets_the_same_images_part(tmp_path, case):
    given = words(tmp_path / "words", padded=False)
    loaded = tokscale.load(run(tmp_path, dalle_checkpoint(case), text_tokenizer=given).outputs["export"])
    assert loaded.text_tokenizer.num_tokens == WORDS + 1 == loaded.config.num_text_tokens
    text, codes = (torch.from_numpy(CASES[f"{case}/{name}"]) for name in ("text", "codes"))
    shifted = torch.where(text > 0, text + 1, 0)  # what the new tokenizer gives for the same words
    logits, wanted = loaded.model.logits(shifted, codes), torch.from_numpy(CASES[f"{case}/logits"])
    torch.testing.assert_close(logits[:, :, 1:], wanted, rtol=1e-5, atol=1e-5)
    length = loaded.config.text_seq_len
    assert (logits[:, :length].softmax(-1)[..., 0] == 0).all(), "nothing is left for the id that stands for nothing"


def test_a_vae_alone_becomes_an_image_tokenizer(tmp_path):
    result = run(tmp_path, {"hparams": VAE, "weights": vae_state()})
    tokenizer = load_image_tokenizer(result.outputs["image_tokenizer"])
    assert tokenizer.code_shape == (4, 4) and tokenizer.num_tokens == 24
    assert "8 pixels as 4x4 codes of 24" in result.summary


def test_a_clip_state_dict_becomes_a_scorer(tmp_path):
    names = CLIP_LISTING["names"]
    state = {name: torch.from_numpy(np.asarray(CLIP[f"weight/{key}"], np.float32)) for name, key in names.items()}
    count = CLIP_LISTING["hparams"]["num_text_tokens"]
    given = words(tmp_path / "words", padded=True, count=count)
    loaded = tokscale.load(run(tmp_path, state, text_tokenizer=given).outputs["export"])
    text, pixels = torch.from_numpy(CLIP["text"]), torch.from_numpy(CLIP["pixels"])
    scores = loaded.model.score(text, text != 0, pixels)
    torch.testing.assert_close(scores, torch.from_numpy(CLIP["similarity"]), rtol=1e-5, atol=1e-5)
    assert loaded.score(["w1 w2", "w3"], pixels[:2]).shape == (2,)
    shifted = words(tmp_path / "shifted", padded=False, count=count)
    again = tokscale.load(run(tmp_path, state, text_tokenizer=shifted, out=tmp_path / "again").outputs["export"])
    moved = torch.where(text > 0, text + 1, 0)
    torch.testing.assert_close(again.model.score(moved, text != 0, pixels), scores)


def muse_state(case: str) -> dict[str, torch.Tensor]:
    """What `MaskGit.save` of the original writes."""
    stored = {key.partition("@")[0]: MUSE_WEIGHTS[key] for key in MUSE_NAMES[case]}
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in stored.items()}
    return state | {"vae.codebook": torch.zeros(2), "cond_vae.codebook": torch.zeros(2)}


@pytest.fixture
def codes_of_24(tmp_path) -> Path:
    return run(tmp_path, {"hparams": VAE, "weights": vae_state()}, out=tmp_path / "vae").outputs["image_tokenizer"]


@pytest.mark.parametrize("case", ["plain", "token_critic", "self_critic"])
def test_logits_of_an_imported_maskgit_equal_the_original(tmp_path, codes_of_24, case):
    keys: dict[str, Any] = {
        "source": "muse_maskgit",
        "image_tokenizer": codes_of_24,
        "text_encoder": save_t5(tmp_path / "t5", width=20),
        "hparams": {"self_cond": case == "self_critic", "critic_loss_weight": 0.5},
    }
    result = run(tmp_path, muse_state(case), **keys)
    assert run(tmp_path, torch.load(tmp_path / "given.pt"), **keys).skipped
    loaded = tokscale.load(result.outputs["export"])
    states, ids = torch.from_numpy(MUSE["text"]).float(), torch.from_numpy(MUSE["logits/ids"])
    told = {TEXT_EMBEDS: states, TEXT_EMBEDS_MASK: (states != 0).any(-1)}
    none, net = torch.zeros(len(ids), 0, dtype=torch.int64), loaded.model.transformer
    context = net.context(loaded.model.reader(none, none.bool(), told))
    embed = torch.from_numpy(MUSE["logits/embed"]).float() if case == "self_critic" else None
    wanted = torch.from_numpy(MUSE["logits/self_cond" if case == "self_critic" else "logits/told"]).float()
    torch.testing.assert_close(net.to_logits(net(ids, context, embed)), wanted, rtol=1e-4, atol=2e-5)
    critics = {"plain": (False, None), "token_critic": (False, 24), "self_critic": (True, None)}
    separate = loaded.config.token_critic
    assert (loaded.config.self_token_critic, separate and separate.dim) == critics[case]
    assert loaded.config.critic_loss_weight == 0.5
    assert loaded.sample(["a red circle"], timesteps=2).shape == (1, 3, 8, 8)


def muse_vae(case: str) -> dict[str, torch.Tensor]:
    """A `VQGanVAE` of the original; with an entry of the discriminator, which has no place here."""
    prefix = f"{case}/state/"
    state = {name.removeprefix(prefix): MUSE_VAE[name] for name in MUSE_VAE.files if name.startswith(prefix)}
    found = {name: torch.from_numpy(value) for name, value in state.items()}
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()} | {"discr.x": torch.ones(1)}


@pytest.mark.parametrize("case", ["default", "blocks", "no_projection"])
def test_a_muse_vqganvae_computes_what_the_original_computes(tmp_path, case):
    pixels, ids, wanted = (torch.from_numpy(MUSE_VAE[f"{case}/{name}"]) for name in ("pixels", "ids", "decoded"))
    groups = json.loads(str(MUSE_VAE["cases"]))[case].get("encdec_resnet_groups", 16)
    hparams = {"image_size": pixels.shape[-1], "resnet_groups": groups}
    result = run(tmp_path, muse_vae(case), source="muse_maskgit", hparams=hparams)
    assert result.metrics["largest_difference"] == 0
    loaded = load_image_tokenizer(result.outputs["image_tokenizer"])
    assert loaded.encode(pixels).equal(ids)
    with torch.no_grad():
        torch.testing.assert_close(loaded.codec.decode_to_unit_range(ids), wanted, rtol=0, atol=1e-5)


def test_a_maskgit_brings_its_own_vqganvae(tmp_path):
    vae = {f"vae.{name}": tensor for name, tensor in muse_vae("blocks").items()}
    state = {name: tensor for name, tensor in muse_state("plain").items() if not name.startswith("vae.")} | vae
    state = {
        name: tensor[:16] if name.endswith("to_logits.weight") else tensor[[*range(16), -1]]
        if name.endswith("token_emb.weight") else tensor
        for name, tensor in state.items()
    }  # fmt: skip
    keys: dict[str, Any] = {"source": "muse_maskgit", "text_encoder": save_t5(tmp_path / "t5", width=20)}
    with pytest.raises(ConfigError, match=r"hparams\.vae: got 3"):
        run(tmp_path, state, hparams={"vae": 3}, **keys)
    result = run(tmp_path, state, hparams={"vae": {"resnet_groups": 4}}, **keys)
    assert result.metrics["largest_difference"] < 1e-6 and "differs by" in result.summary
    loaded = tokscale.load(result.outputs["export"])
    own = torch.from_numpy(MUSE_VAE["blocks/ids"])[:, :4, :4]
    assert loaded.image_tokenizer.code_shape == (4, 4) and loaded.image_tokenizer.image_size == 16
    assert loaded.image_tokenizer.encode(torch.from_numpy(MUSE_VAE["blocks/pixels"])).equal(own)
    assert loaded.sample(["a red circle"], timesteps=2).shape == (1, 1, 16, 16)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda s: s.pop("quantizer.mask"), "no LFQ quantizer"),
        (lambda s: s.update({"quantizer.mask": s["quantizer.mask"].flip(0)}), "quantizer.mask: the values"),
        (lambda s: s.update({"quantizer.orthogonal_rot": torch.eye(6)}), "orthogonal_rot: nothing here takes"),
        (lambda s: s.update({"enc_dec.encoders.0.weight": torch.zeros(16, 3, 3, 3)}), "first_conv_kernel_size=3"),
        (
            lambda s: s.update({"quantizer.project_in.weight": torch.zeros(12, 16)}),
            "num_codebooks=2: one code for a place",
        ),
    ],
)
def test_what_of_a_vqganvae_cannot_be_carried_over_is_named(tmp_path, change, answer):
    state = muse_vae("default")
    change(state)
    with pytest.raises(ConfigError, match=answer):
        run(tmp_path, state, source="muse_maskgit", hparams={"image_size": 16})


def test_an_option_of_a_vqganvae_that_is_unknown_here_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"hparams\.layres: unknown key"):
        run(tmp_path, muse_vae("default"), source="muse_maskgit", hparams={"layres": 2})


def test_a_generator_and_its_critic_may_be_saved_apart(tmp_path, codes_of_24):
    state = muse_state("token_critic")
    parts = {
        owner: {name.removeprefix(f"{owner}."): tensor for name, tensor in state.items() if name.startswith(owner)}
        for owner in ("transformer", "token_critic")
    }
    keys = {"source": "muse_maskgit", "image_tokenizer": codes_of_24}
    given = {"whole": state, "apart": parts, "alone": parts["transformer"]}
    text_encoder = save_t5(tmp_path / "t5", width=20)
    whole, apart, alone = (
        tokscale.load(run(tmp_path, values, out=tmp_path / name, **keys).outputs["export"], text_encoder=text_encoder)
        for name, values in given.items()
    )
    weights = whole.model.state_dict()
    assert weights.keys() == apart.model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in apart.model.state_dict().items())
    assert all(torch.equal(weights[name], tensor) for name, tensor in alone.model.state_dict().items())
    assert alone.model.token_critic is None and whole.model.token_critic is not None
    with pytest.raises(CheckpointError, match="A TokenCritic comes with the generator"):
        run(tmp_path, parts["token_critic"], **keys)


def test_what_a_maskgit_lacks_or_does_not_fit_is_named(tmp_path, codes_of_24):
    keys: dict[str, Any] = {"source": "muse_maskgit"}
    with pytest.raises(ConfigError, match="image_tokenizer: the checkpoint holds no VQGanVAE: its image tokenizer"):
        run(tmp_path, muse_state("plain"), **keys)
    keys["image_tokenizer"] = codes_of_24
    with pytest.raises(ConfigError, match=r"model\.condition\.width: got 20, but the text encoder has 16"):
        run(tmp_path, muse_state("plain"), text_encoder=save_t5(tmp_path / "t5", width=16), **keys)
    other = {"hparams": VAE | {"image_size": 16}, "weights": vae_state()}
    keys["image_tokenizer"] = run(tmp_path, other, out=tmp_path / "larger").outputs["image_tokenizer"]
    with pytest.raises(ConfigError, match="16 places, which are no grid of 8 x 8"):
        run(tmp_path, muse_state("plain"), **keys)


def test_what_cannot_be_carried_over_is_named(tmp_path):
    given = words(tmp_path / "words", padded=True)
    hparams = LISTING["full"]["hparams"]
    with pytest.raises(ConfigError, match="'sparse' drew its blocks at random"):
        run(tmp_path, dalle_checkpoint(hparams=hparams | {"attn_types": ("sparse",)}), text_tokenizer=given)
    with pytest.raises(ConfigError, match=r"hparams\.mixture_of_experts"):
        run(tmp_path, dalle_checkpoint(hparams=hparams | {"mixture_of_experts": 4}), text_tokenizer=given)
    with pytest.raises(ConfigError, match="'sparse' drew"):
        run(tmp_path, dalle_checkpoint(), text_tokenizer=given, hparams={"attn_types": ["sparse"]})


def test_a_missing_tokenizer_is_asked_for_and_a_wrong_one_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"give its folder\. dalle-pytorch's default is CLIP's vocabulary"):
        run(tmp_path, dalle_checkpoint())
    with pytest.raises(ConfigError, match=f"has {WORDS + 1} ids, the checkpoint knows {WORDS}"):
        run(tmp_path, dalle_checkpoint(), text_tokenizer=words(tmp_path / "more", padded=True, count=WORDS + 1))
    foreign = dalle_checkpoint(vae_params=None, vae_class_name="VQGanVAE")
    with pytest.raises(ConfigError, match="image tokenizer is a VQGanVAE that the checkpoint does not describe"):
        run(tmp_path, foreign, text_tokenizer=words(tmp_path / "words", padded=True))


def test_a_model_with_another_image_tokenizer_takes_its_folder(tmp_path):
    folder = run(tmp_path, {"hparams": VAE, "weights": vae_state()}, out=tmp_path / "vae").outputs["image_tokenizer"]
    foreign = dalle_checkpoint(vae_params=None, vae_class_name="VQGanVAE")
    given = words(tmp_path / "words", padded=True)
    loaded = tokscale.load(run(tmp_path, foreign, text_tokenizer=given, image_tokenizer=folder).outputs["export"])
    assert loaded.image_tokenizer.fingerprint == load_image_tokenizer(folder).fingerprint


def test_files_that_are_no_checkpoint_of_the_source_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a DALLE, a DiscreteVAE nor a CLIP"):
        run(tmp_path, {"weights": {"layer.weight": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match=r"consolidate them there with zero_to_fp32\.py"):
        run(tmp_path, {"hparams": {}, "weights": "saved by DeepSpeed"})
    with pytest.raises(CheckpointError, match="no such file"):
        import_weights.run(
            ImportConfig(source="dalle_pytorch", checkpoint=tmp_path / "none.pt", out=tmp_path / "out"), ProcessEnv()
        )


class Payload:
    """Runs a command when it is unpickled the usual way."""

    def __reduce__(self):
        return (open, ("/tmp/tokscale-was-here", "w"))


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    Path("/tmp/tokscale-was-here").unlink(missing_ok=True)
    given = words(tmp_path / "words", padded=True)
    run(tmp_path, dalle_checkpoint() | {"extra": Payload()}, text_tokenizer=given)
    assert not Path("/tmp/tokscale-was-here").exists()


def test_sources_are_checked_before_anything_is_read(tmp_path):
    keys = {"checkpoint": tmp_path / "x.pt", "out": tmp_path / "out"}
    with pytest.raises(ConfigError, match="source=dalle: not one of dalle_pytorch"):
        decode(ImportConfig, keys | {"source": "dalle"})
    with pytest.raises(ConfigError, match="tokenizer= goes with source=image_tokenizer"):
        decode(ImportConfig, keys | {"source": "image_tokenizer"})


def test_published_image_tokenizers_come_in_by_their_configuration(tmp_path, monkeypatch):
    asked = []

    def imported(config: Any, source: Path, folder: Path) -> None:
        asked.append((config.kind, source))
        run(tmp_path, {"hparams": VAE, "weights": vae_state()}, out=folder)

    monkeypatch.setattr(import_weights, "import_image_tokenizer", imported)
    keys = {"source": "image_tokenizer", "checkpoint": tmp_path / "vqgan.ckpt", "out": tmp_path / "tokenizer"}
    config = decode(ImportConfig, keys | {"tokenizer": {"kind": "taming", "num_tokens": 1024}})
    result = import_weights.run(config, ProcessEnv())
    assert asked == [("taming", tmp_path / "vqgan.ckpt")] and "taming of vqgan.ckpt" in result.summary
    with pytest.raises(ConfigError, match="already holds another tokenizer"):
        import_weights.run(config, ProcessEnv())
