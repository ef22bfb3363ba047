"""Exports: exactly the model's tensors, streamed from shards, whole or not there, and bit-equal to one state dict."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tokscale.base.errors import CheckpointError, ConfigError, StorageError
from tokscale.checkpoint.card import model_card
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.disk import Disk
from tokscale.checkpoint.export import ExportOptions, export_checkpoint, write_export
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import Flat, alone
from tokscale.checkpoint.weights import load_weights, read_config, read_export_manifest

CONFIG = {"kind": "tied", "dim": 6}


class Tied(nn.Module):
    """Tied embedding, a frozen layer, persistent buffers of two kinds, and one that is not stored."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.embed = nn.Embedding(11, dim)
        self.fixed = nn.Linear(dim, dim).requires_grad_(False)
        self.head = nn.Linear(dim, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", torch.linspace(0, 1, 5))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def model(seed: int = 0) -> Tied:
    made = Tied()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        made.count.fill_(seed)
    return made


def meta() -> Tied:
    with torch.device("meta"):
        return Tied()


def saved(folder: Path, source: Tied, world: int = 1) -> Checkpoint:
    """A checkpoint of the model with a moment and an average, as an engine of any layout stores it."""
    held = {}
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            held |= {(name, "weight"): parameter.detach(), (name, "exp_avg"): parameter.detach() + 1}
            held[name, "ema/0.99"] = parameter.detach() / 2
        else:
            held[name, "frozen"] = parameter.detach()
    held |= {("angles", "buffer"): source.angles, ("count", "buffer"): source.count}
    path = CheckpointStore(folder / "checkpoints", CheckpointConfig(), alone()).save(
        5, {"model": Flat(held, world=world)}, {"step": 5}
    )
    assert path is not None
    return Checkpoint(path)


def test_streamed_export_equals_one_state_dict(tmp_path):
    source = model(1)
    out = export_checkpoint(
        saved(tmp_path, source), "model", meta_model=meta(), model_config=CONFIG, out=tmp_path / "export"
    )
    direct = write_export(tmp_path / "direct", meta_model=meta(), model_config=CONFIG, state_dict=source.state_dict())
    assert (out / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()
    stored = load_file(out / "model.safetensors")
    assert set(stored) == {"embed.weight", "fixed.weight", "fixed.bias", "angles", "count"}
    assert all(torch.equal(stored[name], source.state_dict()[name]) for name in stored)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["tied"]) == {"head.weight": "embed.weight"}


def test_an_export_loads_strictly_and_keeps_ties(tmp_path):
    source, target = model(1), model(2)
    write_export(tmp_path / "e", meta_model=meta(), model_config=CONFIG, state_dict=source.state_dict())
    load_weights(target, tmp_path / "e")
    assert read_config(tmp_path / "e") == CONFIG
    assert target.head.weight is target.embed.weight
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("weights", ["ema", "ema/0.99"])
def test_averages_are_exported_on_demand(tmp_path, weights):
    source = model(1)
    out = export_checkpoint(
        saved(tmp_path, source), "model", meta_model=meta(), model_config=CONFIG, out=tmp_path / "e", weights=weights
    )
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["embed.weight"], source.embed.weight / 2)
    assert torch.equal(stored["fixed.weight"], source.fixed.weight)


def test_an_average_that_was_not_saved_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"weights: got 'ema/0.9', which was not saved; did you mean 'ema/0.99'"):
        export_checkpoint(
            saved(tmp_path, model(1)),
            "model",
            meta_model=meta(),
            model_config=CONFIG,
            out=tmp_path / "e",
            weights="ema/0.9",
        )
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_parameters_are_cast_and_buffers_are_not(tmp_path, dtype, expected):
    source = model(1)
    out = export_checkpoint(
        saved(tmp_path, source), "model", meta_model=meta(), model_config=CONFIG, out=tmp_path / "e", dtype=dtype
    )
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["embed.weight"], source.embed.weight.to(expected))
    assert stored["fixed.bias"].dtype == expected
    assert torch.equal(stored["angles"], source.angles) and stored["count"].dtype == torch.int64
    target = model(2)
    load_weights(target, out)
    assert torch.equal(target.embed.weight, source.embed.weight.to(expected).float())
    load_weights(target, out, as_stored=True)
    assert target.embed.weight.dtype == expected and target.head.weight is target.embed.weight


