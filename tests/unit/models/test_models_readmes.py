"""The feature tables name every option, and tests that exist."""

import re
from pathlib import Path

import pytest

from tokscale.models.clip import CLIPConfig
from tokscale.models.dalle import DALLEConfig, DALLESampling
from tokscale.models.maskgit import LowresConfig, MaskGitConfig, MaskGitSampling
from tokscale.models.parti import PartiConfig, PartiSampling
from tokscale.models.rqtransformer import HierarchicalConfig, RQSampling, RQTransformerConfig

ROOT = Path(__file__).parents[3]
TABLES = {
    "dalle": (DALLEConfig, DALLESampling),
    "clip": (CLIPConfig,),
    "maskgit": (MaskGitConfig, LowresConfig, MaskGitSampling),
    "parti": (PartiConfig, PartiSampling),
    "rqtransformer": (RQTransformerConfig, HierarchicalConfig, RQSampling),
}


def readme(model: str) -> str:
    return (ROOT / "tokscale" / "models" / model / "README.md").read_text()


@pytest.mark.parametrize("model", TABLES)
def test_every_option_stands_in_its_table(model):
    rows = [line for line in readme(model).splitlines() if line.startswith("|") and "tests/" in line]
    named = set(re.findall(r"`(\w+)[`(]", "\n".join(rows)))
    options = {name for config in TABLES[model] for name in config.model_fields} - {"kind"}
    assert options <= named, options - named


@pytest.mark.parametrize("model", TABLES)
def test_every_named_test_exists(model):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", readme(model))
    assert len(named) > 5
    for file, test in named:
        source = (ROOT / file).read_text()
        assert not test or f"def {test}(" in source, f"{file}::{test}"
