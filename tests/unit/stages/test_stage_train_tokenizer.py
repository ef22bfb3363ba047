"""The train-tokenizer stage on a few drawn images: both tokenizers come out, whole, and only once."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError, ConfigError, DataError
from tokscale.base.trust import allow_torchscript
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.store import CheckpointStore
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.dist.env import ProcessEnv
from tokscale.dist.slurm import NodesRefusedError
from tokscale.evaluation.distances import kernel_distance
from tokscale.evaluation.measures import load_eval_pairs
from tokscale.evaluation.quality import reconstructed
from tokscale.runs.run_folder import RunConfigMismatchError
from tokscale.stages import prepare, tokenize, train_tokenizer
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer
from tokscale.tokenizers.vqgan import model
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.train.metrics import read_metrics
from tokscale.train.watchdog import FOLDER as HEARTBEATS
from tokscale.train.watchdog import read_heartbeats

ALONE = ProcessEnv()
TINY = {"kind": "dvae", "image_size": 16, "num_layers": 2, "num_tokens": 16, "codebook_dim": 8, "hidden_dim": 8}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    values = {"data_dir": folder, "source": {"kind": "shapes", "count": 48}, "shard_samples": 24, "preview": 0}
    prepare.run(decode(prepare.PrepareConfig, values), ALONE)
    return folder


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory) -> Path:
    """A run folder after twelve steps in one go."""
    run_dir = tmp_path_factory.mktemp("trained")
    train_tokenizer.run(config(data_dir, run_dir), ALONE)
    return run_dir


def config(data_dir: Path, run_dir: Path, **values: Any) -> train_tokenizer.TrainTokenizerConfig:
    return decode(
        train_tokenizer.TrainTokenizerConfig,
        {
            "run_dir": run_dir,
            "data_dir": data_dir,
            "tokenizer": TINY,
            "text": {"vocab_size": 290},
            "optim": {"lr": 1e-2, "weight_decay": 0.0},
            "loop": {"total_steps": 12, "log_every": 1},
            "checkpoint": {"every_steps": 5},
            "batch_size": 8,
        }
        | values,
    )


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / train_tokenizer.FOLDER)]


def test_both_tokenizers_come_out(data_dir, tmp_path, trained):
    result = train_tokenizer.run(config(data_dir, tmp_path), ALONE)
    assert losses(tmp_path) == losses(trained) and losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]
    image, text = load_image_tokenizer(tmp_path / "image_tokenizer"), load_text_tokenizer(tmp_path / "text_tokenizer")
    assert image.num_tokens == 16 and image.code_shape == (4, 4) and 257 < text.num_tokens <= 290
    assert image.fingerprint == load_image_tokenizer(trained / "image_tokenizer").fingerprint
    assert result.outputs["image_tokenizer"] == tmp_path / "image_tokenizer"
    assert result.metrics["codes_used"] >= 1 and result.metrics["images_per_second"] > 0
    assert "codebook_perplexity" in read_metrics(tmp_path / train_tokenizer.FOLDER)[-1]
    assert (tmp_path / train_tokenizer.FOLDER / "samples/reconstructions.png").exists()
    assert result.next_command.startswith("tokscale tokenize ")


def test_what_was_trained_is_what_comes_out(data_dir, trained):
    image = load_image_tokenizer(trained / "image_tokenizer")
    store = trained / train_tokenizer.FOLDER / "checkpoints" / "step_000000012"
    with Checkpoint(store).source("tokenizer") as source:
        for name, parameter in image.codec.named_parameters():
            assert torch.equal(source.read(name, "weight", 0, parameter.numel()), parameter.flatten()), name


class Means(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=3).flatten(1)


def test_the_rkid_while_it_trains_is_that_of_the_tokenizer_it_has_become(data_dir, tmp_path):
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    looks = {"every_steps": 2, "images": 48, "features": str(tmp_path / "means.pt")}
    keys = {"data": {"held_out": {"path": data_dir / "raw"}}, "loop": {"total_steps": 4, "log_every": 1}}
    asked = config(data_dir, tmp_path / "run", reconstructions=looks, **keys)
    with allow_torchscript():
        train_tokenizer.run(asked, ALONE)
    rows = [row for row in read_metrics(tmp_path / "run" / train_tokenizer.FOLDER) if "reconstruction/rkid" in row]
    assert [row["step"] for row in rows] == [2, 4]
    _, images = load_eval_pairs(data_dir / "raw", 16)
    _, rebuilt = reconstructed(load_image_tokenizer(tmp_path / "run/image_tokenizer"), images)
    expected = kernel_distance(Means()(images), Means()(rebuilt))
    assert rows[1]["reconstruction/rkid"] == pytest.approx(expected.value, rel=1e-5)
    assert rows[1]["reconstruction/rkid_error"] == pytest.approx(expected.error, rel=1e-5)
    few = {"data": {"held_out": {"share": 0.3}}}
    with pytest.raises(ConfigError, match="are held out, and an rKID needs 40"):
        train_tokenizer.run(config(data_dir, tmp_path / "few", reconstructions=looks, **few), ALONE)
    with pytest.raises(ConfigError, match="images=39: an rKID needs 40"):
        config(data_dir, tmp_path / "few", reconstructions=looks | {"images": 39})


def test_an_interrupted_run_goes_on_to_the_same_tokenizer(data_dir, tmp_path, trained):
    class PowerCutError(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        real = CheckpointStore.poll

        def poll(store: CheckpointStore):
            if len(losses(tmp_path)) == 7:
                raise PowerCutError
            return real(store)

        patch.setattr(CheckpointStore, "poll", poll)
        with pytest.raises(PowerCutError):
            train_tokenizer.run(config(data_dir, tmp_path), ALONE)
    assert not (tmp_path / "image_tokenizer").exists()
    train_tokenizer.run(config(data_dir, tmp_path), ALONE)
    fingerprints = {load_image_tokenizer(folder / "image_tokenizer").fingerprint for folder in (tmp_path, trained)}
    assert len(fingerprints) == 1


def test_what_is_done_is_recognised_and_what_is_missing_is_made(data_dir, trained, tmp_path, monkeypatch):
    (trained / "text_tokenizer/config.json").unlink()
    assert not train_tokenizer.run(config(data_dir, trained), ALONE).skipped
    assert (trained / "text_tokenizer/config.json").exists() and len(losses(trained)) == 12
    monkeypatch.setattr(train_tokenizer, "locked_run_dir", None)
    assert train_tokenizer.run(config(data_dir, trained), ALONE).skipped
    with pytest.raises(RunConfigMismatchError, match=r"tokenizer\.hidden_dim is 8 there and 9 here"):
        train_tokenizer.run(config(data_dir, trained, tokenizer=TINY | {"hidden_dim": 9}), ALONE)


def test_a_text_tokenizer_alone(data_dir, tmp_path):
    result = train_tokenizer.run(config(data_dir, tmp_path, tokenizer={"kind": "bpe", "vocab_size": 280}), ALONE)
    assert load_text_tokenizer(tmp_path / "text_tokenizer").num_tokens <= 280
    assert not (tmp_path / "image_tokenizer").exists() and "text ids" in result.summary


def test_a_text_tokenizer_of_other_options_is_not_taken_for_the_one_asked_for(data_dir, tmp_path):
    train_tokenizer.run(config(data_dir, tmp_path, tokenizer={"kind": "bpe", "vocab_size": 280}), ALONE)
    with pytest.raises(RunConfigMismatchError, match=r"tokenizer\.vocab_size is 280 there and 290 here"):
        train_tokenizer.run(config(data_dir, tmp_path, tokenizer={"kind": "bpe", "vocab_size": 290}), ALONE)


def test_a_start_that_saved_nothing_binds_no_key_but_those_of_the_text_tokenizer_it_made(data_dir, tmp_path):
    wrong = {"tokenizer": TINY | {"hidden_dim": 9}, "init_from": tmp_path / "nowhere"}
    with pytest.raises((ConfigError, CheckpointError)):
        train_tokenizer.run(config(data_dir, tmp_path / "run", **wrong), ALONE)
    assert (tmp_path / "run/text_tokenizer/config.json").exists()
    with pytest.raises(RunConfigMismatchError, match=r"text_tokenizer: was made by .*text\.vocab_size is 290 there"):
        train_tokenizer.run(config(data_dir, tmp_path / "run", text={"vocab_size": 300}), ALONE)
    train_tokenizer.run(config(data_dir, tmp_path / "run", loop={"total_steps": 1}), ALONE)
    assert load_image_tokenizer(tmp_path / "run/image_tokenizer").codec.config.hidden_dim == 8


def test_an_image_tokenizer_that_this_run_did_not_make_is_not_replaced(data_dir, trained, tmp_path):
    before = load_image_tokenizer(trained / "image_tokenizer").fingerprint
    short = {"loop": {"total_steps": 1}, "quality": {"images": 4}}
    with pytest.raises(ConfigError, match=r"image_tokenizer: .* is there already.*give image_tokenizer=FOLDER"):
        train_tokenizer.run(config(data_dir, tmp_path, image_tokenizer=trained / "image_tokenizer", **short), ALONE)
    assert load_image_tokenizer(trained / "image_tokenizer").fingerprint == before
    train_tokenizer.run(config(data_dir, tmp_path, image_tokenizer=tmp_path / "own", **short), ALONE)
    assert load_image_tokenizer(tmp_path / "own").fingerprint != before


def test_bad_arithmetic_and_missing_images_are_refused(data_dir, tmp_path):
    with pytest.raises(ConfigError, match="does not divide into 3 ranks"):
        train_tokenizer.run(config(data_dir, tmp_path / "a"), ProcessEnv(world=3))
    with pytest.raises(DataError, match="nothing-here"):
        train_tokenizer.run(config(tmp_path / "nothing-here", tmp_path / "b"), ALONE)


def test_the_machines_are_looked_at_first_and_watched_meanwhile(data_dir, tmp_path):
    full = {"when": "always", "min_free_gib": 1e9}
    with pytest.raises(NodesRefusedError, match=r"GiB are free, preflight\.min_free_gib"):
        train_tokenizer.run(config(data_dir, tmp_path / "full", preflight=full), ALONE)
    assert not read_metrics(tmp_path / "full" / train_tokenizer.FOLDER)
    train_tokenizer.run(config(data_dir, tmp_path / "run", loop={"total_steps": 1}), ALONE)
    (beat,) = read_heartbeats(tmp_path / "run" / train_tokenizer.FOLDER / HEARTBEATS, 1)
    assert beat is not None and beat.pid == os.getpid()


VQGAN = {
    "kind": "vqgan",
    "image_size": 16,
    "network": {"kind": "resnet", "dim": 8, "layers": 2},
    "quantizer": {"kind": "residual", "num_tokens": 16, "dim": 4, "levels": 2, "revive_every": 3},
}
JUDGED = VQGAN | {
    "adversarial": {"dim": 8, "layers": 2, "weight": 0.1, "start_step": 2, "gradient_penalty_weight": 1.0}
}


def stored(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and buffers of both engines at the last step."""
    checkpoint = Checkpoint(run_dir / train_tokenizer.FOLDER / "checkpoints" / "step_000000012")
    found = {}
    for engine in ("tokenizer", "discriminator"):
        with checkpoint.source(engine) as source:
            for name in source.names():
                for slot in source.slots(name):
                    count = torch.Size(source.shape(name, slot)).numel()
                    found[f"{engine}/{name}/{slot}"] = source.read(name, slot, 0, count)
    return found


