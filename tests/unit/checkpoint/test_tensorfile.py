"""Our safetensors files against the safetensors library, both ways, and damaged ones."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tokscale.base.errors import CheckpointError
from tokscale.checkpoint import tensorfile
from tokscale.checkpoint.disk import Disk
from tokscale.checkpoint.tensorfile import Entry, TensorFile, dtype_code, host_chunks, write_tensors

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def example() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: (torch.randn(3, 5, generator=draw) * 9).to(getattr(torch, name)) for name in DTYPES[::-1]}


def entry(name: str, value: torch.Tensor) -> Entry:
    return Entry(name, value.dtype, tuple(value.shape), lambda: host_chunks(value.flatten()))


def test_the_library_reads_what_we_write(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 16)  # several chunks a tensor
    values = example()
    written = write_tensors(Disk(), tmp_path / "x", [entry(*item) for item in values.items()], {"format": "pt"})
    data = (tmp_path / "x").read_bytes()
    assert (written.nbytes, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    read = load_file(tmp_path / "x")
    assert read.keys() == values.keys()
    assert all(read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in values.items())


def test_we_read_ranges_of_what_the_library_writes(tmp_path):
    values = example()
    save_file(values, tmp_path / "x", {"who": "library"})
    file = TensorFile(tmp_path / "x")
    assert file.metadata == {"who": "library"} and set(file.keys()) == set(values)
    for name, value in values.items():
        assert (file.shape(name), file.dtype(name)) == ((3, 5), value.dtype)
        out = torch.empty(6, dtype=value.dtype)
        file.read(name, 4, out)
        assert torch.equal(out, value.flatten()[4:10])
    file.close()


def test_each_tensor_can_be_hashed_instead_of_the_file(tmp_path):
    value = torch.arange(6.0)
    written = write_tensors(Disk(), tmp_path / "x", [entry("a", value)], {}, hash_each=True)
    assert written.tensors == {"a": hashlib.sha256(value.numpy().tobytes()).hexdigest()} and written.sha256 == ""


def test_damage_is_an_error_that_names_the_file(tmp_path):
    write_tensors(Disk(), tmp_path / "x", [entry("a", torch.arange(6.0))], {})
    data = (tmp_path / "x").read_bytes()
    for broken in (b"", data[:5], data[:20], b"\xff" * 8 + data[8:], data[:8] + b"}" + data[9:]):
        (tmp_path / "x").write_bytes(broken)
        with pytest.raises(CheckpointError, match="/x"):
            TensorFile(tmp_path / "x")
    (tmp_path / "x").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        TensorFile(tmp_path / "x").read("a", 0, torch.empty(6))
    length = int.from_bytes(data[:8], "little")
    moved = json.loads(data[8 : 8 + length]) | {"a": {"dtype": "F32", "shape": [6], "data_offsets": [8, 32]}}
    text = json.dumps(moved).encode()
    hollow = len(text).to_bytes(8, "little") + text + bytes(8) + data[8 + length :]
    for extra in (data + b"\0", data + data, data + b"junk", hollow):  # the library refuses them, too
        (tmp_path / "x").write_bytes(extra)
        with pytest.raises(CheckpointError, match=r"/x: .*bytes (after the last|before 'a').* belong to no"):
            TensorFile(tmp_path / "x")
        with pytest.raises(SafetensorError):
            safetensors.torch.load_file(tmp_path / "x")
    (tmp_path / "x").write_bytes(data)
    file = TensorFile(tmp_path / "x")
    for key, out, message in (
        ("b", torch.empty(6), "found nothing"),
        ("a", torch.empty(6, dtype=torch.int32), "found F32"),
        ("a", torch.empty(7), "ends before element 7"),
    ):
        with pytest.raises(CheckpointError, match=message):
            file.read(key, 0, out)
    with pytest.raises(CheckpointError, match="No such file"):
        TensorFile(tmp_path / "y")


def test_a_dtype_that_cannot_be_stored_is_named():
    with pytest.raises(CheckpointError, match="complex64"):
        dtype_code(torch.complex64)
