"""Aspect buckets: each image where most of it is kept, each bucket a data set of one shape, whoever works."""

import errno
import json
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizing import CPU, MeanTokenizer, encoded, make_recipe, tokenize

from tokscale.base.errors import DataError, StopRequested
from tokscale.data.loading import SourceConfig, TokenLoader, TokenLoaderConfig
from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.data.tokenization import units
from tokscale.data.tokenization.buckets import choose_bucket
from tokscale.data.tokenization.config import VariantConfig
from tokscale.data.tokenization.finalise import closed
from tokscale.data.tokenization.plan import read_plan
from tokscale.data.tokenization.recheck import agreement
from tokscale.data.tokenization.units import finished, invalidate, is_done, record_path
from tokscale.data.tokenization.variants import crops
from tokscale.data.tokenization.verify import strays, verify_manifest, verify_unit
from tokscale.data.tokens.manifest import TokenDataset

SIZES = {"8x8": (8, 8), "12x8": (8, 12), "8x16": (16, 8), "64x8": (8, 64)}
"""Rows and columns; no image here fits the last."""
SHAPES = {"8x8": (20, 18), "12x8": (9, 14), "8x16": (30, 14)}
"""Rows and columns of images that belong there."""

sides = st.integers(1, 5000)
bucket_lists = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=6, unique=True)


@given(sides, sides, bucket_lists)
def test_the_choice_is_the_bucket_whose_largest_rectangle_covers_most(width, height, sizes):
    def covered(rows: int, columns: int) -> Fraction:
        scale = min(Fraction(width, columns), Fraction(height, rows))
        return scale * rows * scale * columns / (width * height)

    names = {f"{columns}x{rows}": (rows, columns) for rows, columns in sizes}
    chosen = choose_bucket(width, height, names)
    best = max(covered(*size) for size in sizes)
    assert covered(*names[chosen]) == best
    assert chosen == next(name for name, size in names.items() if covered(*size) == best)


def test_choices_that_a_person_would_make():
    photo = {"1:1": (256, 256), "3:2": (208, 312), "2:3": (312, 208)}
    found = [choose_bucket(*size, photo) for size in [(640, 480), (640, 360), (480, 640), (500, 480), (4000, 300)]]
    assert found == ["3:2", "3:2", "2:3", "1:1", "3:2"]
    assert choose_bucket(10, 10, {"2x1": (1, 2), "1x2": (2, 1)}) == "2x1"  # both keep half of it
    assert choose_bucket(10, 10, {"1x2": (2, 1), "2x1": (1, 2)}) == "1x2"


@given(sides, sides, st.integers(1, 64), st.integers(1, 64), st.sampled_from([1, 5]), st.floats(1, 2))
def test_crops_lie_in_the_image_and_have_the_shape(width, height, rows, columns, number, scale):
    found = crops(width, height, VariantConfig(crops=number, scale=scale), (rows, columns))
    whole = crops(width, height, VariantConfig(), (rows, columns))[0]
    assert width in (whole.width, whole.width + whole.left) or height in (whole.height, whole.height + whole.top)
    assert abs(whole.width * rows - whole.height * columns) <= max(rows, columns)  # a pixel at most
    for crop in found:
        assert 0 <= crop.left <= crop.left + crop.width <= width and 0 <= crop.top <= crop.top + crop.height <= height
        assert crop.width >= 1 and crop.height >= 1


def write_raw(raw: Path, shards: int = 3, rows: int = 25) -> dict[str, list[str]]:
    """Noise of three shapes in turn, and one file a shard that is no image; returns the keys of each bucket."""
    values, keys = np.random.default_rng(0), {name: [] for name in SHAPES}
    for shard in range(shards):
        records = []
        for row in range(rows):
            key, name = f"{shard:03d}{row:03d}", list(SHAPES)[values.integers(len(SHAPES))]
            data = encoded(values.integers(0, 256, (*SHAPES[name], 3)).astype(np.uint8)) if row else b"poison"
            records.append(RawRecord(key, data, "png", f"a {name}"))
            keys[name] += [key] if row else []
        write_shard(raw / f"{shard:05d}.tar", records)
        (raw / f"{shard:05d}_stats.json").write_text(f'{{"successes": {rows}}}')
    return keys


