"""Text tokenizers on disk: our folders, Hugging Face folders and CLIP's two files."""

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tokscale.base.config import decode, encode
from tokscale.base.errors import DataError
from tokscale.base.files import read_json, write_json
from tokscale.base.text import lines_of
from tokscale.tokenizers.text.base import AnyTextTokenizer, OnLong
from tokscale.tokenizers.text.registry import TEXT_TOKENIZERS
from tokscale.tokenizers.text.tokenizer import PAD_TOKENS, SubwordTokenizer, TextTokenizerConfig, read_tables

_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def save_text_tokenizer(tokenizer: AnyTextTokenizer, folder: Path | str) -> None:
    """Write the tokenizer, then `config.json`: a folder with the latter is whole.

    Raises:
        StorageError: When the file system refuses.
    """
    tokenizer.save(Path(folder))
    write_json(Path(folder) / "config.json", encode(tokenizer.config))


def load_text_tokenizer(folder: Path | str, *, on_long: OnLong | None = None) -> AnyTextTokenizer:
    """The text tokenizer in a folder of ours, of Hugging Face (`tokenizer.json`), or of CLIP (two files).

    Args:
        folder: Read locally; nothing is fetched.
        on_long: Overrides what the folder says.

    Raises:
        DataError: When the folder has none of these files, or one is damaged or not valid.
    """
    tokenizer = _read(Path(folder))
    if on_long is not None:
        tokenizer.config = tokenizer.config.model_copy(update={"on_long": on_long})
    return tokenizer


def _read(folder: Path) -> AnyTextTokenizer:
    described = folder / "config.json"
    if os.path.lexists(described) and not described.is_file():
        raise DataError(f"{described}: is no regular file")
    if described.is_file() and "kind" in (values := read_json(described)):
        kind = str(values["kind"])
        if kind not in TEXT_TOKENIZERS:
            raise DataError(f"{described}, kind: got {kind!r}{TEXT_TOKENIZERS.advice(kind)}")
        known = TEXT_TOKENIZERS[kind]
        config = decode(known.config_class, values, where=str(described), refuse=DataError)
        return known.from_folder(config, folder)
    if (folder / "tokenizer.json").is_file():
        tables = read_tables(folder / "tokenizer.json")
        shift = 0 if _pads_with_zero(tables, folder) else 1
        return SubwordTokenizer(tables, TextTokenizerConfig(kind="hf", id_shift=shift))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return SubwordTokenizer(_clip_tables(folder), TextTokenizerConfig(kind="clip", id_shift=1))
    raise DataError(
        f"{folder}: no text tokenizer here. Give a folder with tokenizer.json (written by train-tokenizer, or copied "
        "from a Hugging Face model), or with CLIP's vocab.json and merges.txt"
    )


def _pads_with_zero(tables: Tokenizer, folder: Path) -> bool:
    """True when id 0 already is padding: by its name, and not contradicted by `tokenizer_config.json`."""
    first = tables.id_to_token(0)
    settings = folder / "tokenizer_config.json"
    declared: Any = read_json(settings).get("pad_token") if settings.is_file() else first
    if isinstance(declared, dict):  # a serialised AddedToken
        declared = declared.get("content")
    return first in PAD_TOKENS and declared == first


def _clip_tables(folder: Path) -> Tokenizer:
    """CLIP's lower-cased BPE from its two files (Radford et al. 2021), without its start and end tokens."""
    try:
        vocabulary = read_json(folder / "vocab.json")
        if "<|startoftext|>" not in vocabulary:  # GPT-2's files have the same names
            raise ValueError("no <|startoftext|> among the words")
        lines = lines_of((folder / "merges.txt").read_text("utf-8"))
        merges = [(first, second) for first, second in (line.split(" ") for line in lines if _is_merge(line))]
        model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    except (ValueError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{folder}: vocab.json and merges.txt are not CLIP's ({error})") from error
    tables = Tokenizer(model)
    tables.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    tables.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tables.decoder = decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()])
    return tables


def _is_merge(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#version")
