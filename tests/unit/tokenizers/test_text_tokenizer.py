import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tokscale.base.errors import ConfigError, DataError
from tokscale.tokenizers.text import (
    SubwordTokenizer,
    TextTokenizerConfig,
    load_text_tokenizer,
    save_text_tokenizer,
    train_bpe,
)

CAPTIONS = ["a small red circle", "a large blue square left of a small red circle", "two green stars"] * 5


@pytest.fixture
def bpe(tmp_path):
    return train_bpe(CAPTIONS, 320, tmp_path / "bpe")


def hf_folder(folder, first="[PAD]", pad="[PAD]", settings=None):
    """A word-level tokenizer in Hugging Face's layout, with truncation, padding and an end token of its own."""
    words = [first, "[UNK]", "[SEP]", "a", "red", "circle"]
    tables = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tables.pre_tokenizer = pre_tokenizers.Whitespace()
    tables.normalizer = normalizers.Lowercase()
    tables.add_special_tokens([AddedToken(token) for token in (pad, "[SEP]") if token in words])
    tables.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 2)])
    tables.enable_truncation(2)
    tables.enable_padding(length=7)
    folder.mkdir(exist_ok=True)
    tables.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def clip_folder(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet]
    words += ["re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return folder


def test_bpe_round_trips_any_text_without_an_unknown_token(bpe):
    texts = ["a small red circle", "été 🎉  zwei\ttabs", "[PAD] <pad>", "日本語 ~ ¡", ""]
    ids, mask = bpe.encode(texts, 64)
    assert bpe.decode(ids) == texts
    assert torch.equal(ids != 0, mask)
    assert ids.max() < bpe.num_tokens <= 320


def test_bpe_gives_a_common_word_one_id_wherever_it_stands(bpe):
    ids, mask = bpe.encode(["red small", "small red"], 8)
    assert mask.sum(dim=1).tolist() == [2, 2]
    assert ids[0, 0] == ids[1, 1]


def test_id_zero_is_padding_and_no_real_token(bpe, tmp_path):
    clip = load_text_tokenizer(clip_folder(tmp_path / "clip"))
    for tokenizer in (bpe, clip):
        # every byte, so that the token with the lowest id of the tables is among them: '!' in CLIP's vocabulary
        ids, mask = tokenizer.encode(["".join(map(chr, range(33, 127)))], 256)
        assert torch.equal(ids != 0, mask)
        assert mask.sum() > 50
    assert clip.encode(["a!"], 4)[0].tolist() != clip.encode(["a"], 4)[0].tolist()
    assert clip.decode(clip.encode(["a !!b"], 8)[0]) == ["a !! b"]
    assert clip.decode(torch.tensor([[1, 0, 0]])) == ["!"]


def test_tables_with_a_real_token_at_zero_need_the_shift(tmp_path):
    tables = Tokenizer(models.WordLevel({"!": 0, "a": 1}, unk_token="a"))
    with pytest.raises(ConfigError, match="id 0 of these tables is the real token '!'"):
        SubwordTokenizer(tables, TextTokenizerConfig(kind="hf", id_shift=0))


def test_training_twice_gives_the_same_tables(bpe, tmp_path):
    again = train_bpe(iter(CAPTIONS), 320, tmp_path / "again")
    other = train_bpe(CAPTIONS, 270, tmp_path / "other")
    assert again.fingerprint == bpe.fingerprint != other.fingerprint
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "bpe/tokenizer.json").read_bytes()


def test_a_folder_gives_back_the_tokenizer(bpe, tmp_path):
    loaded = load_text_tokenizer(tmp_path / "bpe")
    assert loaded.fingerprint == bpe.fingerprint
    assert loaded.config == bpe.config
    assert torch.equal(loaded.encode(CAPTIONS, 20)[0], bpe.encode(CAPTIONS, 20)[0])


def test_long_captions_are_cut_and_counted_or_refused(bpe, tmp_path):
    long = CAPTIONS[1]
    whole = bpe.encode_ragged([long])[0]
    ids, mask = bpe.encode(["red", long, long], 4)
    assert ids[1].tolist() == whole[:4]
    assert mask[1].all()
    assert bpe.cut.cut == 2
    strict = load_text_tokenizer(tmp_path / "bpe", on_long="error")
    assert strict.encode([long], len(whole))[1].all()
    with pytest.raises(DataError, match=rf"'{long}' has {len(whole)} tokens, more than the 4 that fit"):
        strict.encode(["red", long], 4)
    assert strict.fingerprint == bpe.fingerprint  # the ids it gives are the same