def test_large_exports_are_cut_into_files_with_an_index(tmp_path):
    source, target = model(1), model(2)
    out = write_export(
        tmp_path / "e",
        meta_model=meta(),
        model_config=CONFIG,
        state_dict=source.state_dict(),
        options=ExportOptions(max_shard_size=300),
    )
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (66 + 36 + 6 + 5) + 8
    assert all(name in load_file(out / file) for name, file in index["weight_map"].items())
    load_weights(target, out)
    assert torch.equal(target.fixed.bias, source.fixed.bias)


def test_the_manifest_names_every_tensor_and_damage_is_found(tmp_path):
    source = model(1)
    out = write_export(tmp_path / "e", meta_model=meta(), model_config=CONFIG, state_dict=source.state_dict())
    manifest = read_export_manifest(out)
    assert set(manifest["tensors"]) == {"embed.weight", "fixed.weight", "fixed.bias", "angles", "count"}
    assert manifest["tied"] == {"head.weight": "embed.weight"}
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged, its sha256"):
        load_weights(model(2), out)
    (out / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        load_weights(model(2), out)


def test_an_export_of_a_newer_format_is_refused_before_its_words_are(tmp_path):
    out = write_export(tmp_path / "e", meta_model=meta(), model_config=CONFIG, state_dict=model(1).state_dict())
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": manifest["format"] + 1, "tokscale": "9.9"}))
    for read in (read_config, read_export_manifest, lambda folder: load_weights(model(2), folder)):
        with pytest.raises(CheckpointError, match=r"manifest\.json: an export of format 3, by tokscale '9\.9'.*newer"):
            read(out)


class Renamed(Tied):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(2))
        del self.angles
        self.fixed = nn.Linear(6, 7)


def test_another_model_is_refused_with_all_differences(tmp_path):
    checkpoint = saved(tmp_path, model(1))
    write_export(tmp_path / "e", meta_model=meta(), model_config=CONFIG, state_dict=model(1).state_dict())
    expected = [
        "4 tensors do not fit",
        "extra is missing",
        "angles is unknown to the model",
        r"fixed.weight has shape (6, 6), the model says (7, 6)",
    ]
    with torch.device("meta"):
        other = Renamed()
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(checkpoint, "model", meta_model=other, model_config=CONFIG, out=tmp_path / "x")
    assert all(words in str(caught.value) for words in expected)
    target = Renamed()
    before = target.embed.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, tmp_path / "e")
    assert all(words in str(caught.value) for words in expected)
    assert torch.equal(target.embed.weight, before)


def test_tied_weights_that_differ_are_refused(tmp_path):
    state = dict(model(1).state_dict())
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"head\.weight and embed\.weight are one tied tensor"):
        write_export(tmp_path / "e", meta_model=meta(), model_config=CONFIG, state_dict=state)


