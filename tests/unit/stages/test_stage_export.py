"""The export stage on a real, tiny run: checkpoint in, a folder that loads and computes the same out."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import tokscale
from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import encode
from tokscale.base.errors import CheckpointError, ConfigError, DataError
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.retention import BEST, write_best
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.weights import load_weights, read_config
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig
from tokscale.inference.pretrained import Pretrained
from tokscale.models.dalle import DALLEConfig
from tokscale.models.registry import build_model
from tokscale.stages.export import ExportConfig, run
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.image import load_image_tokenizer, save_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer, train_bpe

CAPTIONS = ["a red circle", "a small blue square", "a green star left of a circle"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A run folder with checkpoints of steps 1 and 2 of a tiny DALL-E with an average, and the live model."""
    folder = tmp_path_factory.mktemp("run")
    with rng.scope(0, "tokenizer"):
        codec = DiscreteVAE(DiscreteVAEConfig(image_size=8, num_tokens=12, codebook_dim=4, num_layers=1, hidden_dim=4))
    save_image_tokenizer(codec, folder / "dvae")
    train_bpe(CAPTIONS, 270, folder / "bpe")
    image, text = load_image_tokenizer(folder / "dvae"), load_text_tokenizer(folder / "bpe")
    config = DALLEConfig(dim=8, depth=1, heads=2, dim_head=6, text_seq_len=6).fitted(image, text)

    def make() -> torch.nn.Module:
        with rng.scope(0, "model"):
            return build_model(config)

    comm = Comm(ProcessEnv())
    engine = build_engine(
        "model",
        make,
        config=EagerConfig(ema=(0.9,)),
        optimizer=AdamWConfig(lr=0.1),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=3,
        total_steps=10,
    )
    store = CheckpointStore(folder / "checkpoints", CheckpointConfig(), comm)
    state = {
        "models": {"model": encode(config)},
        "tokenizers": {
            "image": {"path": str(folder / "dvae"), "fingerprint": image.fingerprint},
            "text": {"path": str(folder / "bpe"), "fingerprint": text.fingerprint},
        },
    }
    for step in range(2):
        engine.backward(engine(batch(text)).total)
        engine.step(step)
        store.save(step + 1, {"model": engine}, state)
    return folder, engine.model


def batch(text) -> TokenBatch:
    ids, mask = text.encode(CAPTIONS, 6)
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 12, (3, 4, 4), generator=draw)
    return TokenBatch(positions=torch.arange(3), text=ids, text_mask=mask, codes=codes)


def config(folder: Path, **values) -> ExportConfig:
    return ExportConfig(run_dir=folder, **values)


def test_the_export_computes_what_the_trainer_computes(trained, tmp_path):
    folder, live = trained
    result = run(config(folder, out=tmp_path / "e"), ProcessEnv())
    assert not result.skipped and f"export={tmp_path / 'e'}" in result.next_command
    assert read_config(tmp_path / "e")["kind"] == "dalle"
    loaded = build_model(DALLEConfig(**read_config(tmp_path / "e")))
    load_weights(loaded, tmp_path / "e")
    image, text = (tmp_path / "e" / f"{kind}_tokenizer" for kind in ("image", "text"))
    assert load_image_tokenizer(image).fingerprint == load_image_tokenizer(folder / "dvae").fingerprint
    sample = batch(load_text_tokenizer(text))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(sample).total, live.eval()(sample).total)
    assert run(config(folder, out=tmp_path / "e"), ProcessEnv()).skipped


