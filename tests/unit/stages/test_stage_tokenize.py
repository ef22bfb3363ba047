"""The tokenize stage: one command does what is due, each step alone says what it found and how to go on."""

import io
import json
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from stores import web_store

from tokscale.base.batch import LOWRES_CODES
from tokscale.base.errors import ConfigError, DataError
from tokscale.data.loading import TokenLoader, TokenLoaderConfig
from tokscale.data.raw.shards import RawRecord, RawShard, write_shard
from tokscale.data.tokenization.leases import Leases
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.data.tokens.views import View
from tokscale.dist.env import ProcessEnv
from tokscale.stages import tokenize, tokenize_job
from tokscale.stages.tokenize import TokenizeConfig, run
from tokscale.stages.tokenize_job import alone
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.image import load_image_tokenizer, save_image_tokenizer
from tokscale.tokenizers.text import train_bpe


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, size in [("image", 8), ("low", 4)]:
            config = DiscreteVAEConfig(image_size=size, num_tokens=16, codebook_dim=4, num_layers=1, hidden_dim=4)
            save_image_tokenizer(DiscreteVAE(config), root / name)
    train_bpe(["an image"], 300, root / "text")
    return root


def write_raw(raw, shard: int, rows: int = 10) -> None:
    values, records = np.random.default_rng(shard), []
    for row in range(rows):
        stream = io.BytesIO()
        Image.fromarray(values.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(stream, "PNG")
        records.append(RawRecord(f"{shard:04d}{row:04d}", stream.getvalue(), "png", f"an image {shard} {row}"))
    write_shard(raw / f"{shard:05d}.tar", records)


@pytest.fixture
def config(tmp_path, tokenizers):
    for shard in range(3):
        write_raw(tmp_path / "data" / "raw", shard)
    return TokenizeConfig.model_validate(
        {
            "data_dir": tmp_path / "data",
            "run_dir": tmp_path / "run",
            "image_tokenizer": tokenizers / "image",
            "encode_batch": 4,
            "block_size": 4,
            "unit_samples": 1,
            "work": {"decode_threads": 1, "retry_seconds": 0},
            "device": "cpu",
        }
    )


def act(config, action="all", **changes):
    return run(config.model_copy(update={"action": action, **changes}), ProcessEnv())


def test_one_command_does_all_that_is_due_and_then_nothing(config):
    result = act(config)
    tokens = config.data_dir / "tokens"
    assert not result.skipped and result.metrics["samples"] == 30 and result.metrics["images_per_second"] > 0
    assert "tokscale train" in result.next_command and (tokens / "sheet.png").exists()
    dataset = TokenDataset(tokens)
    dataset.require({"codes": load_image_tokenizer(config.image_tokenizer)})
    assert dataset.samples == 30 and len(dataset.manifest.shards) == 3
    metrics = [json.loads(line) for line in (config.run_dir / "tokenize.jsonl").read_text().splitlines()]
    assert (
        len(metrics) == 3 and {"read/s", "decode/s", "encode/s", "pack/s", "queue", "bottleneck"} <= metrics[0].keys()
    )
    again = act(config)
    assert again.skipped and "nothing is due" in again.summary
    write_raw(config.data_dir / "raw", 3)
    assert act(config).metrics["samples"] == 40


def test_step_by_step_is_the_same(config):
    whole = config.data_dir / "whole"
    act(config, tokens=whole)
    planned = act(config, "plan", text_tokenizer=config.image_tokenizer.parent / "text").summary
    assert "3 units of 3 input shards" in planned and "captions, of 10 looked at: half have up to" in planned
    assert "0 of 3 done" in act(config, "status").summary
    assert act(config, "run").next_command.startswith("tokscale tokenize action=verify")
    assert "3 units with 30 samples are sound" in act(config, "verify").summary
    assert "30 samples in 3 shards" in act(config, "finalise").summary
    assert "of 16 codes used" in act(config, "stats").summary
    assert act(config).skipped and act(config, "run").skipped and act(config, "finalise").skipped
    for path in [*whole.glob("*.tar"), *whole.glob("*.json"), *whole.glob("index*")]:
        if path.name != "stats.json":
            assert (config.data_dir / "tokens" / path.name).read_bytes() == path.read_bytes()


def test_the_codes_are_the_tokenizers_own(config):
    act(config)
    block = TokenDataset(config.data_dir / "tokens").read(0)
    values = np.random.default_rng(0)
    pixels = torch.from_numpy(np.stack([values.integers(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(4)]))
    codes = load_image_tokenizer(config.image_tokenizer).encode(pixels.permute(0, 3, 1, 2))
    assert block.tensors["codes"].tolist() == codes.tolist()


def test_raw_shards_behind_an_address_give_the_same_data_set(config, tmp_path):
    act(config)
    with web_store(config.data_dir / "raw") as store:
        values = config.model_dump() | {"raw": f"{store.address}/{{00000..00002}}.tar", "tokens": tmp_path / "far"}
        far = TokenizeConfig.model_validate(values | {"remote": {"cache": tmp_path / "cache", "retry_seconds": 0}})
        store.faults += ["500", "short"]
        assert act(far).metrics["samples"] == 30 and not store.faults
        assert act(far).skipped
    assert TokenDataset(tmp_path / "far").manifest.id == TokenDataset(config.data_dir / "tokens").manifest.id


def test_damage_is_found_invalidated_and_made_again(config):
    act(config)
    path = config.data_dir / "tokens" / "tokens-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-700] + bytes([whole[-700] ^ 1]) + whole[-699:])
    with pytest.raises(DataError, match=r"(?s)problems:.*tokens-000001\.tar.*sha256.*repair=true"):
        act(config, "verify")
    with pytest.raises(DataError):
        act(config, "verify", repair=True)
    assert "2 of 3 done" in act(config, "status").summary
    assert act(config).metrics["samples"] == 30 and path.read_bytes() == whole
    assert "sound" in act(config, "verify").summary


def test_ids_that_do_not_come_out_again_are_a_problem(config, monkeypatch):
    from tokscale.tokenizers.codec import FrozenImageTokenizer

    act(config)
    encode = FrozenImageTokenizer.encode
    monkeypatch.setattr(FrozenImageTokenizer, "encode", lambda self, pixels: 15 - encode(self, pixels))
    with pytest.raises(DataError, match=r"of the ids come out again, check\.min_agreement=0\.99"):
        act(config, "verify")
    unchecked = config.check.model_copy(update={"reencode": 0})
    assert "sound" in act(config, "verify", check=unchecked).summary


def test_a_unit_that_was_given_up_stops_the_closing_until_it_is_mended_or_waived(config):
    raw = config.data_dir / "raw" / "00001.tar"
    whole = raw.read_bytes()
    write_shard(raw, [RawRecord(f"{n}", b"no image", "png", "x") for n in range(10)])
    with pytest.raises(
        DataError, match=r"(?s)1 units were given up, all others are done:.*unit 1.*max_drop_fraction=1 "
    ):
        act(config)
    assert "unit 1: failed for good, 10 of 10 samples were left out" in act(config, "status").summary
    assert act(config, allow_missing=True).metrics["samples"] == 20
    raw.write_bytes(whole)
    assert act(config).metrics["samples"] == 30


def test_a_torn_input_of_a_large_unit_is_named_mended_or_dropped(config):
    config = config.model_copy(update={"unit_samples": 1000})
    raw = config.data_dir / "raw" / "00001.tar"
    whole = raw.read_bytes()
    raw.write_bytes(whole[:5000])
    with pytest.raises(
        DataError, match=r"(?s)1 input shards cannot be used, all else is done:.*00001\.tar: .*on_bad_shard=drop"
    ):
        act(config)
    assert "input 00001.tar: left out" in act(config, "status").summary
    tokens = config.data_dir / "tokens"
    made = (tokens / "tokens-000000.tar").stat().st_mtime_ns
    dropped = act(config, on_bad_shard="drop")
    assert dropped.metrics["samples"] == 20 and "input shard left out: 00001.tar" in dropped.summary
    assert [bad["path"] for bad in json.loads((tokens / "stats.json").read_text())["bad_inputs"]] == ["00001.tar"]
    raw.write_bytes(whole)
    assert act(config).metrics["samples"] == 30
    assert (tokens / "tokens-000000.tar").stat().st_mtime_ns == made and "sound" in act(config, "verify").summary
    assert json.loads((tokens / "stats.json").read_text())["bad_inputs"] == []


def test_inputs_that_go_after_they_were_read_are_not_missed_and_replaced_ones_are_read_on_request(config):
    act(config)
    raw = config.data_dir / "raw"
    (raw / "00000.tar").unlink()
    assert act(config).skipped
    write_raw(raw, 1, rows=7)
    with pytest.raises(DataError, match=r"00001\.tar had \d+ bytes when it was read.*redo_changed=true"):
        act(config)
    assert (
        act(config, redo_changed=True, check=config.check.model_copy(update={"reencode": 0})).metrics["samples"] == 27
    )


def test_a_first_tokenization_that_made_nothing_does_not_bind_the_folder(config):
    with pytest.raises(DataError, match="label 10"):
        act(config, labels=True)
    assert act(config).metrics["samples"] == 30
    with pytest.raises(DataError, match="labels null -> true"):
        act(config, labels=True)


def test_a_tokenization_that_left_out_every_sample_binds_neither_options_nor_units(config):
    strict = config.filters.model_copy(update={"min_side": 1000})
    everything = config.work.model_copy(update={"max_drop_fraction": 1.0})
    with pytest.raises(DataError):
        act(config, "run", filters=strict, work=everything)
        act(config, "finalise")
    assert act(config, unit_samples=2).metrics["samples"] == 30
    tokens = config.data_dir / "tokens"
    assert len(TokenDataset(tokens).manifest.shards) == 2, "inputs that nobody has counted weigh one each"
    assert act(config, unit_samples=100).skipped, "what is made is kept"


def test_a_size_of_units_that_made_nothing_is_not_kept(config):
    act(config, "plan")
    act(config, unit_samples=2)
    assert len(TokenDataset(config.data_dir / "tokens").manifest.shards) == 2


def test_losses_are_said_once_and_kept(config):
    from dataclasses import replace

    path = config.data_dir / "raw" / "00003.tar"
    with RawShard(config.data_dir / "raw" / "00000.tar") as shard:
        record = RawRecord("lines", shard.image(shard.samples[0]), "png", "one\ntwo")
        write_shard(path, [record, replace(record, key="more")])
    assert "2 captions hold line breaks" in act(config).summary
    assert "line breaks" not in act(config).summary
    assert json.loads((config.data_dir / "tokens" / "stats.json").read_text())["noted"] == {"captions_with_lines": 2}


def test_another_tokenizer_is_refused_naming_both(config, tokenizers):
    act(config)
    with pytest.raises(DataError, match="What differs: encode_batch 4 -> 8"):
        act(config, encode_batch=8)
    with pytest.raises(DataError, match="What differs: tokenizers"):
        act(config, image_tokenizer=tokenizers / "low")


def test_streams_stored_ids_variants_and_views(config, tokenizers):
    changes = {
        "streams": {"low": tokenizers / "low"},
        "text_tokenizer": tokenizers / "text",
        "text": {"ids": True, "length": 8},
        "variants": {"flips": True},
        "views": {"some": {"min_caption": 5, "dedupe": True}},
    }
    act(TokenizeConfig.model_validate(config.model_dump() | changes))
    dataset = TokenDataset(config.data_dir / "tokens")
    tensors = dataset.read(0).tensors
    assert tensors["codes"].shape == (4, 2, 4, 4) and tensors["codes.low"].shape == (4, 2, 2, 2)
    assert dataset.manifest.text is not None and len(tensors["text"]) > 0 and dataset.manifest.variants == 2
    assert View(dataset, "some").sizes.sum() == 30


def test_one_tokenizer_at_two_sizes_of_image_feeds_a_model_of_two_resolutions(config, tokenizers):
    low = {"path": tokenizers / "image", "image_size": 4}
    act(TokenizeConfig.model_validate(config.model_dump() | {"streams": {"low": low}}))
    dataset = TokenDataset(config.data_dir / "tokens")
    main, small = (dataset.manifest.streams[name] for name in ("codes", LOWRES_CODES))
    assert (main.image_size, main.code_shape, small.image_size, small.code_shape) == (8, (4, 4), 4, (2, 2))
    dataset.require({"codes": load_image_tokenizer(low["path"])})
    dataset.require({LOWRES_CODES: load_image_tokenizer(low["path"], image_size=4)})
    assert main.tokenizer != small.tokenizer, "equal ids of other images"
    loader = TokenLoader(
        TokenLoaderConfig(streams=(LOWRES_CODES,)), manifests=[dataset], text_tokenizer=None, batch_size=4, seed=0
    )
    batch = loader.next_batch()
    loader.close()
    assert batch.codes.shape == (4, 4, 4) and batch.extra[LOWRES_CODES].shape == (4, 2, 2)
    blocks = [dataset.read(number) for number in range(len(dataset.sizes))]
    stored = {
        key: block.tensors[LOWRES_CODES][row].tolist()
        for block in blocks
        for row, key in enumerate(block.keys(np.arange(len(block))))
    }
    assert batch.extra[LOWRES_CODES].tolist() == [stored[key] for key in batch.keys]
    odd = {"streams": {"low": low | {"image_size": 3}}, "tokens": config.data_dir / "other"}
    with pytest.raises(ConfigError, match="image_size=3 is not a multiple"):
        act(TokenizeConfig.model_validate(config.model_dump() | odd))


def test_every_rank_works_and_the_first_closes(config):
    other = run(config, ProcessEnv(rank=1, world=2))
    assert "rank 1 made 30 samples" in other.summary and not (config.data_dir / "tokens" / "dataset.json").exists()
    assert run(config, ProcessEnv(rank=0, world=2)).metrics["samples"] == 30


def test_who_begins_to_work_while_another_waits_to_sweep_is_left_alone(config, monkeypatch):
    folder = config.data_dir / "tokens"
    partial = folder / ".tokens-000009.tar.another.partial"
    with ExitStack() as stack:
        another = Leases(folder, 60)

        @contextmanager
        def late(job, *, wait):
            stack.enter_context(another).claim(9)
            partial.touch()
            with alone(job, wait=wait) as ours:
                yield ours

        monkeypatch.setattr(tokenize_job, "alone", late)
        act(config, "run")
        assert another.owner(9) == another.worker.name and partial.exists()


def test_a_worker_that_leaves_others_at_work_does_not_even_ask_for_its_turn(config, monkeypatch):
    monkeypatch.setattr(tokenize_job, "alone", None)
    with Leases(config.data_dir / "tokens", 60):
        assert "30 samples made" in act(config, "run").summary


def test_a_plan_that_is_extended_meanwhile_is_not_closed_without_its_new_units(config, monkeypatch):
    turns = []

    @contextmanager
    def late(job):
        if not turns:
            turns.append(job)
            write_raw(config.data_dir / "raw", 3)
            assert act(config).metrics["samples"] == 40  # another worker, which saw the new input
        with alone(job):
            yield

    monkeypatch.setattr(tokenize, "alone", late)
    result = act(config)
    assert turns and result.metrics["samples"] == 40 and not result.skipped
    assert TokenDataset(config.data_dir / "tokens").samples == 40


def test_what_is_missing_is_named(config, tmp_path):
    with pytest.raises(DataError, match=r"run/image_tokenizer: no config\.json"):
        act(config, image_tokenizer=None)
    with pytest.raises(DataError, match="run/text_tokenizer"):
        act(config, text=config.text.model_copy(update={"ids": True}))
    with pytest.raises(DataError, match="tokscale prepare"):
        act(config, raw=tmp_path / "nowhere")
    for action in ("status", "verify", "finalise"):
        with pytest.raises(DataError, match="no tokenization was planned here; run `tokscale tokenize`"):
            act(config, action)
    with pytest.raises(DataError, match="tokenization is not finished here"):
        act(config, "stats")
