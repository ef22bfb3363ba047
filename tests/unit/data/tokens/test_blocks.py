"""Block tars: reproducible, readable by anyone, and damage never passes."""

import json
import tarfile
import zlib

import numpy as np
import pytest

from tokscale.base.errors import DataError
from tokscale.data.tokens.blocks import (
    BlockRecord,
    ShardRecord,
    ShardWriter,
    TokenSample,
    code_dtype,
    pack,
    read_block,
    unpack,
    unpack_blocks,
)


def make_sample(number: int, captions: tuple[str, ...] = ("a red circle",)) -> TokenSample:
    return TokenSample(
        key=f"key-{number}",
        captions=captions,
        codes={"codes": np.full((2, 3), 40_000 + number), "codes.low": np.full((1, 1), number)},
        source=(1, number),
        size=(64, 70_000),
        crop=np.array([0, 0, 64, 64], np.float32),
        text=[np.arange(len(caption)) for caption in captions],
        scores={"aesthetic": number / 2},
    )


DTYPES = {"codes": code_dtype(65_536), "codes.low": code_dtype(1 << 18)}


def write(path, samples: int = 10, block_size: int = 4) -> ShardRecord:
    with open(path, "wb") as file:
        writer = ShardWriter(file, {"version": 1})
        for start in range(0, samples, block_size):
            numbers = range(start, min(start + block_size, samples))
            captions = [("ein roter Kreis, größer", "赤い円", "") if n % 3 == 0 else (f"caption {n}",) for n in numbers]
            rows = [make_sample(n, c) for n, c in zip(numbers, captions, strict=True)]
            writer.add(pack(rows, DTYPES), len(rows))
        return writer.finish(path.name)


def test_what_is_packed_is_unpacked():
    rows = [make_sample(0, ("größer", "赤い円")), make_sample(1, ()), make_sample(2, ("", "x"))]
    block = unpack(pack(rows, DTYPES))
    assert [block.captions(i) for i in range(3)] == [["größer", "赤い円"], [], ["", "x"]]
    assert block.keys(np.arange(3)) == ["key-0", "key-1", "key-2"]
    assert block.tensors["codes"].dtype == np.uint16 and block.tensors["codes.low"].dtype == np.uint32
    assert block.tensors["codes"][2].tolist() == [[40_002] * 3] * 2  # not wrapped to negative
    assert block.tensors["wh"][0].tolist() == [64, 65_535]  # saturated, not wrapped
    assert block.tensors["score.aesthetic"].tolist() == [0, 0.5, 1]
    assert block.tensors["text_off"].tolist() == [0, 6, 9, 9, 10]
    hashes = block.tensors["hash"]
    assert len(set(hashes.tolist())) == 3 and unpack(pack(rows[:1], DTYPES)).tensors["hash"][0] == hashes[0]


def test_a_block_without_any_caption():
    block = unpack(pack([make_sample(0, ())], DTYPES))
    assert block.captions(0) == [] and block.tensors["text"].shape == (0,)


def test_equal_content_gives_equal_bytes_in_plain_ustar(tmp_path):
    first, second = write(tmp_path / "a.tar"), write(tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert first.sha256 == second.sha256 and first.bytes == (tmp_path / "a.tar").stat().st_size
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
        assert all(
            not member.pax_headers and member.mtime == 0 for member in members
        )  # a PAX header costs 1 KB per member
        names = [member.name for member in members]
        assert names == ["__tokscale__", *(f"{n:09d}.tok.safetensors" for n in (0, 4, 8))]
        assert [(m.offset_data, m.size) for m in members[1:]] == [(b.offset, b.size) for b in first.blocks]
        header = tar.extractfile(members[0])
        assert header is not None and json.load(header) == {"version": 1}


def test_records_survive_json(tmp_path):
    record = write(tmp_path / "a.tar")
    assert ShardRecord.model_validate_json(record.model_dump_json()) == record


def test_blocks_are_read_by_offset(tmp_path):
    record = write(tmp_path / "a.tar")
    with open(tmp_path / "a.tar", "rb") as file:
        block = read_block(file.fileno(), record.blocks[2], "a.tar")
    assert block.keys(np.arange(len(block))) == ["key-8", "key-9"]


@pytest.mark.parametrize("tensor_byte", [10, 2000])
def test_a_flipped_bit_is_noticed(tmp_path, tensor_byte):
    record = write(tmp_path / "a.tar", samples=20, block_size=20)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[record.blocks[0].offset + tensor_byte] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(DataError, match=r"a\.tar.*checksum.*verify"):
        read_block(file.fileno(), record.blocks[0], "a.tar")


def test_a_cut_shard_is_noticed(tmp_path):
    record = write(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: record.blocks[2].offset])  # the cut that a tar walk does not see
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(DataError, match="has 0 of"):
        read_block(file.fileno(), record.blocks[2], "a.tar")


def test_other_bytes_are_not_a_block(tmp_path):
    with pytest.raises(DataError, match="not a token block"):
        unpack(b"JFIF" * 100, "x.tar")
    path = tmp_path / "x"
    path.write_bytes(b"x" * 100)
    with open(path, "rb") as file, pytest.raises(DataError, match="not a token block"):
        read_block(file.fileno(), BlockRecord(0, 100, 1, zlib.crc32(b"x" * 100)), "x.tar")


def test_stock_webdataset_streams_single_samples(tmp_path):
    wds = pytest.importorskip("webdataset")
    write(tmp_path / "shard-000000.tar")
    write(tmp_path / "shard-000001.tar", samples=3)
    data = wds.WebDataset(str(tmp_path / "shard-{000000..000001}.tar"), shardshuffle=False).compose(unpack_blocks)
    samples = list(data)
    assert [sample["__key__"] for sample in samples] == [f"key-{n}" for n in [*range(10), *range(3)]]
    assert samples[3]["captions"] == ["ein roter Kreis, größer", "赤い円", ""]
    assert samples[4]["txt"] == "caption 4" and samples[4]["codes"][0, 0] == 40_004


def test_a_stream_of_other_members_gives_nothing():
    assert list(unpack_blocks([{"__key__": "x", "jpg": b"..."}])) == []


@pytest.mark.parametrize("tokens,size", [(1024, 2), (64_000, 2), (65_536, 2), (65_537, 4), (1 << 18, 4)])
def test_the_smallest_sufficient_dtype(tokens, size):
    dtype = code_dtype(tokens)
    assert dtype.itemsize == size and np.array(tokens - 1, dtype) == tokens - 1
