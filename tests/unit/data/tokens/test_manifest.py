"""The manifest: closes a folder, knows whose ids it holds, and an edit or a mix-up is refused by name."""

import json

import pytest
from token_folders import LetterTokenizer, make_tokens, record

from tokscale.base.errors import DataError
from tokscale.data.tokens.files import LocalFiles
from tokscale.data.tokens.manifest import StreamRecord, TextRecord, TokenDataset, read_token_manifest


class Tokenizer:
    num_tokens, image_size, channels, code_shape = 60_000, 16, 3, (2, 2)

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint

    def encode(self, pixels):
        raise AssertionError("not called")

    decode = encode


def test_a_data_set_reads_back(tmp_path):
    dataset = make_tokens(tmp_path, blocks=[4, 4, 3], shards=2)
    assert dataset.samples == 11 and dataset.sizes.tolist() == [4, 4, 3] and dataset.code_shape == (2, 2)
    assert dataset.read(2).captions(1) == ["9/0", "9/1"]
    assert TokenDataset(tmp_path).manifest == dataset.manifest
    dataset.close()
    assert dataset.read(0).captions(0) == ["0/0", "0/1"]  # opens again what it needs


def test_equal_content_has_an_equal_id_and_other_content_another(tmp_path):
    first, same = make_tokens(tmp_path / "a"), make_tokens(tmp_path / "b")
    other = make_tokens(tmp_path / "c", first=1)
    assert first.manifest.id == same.manifest.id != other.manifest.id


def test_ids_of_another_tokenizer_are_refused_naming_both(tmp_path):
    dataset = make_tokens(tmp_path)
    dataset.require({"codes": Tokenizer("f" * 64)})
    with pytest.raises(
        DataError, match=r"ids of the image tokenizer ffffffffffff, but this run uses abcabcabcabc.*again"
    ):
        dataset.require({"codes": Tokenizer("abc" * 20)})
    with pytest.raises(DataError, match=r"no stream 'codes\.low', only codes"):
        dataset.require({"codes.low": Tokenizer("f" * 64)})


def test_stored_text_is_only_its_own_tokenizers(tmp_path):
    text = TextRecord(tokenizer="letters", num_tokens=256, length=8)
    dataset = make_tokens(tmp_path, text=text)
    assert dataset.stored_text(LetterTokenizer(), 8) and not dataset.stored_text(LetterTokenizer(), 9)
    assert not make_tokens(tmp_path / "without").stored_text(LetterTokenizer(), 8)


def test_an_unfinished_folder_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.json: no such file.*tokscale tokenize"):
        TokenDataset(tmp_path)


@pytest.mark.parametrize(
    "change", [{"samples": 12}, {"run": "x" * 64}, {"id": "0" * 64}, {"variants": "many"}, {"version": 2}, {"extra": 1}]
)
def test_an_edited_manifest_is_refused(tmp_path, change):
    make_tokens(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"dataset\.json.*action=finalise"):
        read_token_manifest(tmp_path)


def test_a_damaged_index_is_refused(tmp_path):
    make_tokens(tmp_path)
    path = tmp_path / "index.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"index\.safetensors: missing or not the index"):
        TokenDataset(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"index\.safetensors: missing"):
        TokenDataset(tmp_path)


def test_more_shards_than_may_be_open_at_once(tmp_path):
    dataset = make_tokens(tmp_path, blocks=[1] * 70, shards=70)
    for _ in range(2):
        assert [dataset.read(block).captions(0)[0] for block in range(70)] == [f"{n}/0" for n in range(70)]
    assert isinstance(dataset.files, LocalFiles) and len(dataset.files._open) <= 64


def test_streams_describe_their_tokenizer():
    assert StreamRecord.of(Tokenizer("f" * 64)) == record()
