"""Captions as states of a frozen language model: the encoder half of T5, CLIP's text tower, and others of their kind.

The transformers library reads a folder that was fetched before. Deliberately no `nn.Module` holds the result: a model
that uses it neither trains, decays, moves nor saves it, and its own `train()` cannot switch on the encoder's dropout.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from einops import rearrange
from tokenizers import Tokenizer as Tables

from tokscale.base.errors import CheckpointError, ConfigError, DataError, EnvironmentRefused
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.tokenizers.codec import arithmetic
from tokscale.tokenizers.fingerprint import tokenizer_fingerprint, weights_sha256
from tokscale.tokenizers.stored_buffers import refuse_unread
from tokscale.tokenizers.text.cut import CutCaptions
from tokscale.tokenizers.text.tokenizer import tables_sha256

EncoderPrecision = Literal["fp32", "bf16"]
"""Of weights and arithmetic. Never fp16: T5 was trained in bfloat16, and its activations overflow fp16."""
DEFAULT_LENGTH = 256
_VERSION = "text-encoder/1"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WORDS = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_TOGETHER = 64
"""Captions encoded at once. A batch is sorted by length first, so each such part is padded to its own longest only."""


class FrozenTextEncoder:
    """A language model that is used and never trained: `base.protocols.TextEncoder`. Each process has its own copy."""

    def __init__(self, model: Any, tables: Tables, *, precision: EncoderPrecision, length: int):
        """Take both over: the model is put into evaluation mode, and its parameters stop requiring gradients.

        Args:
            model: An encoder of the transformers library: ids and a mask in, `last_hidden_state` out.
            tables: Its tokenizer, which adds the tokens that mark beginning and end.
            precision: Of the weights.
            length: Captions are cut to so many tokens, or fewer when the model has no positions for more.
        """
        tables.no_padding()
        tables.no_truncation()
        tables.encode_special_tokens = True  # a caption that spells a special token is still plain text
        self._model = model.to(_DTYPES[precision]).eval().requires_grad_(False)
        self.device = torch.device("cpu")
        self.precision: EncoderPrecision = precision
        self.length = min(length, _positions(model.config) or length)
        self.width: int = model.config.hidden_size
        identity = {"precision": precision, "length": self.length, "tables": tables_sha256(tables)}
        identity["kind"] = model.config.model_type
        self.fingerprint = tokenizer_fingerprint(_VERSION, identity, weights_sha256(model.state_dict()))
        tables.enable_truncation(self.length)  # special tokens are kept, and counted
        self._tables = tables
        self.cut = CutCaptions()
        """What did not fit so far."""

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; returns itself."""
        self.device = torch.device(device)
        self._model.to(self.device)
        return self

    def tokenize(self, captions: Sequence[str]) -> tuple[Int[Tensor, "batch words"], Bool[Tensor, "batch words"]]:
        """The encoder's own ids on the CPU, as wide as the longest caption needs, and a mask that is True at them.

        Safe in a thread of its own.
        """
        encodings = self._tables.encode_batch_fast([caption.strip() for caption in captions], add_special_tokens=True)
        lengths = torch.tensor([len(encoding.ids) for encoding in encodings], dtype=torch.int64)
        for encoding in encodings:
            self.cut.add(
                len(encoding.ids) + sum(rest.special_tokens_mask.count(0) for rest in encoding.overflowing), self.length
            )
        longest = int(lengths.max()) if len(lengths) else 0
        ids = torch.zeros(len(encodings), longest, dtype=torch.int64)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids, dtype=torch.int64)
        return ids, torch.arange(longest) < rearrange(lengths, "b -> b 1")

    def states(
        self, ids: Int[Tensor, "batch words"], mask: Bool[Tensor, "batch words"]
    ) -> Float[Tensor, "batch words width"]:
        """States of ids, on the encoder's device and in its precision; zero at padding."""
        lengths = mask.sum(1)
        longest_first = lengths.argsort(descending=True, stable=True)
        ids, mask = ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)
        found = torch.zeros(*ids.shape, self.width, dtype=_DTYPES[self.precision], device=self.device)
        with torch.inference_mode(), arithmetic(self.device, "fp32"):
            for rows in longest_first.split(_TOGETHER):
                words = int(lengths[rows].max()) if len(rows) else 0
                if not words:
                    break
                rows = rows.to(self.device)
                seen = mask[rows, :words]
                made = self._model(input_ids=ids[rows, :words], attention_mask=seen.long()).last_hidden_state
                found[rows, :words] = made.masked_fill(~rearrange(seen, "b w -> b w 1"), 0.0)
        return found  # a tensor of outside inference mode: layers may save it for their backward pass

    def encode(self, captions: Sequence[str]) -> tuple[Float[Tensor, "batch words width"], Bool[Tensor, "batch words"]]:
        """States and mask of captions, both on the encoder's device."""
        ids, mask = self.tokenize(captions)
        return self.states(ids, mask), mask.to(self.device)


