"""A super-resolution model takes the sizes of its low-resolution codes from the data, and contradicts none of them."""

from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline

from tokscale.base.batch import LOWRES_CODES
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.data.tokens.manifest import StreamRecord
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.stages.inputs import Inputs, open_inputs
from tokscale.stages.train import TrainConfig

LOW = StreamRecord(tokenizer="a" * 64, num_tokens=10, code_shape=(2, 3), image_size=4)
MODEL = {"kind": "maskgit", "dim": 8, "depth": 1, "heads": 1, "dim_head": 8, "text_seq_len": 6}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("superres")
    tiny_pipeline.make_inputs(folder)
    shards = {"codes_low": LOW, "levels": LOW.model_copy(update={"code_shape": (2, 3, 2)})}
    for name, low in shards.items():
        tiny_pipeline.make_token_shards(folder / name / "tokens", folder / "image_tokenizer", low=low)
    return folder


def opened(pipeline: Path, data: str = "codes_low", **lowres: Any) -> Inputs:
    values = {
        "run_dir": pipeline,
        "data_dir": pipeline / data,
        "model": MODEL | {"condition": {"kind": "caption", "depth": 1, "heads": 1, "dim_head": 8}, "lowres": lowres},
        "batch_size": 4,
    }
    return open_inputs(decode(TrainConfig, values), Comm(ProcessEnv()))


@pytest.mark.parametrize("given", [{}, {"num_tokens": 10, "image_grid": (2, 3), "fingerprint": LOW.tokenizer}])
def test_sizes_come_from_the_stream(pipeline, given):
    inputs = opened(pipeline, **given)
    lowres = inputs.model.lowres
    assert (lowres.num_tokens, lowres.image_grid, lowres.fingerprint) == (10, (2, 3), LOW.tokenizer)
    batch = inputs.loader.next_batch()
    inputs.loader.close()
    assert batch.codes.shape == (4, 4, 4) and batch.extra[LOWRES_CODES].shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_tokens": 12}, r"model\.lowres\.num_tokens: got 12, but the {stream} has 10; leave the key out"),
        ({"image_grid": (3, 2)}, r"model\.lowres\.image_grid: got \(3, 2\), but the {stream} has \(2, 3\)"),
        ({"fingerprint": "b" * 64}, r"model\.lowres\.fingerprint: got 'bbbb.*, but the {stream} has 'aaaa"),
        ({"shared_emb": True}, r"model\.lowres\.shared_emb: the {stream} has 10 codes, the model's own table 12"),
    ],
)
def test_settings_that_contradict_the_stream_are_refused(pipeline, given, words):
    with pytest.raises(ConfigError, match=words.format(stream=r"stream codes\.low of .*/codes_low/tokens")):
        opened(pipeline, **given)


def test_residual_levels_are_refused(pipeline):
    with pytest.raises(ConfigError, match=r"one code per grid cell, but the stream .*levels/tokens has \(2, 3, 2\)"):
        opened(pipeline, "levels")