def test_the_same_export_is_recognised_and_another_replaces_it(tmp_path):
    checkpoint = saved(tmp_path, model(1))
    out = tmp_path / "e"
    for dtype, changes in (("fp32", True), ("fp32", False), ("bf16", True)):
        before = (out / "manifest.json").stat().st_ino if out.exists() else None
        export_checkpoint(checkpoint, "model", meta_model=meta(), model_config=CONFIG, out=out, dtype=dtype)
        assert ((out / "manifest.json").stat().st_ino != before) == changes
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_no_export_is_left_alone(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not an export of tokscale"):
        write_export(tmp_path / "e", meta_model=meta(), model_config=CONFIG, state_dict=model(1).state_dict())
    assert (tmp_path / "e" / "thesis.tex").read_text() == "years of work"


class Full(Disk):
    """A disk with room for so many bytes."""

    def __init__(self, room: int):
        self.room = room

    def write(self, descriptor: int, data: memoryview) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        super().write(descriptor, data)


def test_a_full_disk_leaves_the_earlier_export(tmp_path):
    write_export(tmp_path / "e", meta_model=meta(), model_config=CONFIG, state_dict=model(1).state_dict())
    before = (tmp_path / "e" / "model.safetensors").read_bytes()
    for room in random.Random(0).sample(range(2000), 8):
        with pytest.raises(StorageError, match="nothing was exported"):
            write_export(
                tmp_path / "e",
                meta_model=meta(),
                model_config=CONFIG,
                state_dict=model(2).state_dict(),
                disk=Full(room),
            )
        assert (tmp_path / "e" / "model.safetensors").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_extras_and_card_travel_along(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    card = model_card(
        folder="e",
        model_config=CONFIG,
        task="text-to-image",
        example='images = model.sample(["a small red circle"])',
        about={"step": 5},
        facts={"Metrics": {"loss": 1.25}, "Data": None},
    )
    out = write_export(
        tmp_path / "e",
        meta_model=meta(),
        model_config=CONFIG,
        state_dict=model(1).state_dict(),
        options=ExportOptions(extras={"image_tokenizer": tmp_path / "tokenizer"}, card=card),
    )
    assert (out / "image_tokenizer" / "config.json").read_text() == "{}"
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: tokscale") and "| loss | 1.25 |" in text and "## Data" not in text


def test_a_folder_without_weights_is_no_export(tmp_path):
    with pytest.raises(CheckpointError, match="not an export"):
        load_weights(model(1), tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_config(tmp_path)


# ------------------------------------------------------------------------------------------------------- links


def write(out: Path, seed: int) -> Path:
    about = {"checkpoint": f"{seed}"}
    options = ExportOptions(about=about)
    return write_export(
        out, meta_model=meta(), model_config=CONFIG, state_dict=model(seed).state_dict(), options=options
    )


def test_an_export_that_was_moved_away_and_linked_back_is_read_but_not_replaced(tmp_path):
    out, archive = tmp_path / "export", tmp_path / "archive"
    write(out, 1).rename(archive)
    out.symlink_to(archive)
    before = {path.name: path.read_bytes() for path in archive.iterdir()}
    assert write(out, 1) == out  # the same one: nothing to do
    with pytest.raises(ConfigError, match=r"is a link to .*archive.*remove the link"):
        write(out, 2)
    assert {path.name: path.read_bytes() for path in archive.iterdir()} == before


@pytest.mark.parametrize("there", [False, True])
def test_a_link_to_an_empty_place_is_filled(tmp_path, there):
    out, disk = tmp_path / "export", tmp_path / "disk"
    if there:
        disk.mkdir()
    out.symlink_to(disk)
    write(out, 1)
    assert out.is_symlink() and (disk / "model.safetensors").exists()


def test_what_a_person_put_into_an_export_survives_its_replacement(tmp_path):
    out = write(tmp_path / "export", 1)
    (out / "thesis").mkdir()
    (out / "thesis/notes.md").write_text("mine")
    (out / "samples").symlink_to(tmp_path)
    write(out, 2)
    assert (out / "thesis/notes.md").read_text() == "mine" and (out / "samples").is_symlink()
    assert read_export_manifest(out)["about"] == {"checkpoint": "2"}


def test_an_export_that_a_crash_left_under_its_temporary_name_is_put_back_first(tmp_path):
    out = write(tmp_path / "export", 1)
    before = (out / "model.safetensors").read_bytes()
    out.rename(tmp_path / ".export.0123abcd.replaced.tmp")  # killed between the two renames
    (tmp_path / ".export.89abcdef.tmp").mkdir()
    mine = [tmp_path / ".export.notes.tmp", tmp_path / ".export.76543210.tmp"]
    mine[0].write_text("not ours")
    mine[1].symlink_to(tmp_path)

    class Full(Disk):
        def write(self, descriptor: int, data: memoryview) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError):
        write_export(out, meta_model=meta(), model_config=CONFIG, state_dict=model(2).state_dict(), disk=Full())
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path for path in tmp_path.iterdir() if path.name.startswith(".")) == sorted(mine)
