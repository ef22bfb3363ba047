"""Exports that were made to do harm, or damaged: structure is checked before anything is built from it."""

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_exports

import tokscale
from tokscale.base.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    tiny_exports.make_exports(folder)
    return folder / "dalle"


@pytest.fixture
def export(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "export"))


def header(export: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of the weights; `change` gives bytes, or alters the mapping."""
    path = export / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + size])
    text = change(content)
    text = text if isinstance(text, bytes) else json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def first(content: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in content.items() if name != "__metadata__")


def overlap(content: dict[str, Any]) -> None:
    one, two = [entry for entry in content.values() if entry.get("shape") == [16]][:2]
    two["data_offsets"] = one["data_offsets"]


HEADERS = {
    "no JSON": lambda content: b"\xff\xfe",
    "empty": lambda content: b"",
    "a list": lambda content: b"[]",
    "deep": lambda content: b"[" * 100_000,
    "NaN": lambda content: b'{"a": NaN}',
    "digits": lambda content: b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    "an entry that is a number": lambda content: content.update(x=7),
    "an entry without a shape": lambda content: first(content).pop("shape"),
    "a shape of text": lambda content: first(content).update(shape=["3"]),
    "a shape of fractions": lambda content: first(content).update(shape=[1.5]),
    "a negative side": lambda content: first(content).update(shape=[-1]),
    "a shape beyond memory": lambda content: first(content).update(shape=[2**62]),
    "a side of truth": lambda content: first(content).update(shape=[True]),
    "many sides": lambda content: first(content).update(shape=[1] * 10_000),
    "another type": lambda content: first(content).update(dtype="F16"),
    "a type of no text": lambda content: first(content).update(dtype=["F32"]),
    "an unknown type": lambda content: first(content).update(dtype="F8_E9"),
    "offsets that are no pair": lambda content: first(content).update(data_offsets=[0]),
    "offsets that go back": lambda content: first(content).update(data_offsets=[8, 0]),
    "offsets below zero": lambda content: first(content).update(data_offsets=[-4, 60]),
    "offsets beyond the end": lambda content: first(content).update(data_offsets=[2**40, 2**40 + 64]),
    "overlapping tensors": overlap,
    "metadata of numbers": lambda content: content.update(__metadata__={"a": 1}),
    "a list of metadata": lambda content: content.update(__metadata__=["a"]),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_not_as_the_format_says_is_refused(export, change):
    header(export, change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors|export"):
        tokscale.load(export)


INDICES = {
    "no weight_map": {},
    "a list": {"weight_map": []},
    "numbers": {"weight_map": {"a": 1}},
    "out of the folder": {"weight_map": {"a": "../export/model.safetensors"}},
    "absolute": {"weight_map": {"a": "/etc/passwd"}},
    "missing": {"weight_map": {"a": "gone.safetensors"}},
    "itself": {"weight_map": {"a": "model.safetensors.index.json"}},
    "nothing": {"weight_map": {}},
    "a folder": {"weight_map": {"a": "image_tokenizer"}},
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_that_names_anything_but_files_of_its_folder_is_refused(export, index):
    (export / "model.safetensors").unlink()
    (export / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        tokscale.load(export)


def config(export: Path, **values: Any) -> None:
    path = export / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CONFIGS: dict[str, dict[str, Any]] = {
    "an unknown kind": {"kind": "gpt"},
    "an unknown key": {"dimm": 3},
    "a wide model": {"dim": 2**40},
    "a large vocabulary": {"num_text_tokens": 2**50},
    "more heads than memory": {"heads": 2**30, "dim_head": 2**20},
    "a million layers": {"depth": 10**6},
    "thousands of layers": {"depth": 9999},
    "a long caption": {"text_seq_len": 2**40},
    "a large grid": {"image_grid": [2**20, 2**20]},
    "no layers": {"depth": 0},
    "text": {"dim": "16; rm -rf /"},
    "infinity": {"loss_img_weight": 1e308 * 10},
    "digits": {"dim": 10**30},
}


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_is_not_of_the_weights_is_refused_before_memory_is_taken(export, values):
    config(export, **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"config\.json|do not fit the model|\.kind|\.d"):
        tokscale.load(export)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"kind": ' + b"9" * 5000 + b"}", b"null"]
)
@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_a_file_of_json_that_is_none_is_refused(export, name, content):
    (export / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        tokscale.load(export)


@pytest.mark.parametrize("values", [{"tensors": []}, {"tensors": {"a": 1}}, {"about": 3}])
def test_a_manifest_of_another_structure_is_refused(export, values):
    path = export / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        tokscale.load(export)


STRANGE = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "link to itself": lambda path: os.symlink(path, path),
    "link to nothing": lambda path: os.symlink("nothing", path),
}
FILES = [f"{kind}_tokenizer/{name}" for kind, name in (("image", "model.safetensors"), ("text", "tokenizer.json"))]
FILES += ["config.json", "model.safetensors", "image_tokenizer/config.json", "text_tokenizer/config.json"]


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_and_not_waited_for(export, name, make):
    (export / name).unlink()
    make(export / name)
    with pytest.raises((CheckpointError, DataError)):
        tokscale.load(export)


TOKENIZERS = {
    "image_tokenizer/config.json": [b"[]", b"{}", b'{"kind": "dvae", "num_layers": 1000000}', b"\xff"],
    "image_tokenizer/model.safetensors": [b"", b"\xff" * 100, struct.pack("<Q", 2**60) + b"{}"],
    "text_tokenizer/config.json": [b"[]", b'{"kind": 3}', b'{"kind": "bpe", "id_shift": -5}', b"\xff"],
    "text_tokenizer/tokenizer.json": [b"", b"[]", b"{}", b"[" * 100_000, b'{"model": {"type": "BPE", "vocab": 3}}'],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, many in TOKENIZERS.items() for content in many]
)
def test_tokenizers_of_an_export_are_held_to_the_same(export, name, content):
    (export / name).write_bytes(content)
    with pytest.raises((CheckpointError, DataError)):
        tokscale.load(export)


def test_an_export_through_a_link_is_an_export(export, tmp_path):
    (tmp_path / "link").symlink_to(export)
    assert tokscale.load(tmp_path / "link").sample("a small red circle").shape == (1, 3, 8, 8)
