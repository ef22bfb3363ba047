"""The feature table of the tokenizers names every option, and tests that exist."""

import re
from pathlib import Path

from tokscale.tokenizers.quantize.config import FSQConfig, LFQConfig, ResidualConfig, VQConfig
from tokscale.tokenizers.vqgan.config import CNNConfig, ResNetConfig, ViTConfig, VQGANConfig
from tokscale.tokenizers.vqgan.discriminator import AdversarialConfig
from tokscale.tokenizers.vqgan.perceptual import PerceptualConfig

ROOT = Path(__file__).parents[3]
README = (ROOT / "tokscale/tokenizers/README.md").read_text()
CONFIGS = (
    VQGANConfig,
    CNNConfig,
    ResNetConfig,
    ViTConfig,
    VQConfig,
    ResidualConfig,
    LFQConfig,
    FSQConfig,
    AdversarialConfig,
    PerceptualConfig,
)


def test_every_option_stands_in_the_table():
    rows = "\n".join(line for line in README.splitlines() if line.startswith("|") and "tests/" in line)
    named = set(re.findall(r"`(\w+)[`.:]", rows))
    options = {name for config in CONFIGS for name in config.model_fields} - {"kind"}
    assert options <= named, options - named


def test_every_named_test_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