def test_training_needs_room_for_every_byte_and_a_caption(tmp_path):
    with pytest.raises(ConfigError, match="got 256; padding and the 256 bytes need 257"):
        train_bpe(CAPTIONS, 256, tmp_path)
    with pytest.raises(DataError, match="no captions"):
        train_bpe([], 300, tmp_path)
    assert not list(tmp_path.iterdir())


def test_hugging_face_folder_keeps_its_ids_where_zero_already_pads(tmp_path):
    tokenizer = load_text_tokenizer(hf_folder(tmp_path / "hf"))
    ids, mask = tokenizer.encode(["A red circle"], 6)
    assert ids.tolist() == [[3, 4, 5, 0, 0, 0]]
    assert mask.sum() == 3
    assert tokenizer.num_tokens == 6
    assert tokenizer.config.id_shift == 0


@pytest.mark.parametrize(
    ("first", "pad", "settings"),
    [("!", "[UNK]", None), ("[PAD]", "[PAD]", {"pad_token": {"content": "[UNK]"}}), ("[PAD]", "[PAD]", {})],
)
def test_hugging_face_ids_move_up_where_zero_is_a_real_token(tmp_path, first, pad, settings):
    tokenizer = load_text_tokenizer(hf_folder(tmp_path / "hf", first, pad, settings))
    assert tokenizer.encode(["a red circle"], 4)[0].tolist() == [[4, 5, 6, 0]]
    assert tokenizer.decode(torch.tensor([[4, 5, 6, 0]])) == ["a red circle"]
    assert tokenizer.num_tokens == 7


def test_special_tokens_of_a_hugging_face_folder_are_an_option(tmp_path):
    plain = load_text_tokenizer(hf_folder(tmp_path / "hf"))
    config = plain.config.model_copy(update={"add_special_tokens": True})
    special = SubwordTokenizer(plain.tables, config)
    save_text_tokenizer(special, tmp_path / "saved")
    loaded = load_text_tokenizer(tmp_path / "saved")
    assert loaded.encode(["a red circle"], 5)[0].tolist() == [[3, 4, 5, 2, 0]]
    assert loaded.fingerprint == special.fingerprint != plain.fingerprint


def test_clip_ids_are_those_of_transformers_moved_up_by_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = clip_folder(tmp_path / "clip")
    original = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = load_text_tokenizer(folder)
    texts = ["A Red! dog's", "red  red\nred", "naïve 42 <|endoftext|"]
    for text, ids in zip(texts, tokenizer.encode_ragged(texts), strict=True):
        assert [token - 1 for token in ids] == original(text, add_special_tokens=False).input_ids
    assert tokenizer.num_tokens == 512 + 4 + 1
    save_text_tokenizer(tokenizer, tmp_path / "saved")
    assert load_text_tokenizer(tmp_path / "saved").encode_ragged(texts) == tokenizer.encode_ragged(texts)


def test_folders_that_hold_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(DataError, match="no text tokenizer here"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "bpe"}')
    with pytest.raises(DataError, match=r"tokenizer.json: no such file"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match="not a tokenizer"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "bqe"}')
    with pytest.raises(DataError, match="kind: got 'bqe'"):
        load_text_tokenizer(tmp_path)
    clip = clip_folder(tmp_path / "clip")
    (clip / "merges.txt").write_text("one two three\n")
    with pytest.raises(DataError, match="are not CLIP's"):
        load_text_tokenizer(clip)
    clip = clip_folder(tmp_path / "clip")
    (clip / "vocab.json").write_text('{"!": 0, "<|endoftext|>": 1}')  # as GPT-2's
    with pytest.raises(DataError, match="are not CLIP's"):
        load_text_tokenizer(clip)


def test_decoders_of_the_tables_are_used():
    tables = Tokenizer(models.WordLevel({"[PAD]": 0, "ab": 1, "##c": 2}, unk_token="ab"))
    tables.decoder = decoders.WordPiece()
    tokenizer = SubwordTokenizer(tables, TextTokenizerConfig(kind="hf"))
    assert tokenizer.decode(torch.tensor([[1, 2, 0]])) == ["abc"]
