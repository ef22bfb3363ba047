"""Workers die at any moment, by SIGKILL; what they were making is made once, to the last byte as if undisturbed."""

import io
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_encoders
import torch
from killing import Work, contents, disturbed, fast_starting
from PIL import Image
from tokenize_process import work_until_asked

from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.data.tokenization.leases import Leases
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.image import save_image_tokenizer

UNITS = 6
SHAPES = ((16, 16), (16, 24), (24, 16))
"""Rows and columns of the images."""
KINDS: dict[str, dict[str, Any]] = {"squares": {}, "buckets": {"buckets": ("16x16", "24x16", "16x24")}}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    with torch.random.fork_rng():
        config = DiscreteVAEConfig(image_size=16, num_tokens=64, codebook_dim=8, num_layers=2, hidden_dim=8)
        save_image_tokenizer(DiscreteVAE(config), folder / "tokenizer")
    text_encoders.save_t5(folder / "t5")
    values = np.random.default_rng(0)
    for shard in range(UNITS):
        records = [_record(shard, row, values) for row in range(60)]
        write_shard(folder / "raw" / f"{shard:05d}.tar", records)
        (folder / "raw" / f"{shard:05d}_stats.json").write_text('{"successes": 60}')
    return folder


def _record(shard: int, row: int, values: np.random.Generator) -> RawRecord:
    stream = io.BytesIO()
    Image.fromarray(values.integers(0, 256, (*SHAPES[row % 3], 3)).astype(np.uint8)).save(stream, "PNG")
    data = stream.getvalue() if row else b"poison"  # one sample of each shard is left out
    return RawRecord(f"{shard:05d}{row:04d}", data, "png", f"a small circle on the mat {shard} {row}")


@pytest.fixture(scope="module")
def undisturbed(root) -> Callable[[str], Work]:
    processes = fast_starting("transformers.models.t5.modeling_t5")

    @cache
    def made(kind: str) -> Work:
        work = Work(processes, root, root / kind, KINDS[kind])
        work.finish("all")
        return work

    return made


@pytest.fixture(scope="module")
def squares(undisturbed) -> Work:
    return undisturbed("squares")


def _tokenize_round(like: Work, number: int) -> int:
    tokens = like.root / f"{like.tokens.name}-{number}"
    work = Work(like.processes, like.root, tokens, like.keys)
    last = tokens / like.keys.get("buckets", ("",))[-1]  # where a unit's last shard is committed
    kills = disturbed(work, tokens, "run", "all", lambda: len(list(last.glob("tokens-*.json"))) == UNITS, number)
    assert contents(tokens) == contents(like.tokens)
    return kills


@pytest.mark.parametrize("kind", KINDS)
def test_killed_workers_lose_nothing_and_count_nothing_twice(undisturbed, kind):
    kills, rounds = 0, count(100)  # a fast machine may be done before somebody is killed
    while kills < 2:
        kills += _tokenize_round(undisturbed(kind), next(rounds))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_workers_lose_nothing_and_count_nothing_twice_in_twenty_rounds(undisturbed, kind):
    assert sum(_tokenize_round(undisturbed(kind), number) for number in range(1, 21)) >= 40


def _embedding(squares: Work, name: str) -> Work:
    """Work on the states of the same captions, in a folder that has none yet."""
    tokens = squares.root / name
    shutil.copytree(squares.tokens, tokens, ignore=shutil.ignore_patterns("embeds"))
    keys = {"text_encoder": squares.root / "t5", "text_encoder_precision": "fp32", "text_encoder_length": 16}
    return Work(squares.processes, squares.root, tokens, keys)


def _all_embedded(folder: Path) -> bool:
    return len(list(folder.glob("embeds-*.json"))) == UNITS


def _embed_rounds(squares: Work, prefix: str) -> Iterator[int]:
    """As many rounds as are wanted; of each, how many were killed."""
    like = _embedding(squares, prefix)
    like.finish("embed")
    for number in count():
        work = _embedding(squares, f"{prefix}-{number}")
        folder = work.tokens / "embeds"
        done = partial(_all_embedded, folder)
        kills = disturbed(work, folder, "embed", "embed", done, number)
        assert done() and contents(work.tokens) == contents(like.tokens)
        yield kills


def test_killed_workers_store_the_states_of_captions_once(squares):
    kills, rounds = 0, _embed_rounds(squares, "embed")
    while kills < 3:
        kills += next(rounds)


@pytest.mark.long
def test_killed_workers_store_the_states_of_captions_once_in_twenty_rounds(squares):
    assert sum(islice(_embed_rounds(squares, "embed-long"), 20)) >= 20


def test_a_request_to_stop_keeps_what_is_finished(squares):
    tokens = squares.root / "stopped"
    work = Work(squares.processes, squares.root, tokens)
    worker = work.start("run", work_until_asked)
    worker.join(60)
    assert worker.exitcode == 1  # StopRequested; the command line turns it into 75
    assert len(list(tokens.glob("tokens-*.json"))) == 1 and not Leases(tokens, 60).active()
    assert not list(tokens.glob(".*.partial"))
    work.finish("all")
    assert contents(tokens) == contents(squares.tokens)