def test_a_tokenizer_and_its_discriminator_go_on_to_the_same_bits_after_a_power_cut(data_dir, tmp_path, monkeypatch):
    class PowerCutError(Exception):
        pass

    options = {
        "tokenizer": JUDGED,
        "text": None,
        "discriminator_optim": {"kind": "adamw", "lr": 2e-3},
        "quality": {"images": 16},
    }
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    result = train_tokenizer.run(config(data_dir, straight, **options), ALONE)
    assert losses(straight)[-1] < losses(straight)[0]
    assert result.metrics["psnr"] > 5 and 0 < result.metrics["ssim"] < 1
    assert "no rFID without quality.features (on training images)" in result.summary
    last = read_metrics(straight / train_tokenizer.FOLDER)[-2]
    assert last["discriminator/lr"] < last["tokenizer/lr"] and "loss/adversarial" in last
    real = CheckpointStore.poll

    def poll(store: CheckpointStore):
        if len(losses(cut)) == 7:
            raise PowerCutError
        return real(store)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "poll", poll)
        with pytest.raises(PowerCutError):
            train_tokenizer.run(config(data_dir, cut, **options), ALONE)
    train_tokenizer.run(config(data_dir, cut, **options), ALONE)
    once, again = stored(straight), stored(cut)
    assert once.keys() == again.keys() and any(name.startswith("discriminator/") for name in once)
    assert "tokenizer/quantizer.ema_sum/buffer" in once
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_residual_tokenizer_gives_shards_with_levels_and_a_finer_decoder_keeps_them_valid(data_dir, tmp_path):
    first, finer = tmp_path / "first", tmp_path / "finer"
    options = {"loop": {"total_steps": 3}, "quality": {"images": 8}}
    train_tokenizer.run(config(data_dir, first, tokenizer=VQGAN, **options), ALONE)
    tokenize.run(decode(tokenize.TokenizeConfig, {"run_dir": first, "data_dir": data_dir}), ALONE)
    tokens = TokenDataset(data_dir / "tokens")
    tokenizer = load_image_tokenizer(first / "image_tokenizer")
    assert tokenizer.code_shape == (4, 4, 2)
    tokens.require({"codes": tokenizer})
    refined = VQGAN | {"network": VQGAN["network"] | {"num_resnet_blocks": 1}, "freeze_encoder": True}
    refining = options | {"init_from": first / "image_tokenizer", "init_exclude": ["decoder.*"], "text": None}
    train_tokenizer.run(config(data_dir, finer, tokenizer=refined, **refining), ALONE)
    after = load_image_tokenizer(finer / "image_tokenizer")
    tokens.require({"codes": after})
    assert not torch.equal(after.codec.decoder.conv_out.weight, tokenizer.codec.decoder.conv_out.weight)


def test_weights_of_a_perceptual_loss_are_asked_for_by_path_and_leave_no_path_behind(data_dir, tmp_path):
    missing = VQGAN | {"perceptual": {"vgg": str(tmp_path / "vgg16.pth")}}
    with pytest.raises(CheckpointError, match=r"vgg16\.pth: no such file"):
        train_tokenizer.run(config(data_dir, tmp_path / "run", tokenizer=missing), ALONE)
    assert model.VQGAN.published(decode(VQGANConfig, missing)).perceptual is None
