"""What Python callers give to a sampler, and get back."""

from pathlib import Path

import pytest
import tiny_exports
import tiny_pipeline
import torch

import tokscale
from tokscale.base.errors import ConfigError, DataError
from tokscale.inference.pretrained import Pretrained


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Pretrained:
    folder: Path = tmp_path_factory.mktemp("exports")
    tiny_exports.make_exports(folder)
    found = tokscale.load(folder / "dalle")
    assert isinstance(found, Pretrained)
    return found


def test_one_text_is_one_image(model):
    drawn = model.sample("a small red circle", seed=3)
    assert drawn.shape == (1, 3, 8, 8) and torch.equal(drawn, model.sample(["a small red circle"], seed=3))


@pytest.mark.parametrize(
    ("prompts", "options", "answer"),
    [
        ([], {}, "prompts: none given"),
        ((), {}, "prompts: none given"),
        (["a", 7], {}, r"prompts\[1\]: got 7"),
        ([None], {}, r"prompts\[0\]: got None"),
        (["a"], {"batch_size": 0}, "batch_size: got 0"),
        (["a"], {"seeds": [1, 2]}, "1 prompts need as many seeds; got 2"),
        (["a"], {"temperature": float("inf")}, "temperature: got inf"),
        (["a"], {"temprature": 1}, "did you mean 'temperature'"),
        (["a"], {"output": "pli"}, "did you mean 'pil'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(model, prompts, options, answer):
    with pytest.raises(ConfigError, match=answer):
        model.sample(prompts, **options)


def test_pillow_images_on_request(model):
    drawn = model.sample(["a", "b"], seed=1, output="pil")
    assert [image.size for image in drawn] == [(8, 8)] * 2 and drawn[0].mode == "RGB"
    assert drawn[0].tobytes() == model.sample(["a", "b"], seed=1)[0].permute(1, 2, 0).numpy().tobytes()


def test_batches_come_one_by_one_and_are_the_same_images(model):
    coming = model.stream(["a", "b", "c"], seed=1, batch_size=2)
    assert next(coming).shape == (2, 3, 8, 8)
    rest = list(coming)
    assert len(rest) == 1 and torch.equal(rest[0][0], model.sample(["a", "b", "c"], seed=1)[2])


def test_what_is_loaded_says_so_on_one_line(model):
    assert repr(model).startswith("Pretrained(dalle, 0.0M parameters, 8 pixels, ") and "\n" not in repr(model)
    assert {"load", "load_dataset"} <= set(dir(tokscale))


def test_a_data_set_is_opened_by_its_folder(tmp_path):
    tiny_pipeline.make_inputs(tmp_path)
    assert tokscale.load_dataset(tmp_path / "data/tokens").samples == 64
    with pytest.raises(DataError, match="holds neither token shards"):
        tokscale.load_dataset(tmp_path)