def make(raw: Path, **changes):
    streams = {
        name: {
            "codes": MeanTokenizer(8, 4, size=(rows, columns)),
            "codes.low": MeanTokenizer(4, 2, size=(rows // 2, columns // 2)),
        }
        for name, (rows, columns) in SIZES.items()
    }
    return make_recipe(raw, tokenizers=streams["8x8"], buckets=streams, **changes)


WORK = {"max_drop_fraction": 0.05}


def contents(folder: Path) -> dict[str, bytes]:
    kept = [path for bucket in SIZES for path in (folder / bucket).rglob("*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("buckets")
    keys = write_raw(root / "raw")
    tokenize(root / "tokens", make(root / "raw"), threads=1, queue=1, work=WORK)
    return root, keys


def test_each_bucket_is_a_data_set_of_its_images_in_input_order(made):
    root, keys = made
    for name in SHAPES:
        dataset = TokenDataset(root / "tokens" / name)
        blocks = [dataset.read(number) for number in range(len(dataset.sizes))]
        assert [key for block in blocks for key in block.keys(np.arange(len(block)))] == keys[name]
        rows, columns = SIZES[name]
        assert {block.tensors["codes"].shape[1:] for block in blocks} == {(rows // 2, columns // 2)}
        assert {block.tensors["codes.low"].shape[1:] for block in blocks} == {(rows // 4, columns // 4)}
        assert {block.captions(0)[0] for block in blocks} == {f"a {name}"}
        sizes = {tuple(size) for block in blocks for size in block.tensors["wh"].tolist()}
        assert sizes == {SHAPES[name][::-1]}
        assert dataset.manifest.streams["codes"].tokenizer == MeanTokenizer(8, 4, size=SIZES[name]).fingerprint
    assert TokenDataset(root / "tokens" / "8x8").manifest.drops == {"decode": 3}
    assert (root / "tokens" / "8x8" / "quarantine" / "000000.jsonl").exists()
    assert not (root / "tokens" / "64x8" / "dataset.json").exists()
    assert closed(root / "tokens", read_plan(root / "tokens"))


def test_what_is_stored_is_the_tokenizers_own(made):
    root, _ = made
    recipe, plan = make(root / "raw"), read_plan(root / "tokens")
    for name in SHAPES:
        dataset = TokenDataset(root / "tokens" / name)
        block = iter([dataset.read(0)])
        found = agreement(block, recipe.of(name), plan, 16, CPU)
        assert found.share == 1.0 and found.ids and not found.missing
    mistaken = agreement(iter([TokenDataset(root / "tokens/8x8").read(0)]), recipe.of("8x8"), plan, 1, CPU)
    assert mistaken.images == 1
    image = torch.arange(18 * 20 * 3, dtype=torch.uint8).reshape(20, 18, 3)
    write_shard(root / "one" / "0.tar", [RawRecord("a", encoded(image.numpy()), "png", "x")])
    tokenize(root / "single", make(root / "one"), work=WORK)
    box = TokenDataset(root / "single" / "8x8").read(0).tensors["crop"][0].tolist()
    assert box == [0, 1, 18, 19]


def test_verify_finds_nothing_wrong_and_then_what_is(made, tmp_path):
    root, _ = made
    folder, recipe = tmp_path / "tokens", make(root / "raw")
    plan, _ = tokenize(folder, recipe, work=WORK)

    def problems() -> list[str]:
        found = [problem for unit in plan.units for problem in verify_unit(folder, plan, unit)]
        return [str(problem) for problem in found + verify_manifest(folder, plan)]

    assert problems() == [] and strays(folder, plan) == []
    path = folder / "12x8" / "tokens-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-700] + bytes([whole[-700] ^ 1]) + whole[-699:])
    assert any("12x8/tokens-000001.tar: its sha256" in problem for problem in problems())
    path.write_bytes(whole[:-512])
    assert not is_done(folder, plan, 1) and is_done(folder, plan, 0)
    path.write_bytes(whole)
    other = record_path(folder / "8x16", 0)
    other.write_bytes(record_path(folder / "8x16", 2).read_bytes())
    assert any("8x16/tokens-000000.json: is the record of unit 2" in problem for problem in problems())
    invalidate(folder / "8x16", 0)
    tokenize(folder, recipe, work=WORK)
    assert problems() == []
    first = record_path(folder / "8x8", 0)
    values = json.loads(first.read_text())
    first.write_text(json.dumps(values | {"samples_in": values["samples_in"] + 1, "drops": {"decode": 2}}))
    assert any("8x8/tokens-000000.json: 26 samples went in, the inputs state 25" in found for found in problems())


def test_equal_bytes_whatever_the_threads_the_workers_and_the_interruptions(made, tmp_path, monkeypatch):
    root, _ = made
    together = tmp_path / "together"
    workers = [
        threading.Thread(
            target=tokenize, args=(together, make(root / "raw")), kwargs={"close": False, "threads": 3, "work": WORK}
        )
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    tokenize(together, make(root / "raw"), work=WORK)
    assert contents(together) == contents(root / "tokens")

    # Stopped in the middle of a unit, then a failing disk between the commits of two buckets.
    torn, asked = tmp_path / "torn", iter(range(1000))
    with pytest.raises(StopRequested):
        tokenize(torn, make(root / "raw"), stop=lambda: next(asked) > 2, work=WORK)
    write, failures = units.write_json, [OSError(errno.EIO, "a moment of trouble")]

    def flaky(path, value):
        if failures and path.parent.name == "12x8":
            raise failures.pop()
        write(path, value)

    monkeypatch.setattr(units, "write_json", flaky)
    plan, report = tokenize(torn, make(root / "raw"), work=WORK)
    assert not failures and not report.failed_for_good and contents(torn) == contents(root / "tokens")
    assert len(finished(torn, plan)) == len(SIZES) * len(plan.units)


def test_another_list_or_order_of_buckets_is_another_tokenization(made):
    root, _ = made
    recipe = make(root / "raw")
    names = list(recipe.buckets)
    for chosen in (names[:2], names[::-1]):
        buckets = {name: recipe.buckets[name] for name in chosen}
        other = make_recipe(root / "raw", tokenizers=recipe.tokenizers, buckets=buckets)
        with pytest.raises(DataError, match="What differs: buckets"):
            tokenize(root / "tokens", other, work=WORK)
    with pytest.raises(DataError, match=r"What differs: buckets .* -> null"):
        tokenize(root / "tokens", make_recipe(root / "raw", tokenizers=recipe.tokenizers), work=WORK)


def test_a_bucket_feeds_a_loader_and_several_come_batch_by_batch(made):
    root, keys = made
    folders = [root / "tokens" / name for name in SHAPES]
    datasets = [TokenDataset(folder) for folder in folders]
    config = TokenLoaderConfig(sources=(SourceConfig(path=folders[1]),), streams=("codes.low",))
    loader = TokenLoader(config, manifests=datasets[1:2], text_tokenizer=None, batch_size=4, seed=0)
    batch = loader.next_batch()
    loader.close()
    assert batch.codes.shape == (4, 4, 6) and batch.extra["codes.low"].shape == (4, 2, 3)
    assert set(batch.keys) <= set(keys["12x8"])
    both = TokenLoaderConfig(sources=tuple(SourceConfig(path=folder) for folder in folders[:2]))
    loader = TokenLoader(both, manifests=datasets[:2], text_tokenizer=None, batch_size=4, seed=0)
    assert {tuple(loader.next_batch().codes.shape) for _ in range(8)} == {(4, 4, 4), (4, 4, 6)}
    loader.close()
    with pytest.raises(DataError, match=r"a data set for each shape of images, 12x8, 8x16, 8x8; name the folder"):
        TokenDataset(root / "tokens")