def test_the_best_step_is_exported_by_name(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(CheckpointError, match=r"step=best: .* train with best="):
        run(config(folder, out=tmp_path / "e", step="best"), ProcessEnv())
    try:
        for step, value in ((1, 0.5), (5, 0.4)):  # retention has left the first alone
            write_best(folder / "checkpoints", step, "held_out/loss", value)
        run(config(folder, out=tmp_path / "e", step="best"), ProcessEnv())
    finally:
        (folder / "checkpoints" / BEST).unlink()
    assert json.loads((tmp_path / "e" / "manifest.json").read_text())["about"]["step"] == 1


def test_step_and_average_can_be_chosen(trained, tmp_path):
    folder, live = trained
    run(config(folder, out=tmp_path / "e", step=1, weights="ema", dtype="bf16"), ProcessEnv())
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert (manifest["about"]["step"], manifest["weights"], manifest["dtype"]) == (1, "ema", "bf16")
    loaded = build_model(DALLEConfig(**read_config(tmp_path / "e")))
    load_weights(loaded, tmp_path / "e", as_stored=True)
    name, parameter = next(iter(loaded.named_parameters()))
    assert parameter.dtype == torch.bfloat16 and not torch.equal(parameter.float(), dict(live.named_parameters())[name])


def test_another_export_of_a_checkpoint_that_was_damaged_meanwhile_is_not_written_from_it(trained, tmp_path):
    run_dir, out = Path(shutil.copytree(trained[0], tmp_path / "run")), tmp_path / "export"
    run(ExportConfig(run_dir=run_dir, out=out), ProcessEnv())
    (path,) = (run_dir / "checkpoints/step_000000002").glob("model.rank*")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert run(ExportConfig(run_dir=run_dir, out=out), ProcessEnv()).skipped
    assert "step 1" in run(ExportConfig(run_dir=run_dir, out=out, dtype="bf16"), ProcessEnv()).summary
    with pytest.raises(CheckpointError, match="damaged"):
        run(ExportConfig(run_dir=run_dir, out=out, dtype="fp16", step=2), ProcessEnv())


def test_another_tokenizer_is_refused_by_both_names(trained, tmp_path):
    folder, _ = trained
    train_bpe(["other words"], 270, tmp_path / "bpe")
    with pytest.raises(DataError, match=r"not the text tokenizer this model was trained with.*text_tokenizer=FOLDER"):
        run(config(folder, out=tmp_path / "e", text_tokenizer=tmp_path / "bpe"), ProcessEnv())


def test_what_was_not_saved_is_named(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(CheckpointError, match=r"there are steps \[1, 2\]"):
        run(config(folder, out=tmp_path / "e", step=7), ProcessEnv())
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        run(config(folder, out=tmp_path / "e", engine="modle"), ProcessEnv())
    with pytest.raises(CheckpointError, match="tokscale train"):
        run(config(tmp_path / "empty", out=tmp_path / "e"), ProcessEnv())
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_hubs_names_load_and_save_the_same_thing(trained, tmp_path, dtype):
    folder, live = trained
    run(config(folder, out=tmp_path / "e", dtype=dtype), ProcessEnv())
    first = Pretrained.from_pretrained(tmp_path / "e")
    assert first.save_pretrained(tmp_path / "again", max_shard_size="3KB") == str(tmp_path / "again")
    second = tokscale.load(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    sample = batch(load_text_tokenizer(folder / "bpe"))
    same = copy.deepcopy(live).eval().to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]))
    with torch.no_grad():
        expected = same(sample).total
        assert torch.equal(first.model(sample).total, expected) and torch.equal(second.model(sample).total, expected)
    assert second.image_tokenizer.fingerprint == first.image_tokenizer.fingerprint
    with pytest.raises(CheckpointError, match="download the export first"):
        Pretrained.from_pretrained("someone/some-model")


def test_one_engine_of_several_is_exported_by_name(tmp_path):
    """Two models and a helper without a configuration, saved together: each model comes out as itself."""
    comm, configs, engines = Comm(ProcessEnv()), {}, {}
    for number, name in enumerate(("base", "superres", "discriminator"), 1):
        made = DALLEConfig(dim=8 * number, depth=1, heads=2, dim_head=6, text_seq_len=6, num_text_tokens=300)
        configs[name] = made.model_copy(update={"num_image_tokens": 12, "image_grid": (4, 4)})
        engines[name] = build_engine(
            name,
            partial(build_model, configs[name]),
            config=EagerConfig(),
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(),
            comm=comm,
            micro_batches=1,
            micro_batch_size=1,
            total_steps=1,
        )
    models = {name: encode(configs[name]) for name in ("base", "superres")}
    CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(), comm).save(1, engines, {"models": models})
    for name in models:
        run(config(tmp_path, out=tmp_path / name, engine=name), ProcessEnv())
        loaded = build_model(DALLEConfig(**read_config(tmp_path / name)))
        load_weights(loaded, tmp_path / name)
        own = dict(engines[name].model.named_parameters())
        assert all(torch.equal(value, own[key]) for key, value in loaded.named_parameters())
    with pytest.raises(ConfigError, match="'discriminator' \\(saved, but no model by itself\\)"):
        run(config(tmp_path, out=tmp_path / "e", engine="discriminator"), ProcessEnv())
    with pytest.raises(ConfigError, match="the run has base, superres; say which"):
        run(config(tmp_path, out=tmp_path / "e"), ProcessEnv())