def load_text_encoder(
    folder: Path | str,
    *,
    precision: EncoderPrecision = "bf16",
    length: int = DEFAULT_LENGTH,
    device: torch.device | str = "cpu",
) -> FrozenTextEncoder:
    """The text encoder in a folder of the transformers library. Nothing is fetched, no code of the folder is run.

    Args:
        folder: Holds `config.json`, `tokenizer.json` and the weights as safetensors: of T5 (whole or its encoder
            half), of CLIP (whole or its text tower), or of any bidirectional language model.
        precision: Of weights and arithmetic.
        length: Captions are cut to so many tokens.
        device: Where to encode.

    Raises:
        EnvironmentRefused: When the library is not installed.
        DataError: When the folder, its configuration or its tokenizer is missing or damaged.
        CheckpointError: When the weights are missing, incomplete, damaged, or not safetensors.
        ConfigError: When the folder holds a model that is no text encoder.
    """
    folder = Path(folder)
    _require_files(folder)
    with _quiet():
        model, tables = _read_model(folder, _DTYPES[precision]), _read_tables(folder)
    return FrozenTextEncoder(model, tables, precision=precision, length=length).to(device)


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"text_encoder: {folder} is no folder; fetch the encoder first and give its local path")
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json, so this is no text encoder of the transformers library")
    if not any((folder / name).is_file() for name in _WORDS):
        raise DataError(f"{folder}: no tokenizer.json; a text encoder needs the tokenizer that it was trained with")
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none at all"
        raise CheckpointError(
            f"{folder}: no weights as safetensors (found {found}); other files could run code when they are opened, "
            "so convert them once with the transformers library: `save_pretrained`"
        )


def _read_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig  # here and below, since importing the library takes seconds

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its parts do
        raise DataError(f"{folder}/config.json: not a configuration that transformers knows ({error})") from error
    try:
        model, report = _encoder_class(folder, config).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ConfigError:
        raise
    except Exception as error:  # the library raises whatever its parts do
        raise CheckpointError(f"{folder}: the weights cannot be read ({error}); fetch them again") from error
    # Some checkpoints come without the head that pools a sentence; nothing here reads it.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights of {type(model).__name__} are missing and would be random: "
            f"{', '.join(missing[:5])}; fetch all files of the model"
        )
    refuse_unread(model, folder, report["unexpected_keys"])
    return model


def _encoder_class(folder: Path, config: Any) -> Any:
    from transformers import AutoModel, AutoModelForTextEncoding, CLIPTextModel

    if config.model_type in ("clip", "clip_text_model"):
        return CLIPTextModel
    if type(config) in AutoModelForTextEncoding._model_mapping:  # T5 and its relatives: the encoder half alone
        return AutoModelForTextEncoding
    if config.is_encoder_decoder or not isinstance(getattr(config, "hidden_size", None), int):
        raise ConfigError(
            f"{folder}: a model of type {config.model_type!r} is no text encoder; give T5, CLIP, BERT or another "
            "model that turns a text into one state a token"
        )
    return AutoModel


def _read_tables(folder: Path) -> Tables:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer
    except Exception as error:  # the library raises whatever its parts do
        raise DataError(
            f"{folder}: no tokenizer that can be read ({error}); fetch tokenizer.json, or write it once with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
        ) from error


def _positions(config: Any) -> int | None:
    """Most tokens that a model has positions for; None when they are relative."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    return positions - 2 if "roberta" in config.model_type else positions  # its positions begin after the padding id


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's report of decoder weights that are left out, and its progress bar."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise EnvironmentRefused(
            "a text encoder needs the transformers library: pip install 'tokscale[text-encoder]'"
        ) from error
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
