"""A package that adds a model, an image and a text tokenizer and a stage to tokscale: what its files hold."""

from pathlib import Path

MODEL = '''
"""Codes from the mean of the caption's words."""

from typing import Literal

import torch
from torch import nn

from tokscale.base.batch import LossOutput
from tokscale.base.config import Config
from tokscale.base.rng import generator
from tokscale.models.model import AnyModelConfig, GenerativeModel


class WordBagConfig(AnyModelConfig):
    """A bag of words."""

    kind: Literal["word_bag"] = "word_bag"
    dim: int = 8
    """Width."""
    text_seq_len: int = 6
    """Words read."""
    num_text_tokens: int | None = None
    num_image_tokens: int | None = None
    image_grid: tuple[int, int] | None = None

    def fitted(self, image, text):
        sizes = {"num_image_tokens": image.num_tokens, "image_grid": tuple(image.code_shape)}
        return self.model_copy(update=sizes | {"num_text_tokens": text.num_tokens})


class WordBagSampling(Config):
    """How to draw."""

    temperature: float = 1.0
    """Divides the logits."""


class WordBag(GenerativeModel):
    config_class = WordBagConfig
    sampling_config = WordBagSampling

    def __init__(self, config):
        super().__init__()
        self.config = config
        height, width = config.image_grid
        self.words = nn.Embedding(config.num_text_tokens, config.dim)
        self.places = nn.Embedding(height * width, config.dim)
        self.head = nn.Linear(config.dim, config.num_image_tokens)

    @property
    def text_seq_len(self):
        return self.config.text_seq_len

    def logits(self, text, text_mask):
        real = text_mask[..., None].to(self.words.weight.dtype)
        bag = (self.words(text) * real).sum(1) / real.sum(1).clamp(min=1)
        return self.head(bag[:, None] + self.places.weight)

    def forward(self, batch):
        logits = self.logits(batch.text, batch.text_mask)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.codes.flatten())
        return LossOutput(loss, {"image": loss})

    def train_flops(self):
        return 6.0 * self.head.weight.numel() * self.places.num_embeddings

    def generate_codes(self, text, text_mask, *, options, seeds, extra=None):
        chances = (self.logits(text, text_mask) / options.temperature).softmax(-1)
        drawn = [
            torch.multinomial(row, 1, generator=generator(seed, "word_bag")).view(self.config.image_grid)
            for row, seed in zip(chances, seeds, strict=True)
        ]
        return torch.stack(drawn)
'''

TOKENIZER = '''
"""Sixteen greys, one for each square of pixels."""

from typing import Literal

import torch
from torch import nn

from tokscale.base.config import Config
from tokscale.tokenizers.codec import ImageCodec


class GreysConfig(Config):
    """Squares of grey."""

    kind: Literal["greys"] = "greys"
    image_size: int = 16
    """Side of the images, in pixels."""
    square: int = 4
    """Side of a square, in pixels."""


class Greys(ImageCodec):
    config_class = GreysConfig
    version = "greys/1"

    def __init__(self, config):
        super().__init__()
        self.config, self.image_size, self.channels, self.num_tokens = config, config.image_size, 3, 16
        side = config.image_size // config.square
        self.code_shape = (side, side)
        self.register_buffer("levels", torch.arange(16) / 15)

    def fingerprint_fields(self):
        return self.config.model_dump(mode="json")

    def features(self, pixels):
        return nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), self.config.square)

    def quantize(self, features):
        return (features[:, 0, ..., None] - self.levels).abs().argmin(-1)

    def decode_to_unit_range(self, codes):
        grey = self.levels[codes].repeat_interleave(self.config.square, 1).repeat_interleave(self.config.square, 2)
        return grey[:, None].expand(-1, 3, -1, -1)
'''

TEXT = '''
"""One id for each letter of the captions."""

import json
from typing import Literal

from tokscale.tokenizers.fingerprint import tokenizer_fingerprint
from tokscale.tokenizers.text.base import AnyTextTokenizer, AnyTextTokenizerConfig, TextTrainingConfig


class LettersConfig(AnyTextTokenizerConfig):
    """What the folder says."""

    kind: Literal["letters"] = "letters"


class LettersTraining(TextTrainingConfig):
    """The letters of all captions."""

    kind: Literal["letters"] = "letters"
    most: int = 100
    """Letters that get an id."""


class Letters(AnyTextTokenizer):
    config_class = LettersConfig
    training_config = LettersTraining

    def __init__(self, config, letters):
        super().__init__()
        self.config, self.letters, self.num_tokens = config, letters, 1 + len(letters)
        self.fingerprint = tokenizer_fingerprint("letters/1", {}, letters)

    def encode_ragged(self, captions):
        return [[1 + self.letters.index(letter) for letter in text if letter in self.letters] for text in captions]

    def decode(self, ids):
        return ["".join(self.letters[token - 1] for token in row if token) for row in ids.tolist()]

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "letters.json").write_text(json.dumps(self.letters))

    @classmethod
    def from_folder(cls, config, folder):
        return cls(config, json.loads((folder / "letters.json").read_text()))

    @classmethod
    def trained(cls, config, captions, folder):
        letters = "".join(sorted({letter for caption in captions for letter in caption})[: config.most])
        return cls(LettersConfig(on_long=config.on_long), letters)
'''

STAGE = '''
"""write a folder of the greys tokenizer"""

from tokscale.base.config import PathKey
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.tokenizers.image import save_image_tokenizer
from word_bag.tokenizer import Greys, GreysConfig


class GreysStageConfig(StageConfig):
    """Keys of the `greys` stage."""

    out: PathKey
    """Receives the tokenizer."""


CONFIG = GreysStageConfig


def run(config, env):
    save_image_tokenizer(Greys(GreysConfig()), config.out)
    return StageResult(f"{config.out} holds the greys", {"image_tokenizer": config.out})
'''

ENTRY_POINTS = """[tokscale.models]
word_bag = word_bag.model:WordBag

[tokscale.tokenizers]
greys = word_bag.tokenizer:Greys

[tokscale.text_tokenizers]
letters = word_bag.text:Letters

[tokscale.stages]
greys = word_bag.stage
"""


def install(site: Path, entry_points: str = ENTRY_POINTS) -> None:
    """Put the package into a folder of packages, as pip would."""
    package = site / "word_bag"
    package.mkdir(parents=True)
    files = {"__init__": "", "model": MODEL, "tokenizer": TOKENIZER, "text": TEXT, "stage": STAGE}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text.lstrip())
    about = site / "word_bag-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: word-bag\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)
