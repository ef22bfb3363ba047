"""Every shipped model configuration decodes strictly and builds without memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from tokscale.base.config import decode, encode, members_of
from tokscale.models.registry import MODELS, ModelConfig, build_model

FOLDER = Path(__file__).parents[3] / "configs" / "model"
FILES = sorted(FOLDER.glob("*/*.yaml"))
IMAGE = SimpleNamespace(num_tokens=8192, code_shape=(32, 32), image_size=256)
WORDS = SimpleNamespace(num_tokens=16384)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_model_config_builds_on_meta(file):
    config = decode(ModelConfig, yaml.safe_load(file.read_text()), where="model").fitted(IMAGE, WORDS)
    with torch.device("meta"):
        model = build_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000
    assert decode(ModelConfig, encode(config)) == config


def test_paper_12b_has_twelve_billion_weights_in_its_stack():
    config = decode(ModelConfig, yaml.safe_load((FOLDER / "dalle" / "paper_12b.yaml").read_text()))
    with torch.device("meta"):
        model = build_model(config.fitted(IMAGE, WORDS))
    weights = sum(parameter.numel() for parameter in model.stack.parameters())
    assert 11.9e9 < weights < 12.2e9


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("paper_370m", 352e6),
        ("paper_480m_imagenet", 453e6),
        ("paper_612m", 590e6),
        ("paper_654m_text", 590e6),
        ("paper_821m_imagenet", 793e6),
        ("paper_1b_imagenet", 1.36e9),
        ("paper_4b_imagenet", 3.77e9),
    ],
)
def test_rq_transformers_of_the_paper_have_its_weights_in_their_stacks(name, weights):
    config = decode(ModelConfig, yaml.safe_load((FOLDER / "rqtransformer" / f"{name}.yaml").read_text()))
    with torch.device("meta"):
        model = build_model(config.fitted(SimpleNamespace(num_tokens=16384, code_shape=(8, 8, 4)), WORDS))
    stacks = sum(parameter.numel() for stage in model.stages for parameter in stage.stack.parameters())
    assert stacks == pytest.approx(weights, rel=0.005)


@pytest.mark.parametrize(
    ("size", "millions", "digits"), [("350m", 352, 0), ("750m", 755, 0), ("3b", 3_020, -1), ("20b", 20_400, -1)]
)
def test_parti_has_the_papers_weights(size, millions, digits):
    config = decode(ModelConfig, yaml.safe_load((FOLDER / "parti" / f"paper_{size}.yaml").read_text()))
    with torch.device("meta"):
        model = build_model(config.fitted(IMAGE, WORDS))
    layers = [*model.decoder.layers, *model.condition.encoder.stack.children()]
    matrices = [p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2]
    assert round(sum(matrices) / 1e6, digits) == millions, "matrices alone: the paper's layers to the digit"
    everything = sum(parameter.numel() for parameter in model.parameters())
    tables = (8192 + 16384 + 64) * config.dim
    assert sum(matrices) + tables < everything < 1.002 * (sum(matrices) + tables)


def test_model_kinds_are_told_apart():
    kinds = {member.model_fields["kind"].default for member in members_of(ModelConfig)}
    assert {"dalle", "clip", "maskgit", "parti", "rqtransformer", "hierarchical"} <= kinds == set(MODELS)
    assert len(TypeAdapter(ModelConfig).json_schema()["anyOf"]) == len(MODELS)
