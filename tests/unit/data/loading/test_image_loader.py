"""Raw images by position: the same global batches at any number of ranks, resumable, bad images replaced."""

import io

import pytest
import torch
from PIL import Image

from tokscale.base.errors import DataError
from tokscale.data.loading import ImageLoader, ImageLoaderConfig
from tokscale.data.raw.shards import RawDataset, RawRecord, write_shard

COUNT = 40


def png(level: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (level, level, level)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def dataset(tmp_path) -> RawDataset:
    records = [RawRecord(f"{i:03d}", png(i), "png", f"level {i}") for i in range(COUNT)]
    write_shard(tmp_path / "00000.tar", records[:25])
    write_shard(tmp_path / "00001.tar", records[25:])
    return RawDataset(tmp_path)


def loader(dataset: RawDataset, rank: int = 0, world: int = 1, **options) -> ImageLoader:
    config = ImageLoaderConfig(**{"prefetch": 0, **options})
    return ImageLoader(config, dataset=dataset, image_size=8, comm_rank=rank, comm_world=world, batch_size=12, seed=3)


def keys(source: ImageLoader, batches: int) -> list[list[str]]:
    return [list(source.next_batch().keys) for _ in range(batches)]


def test_each_image_once_an_epoch_and_its_own_pixels(dataset):
    seen = [key for batch in keys(loader(dataset), 10) for key in batch]  # three epochs of 40
    for epoch in range(3):
        assert sorted(seen[epoch * COUNT : (epoch + 1) * COUNT]) == [f"{i:03d}" for i in range(COUNT)]
    assert seen[:COUNT] != sorted(seen[:COUNT])
    batch = loader(dataset).next_batch()
    assert batch.pixels[:, 0, 0, 0].tolist() == [int(key) for key in batch.keys]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(dataset, world):
    alone = keys(loader(dataset), 5)
    ranks = [keys(loader(dataset, rank, world, prefetch=2), 5) for rank in range(world)]
    assert alone == [[key for rank in ranks for key in rank[batch]] for batch in range(5)]


def test_a_resumed_loader_goes_on_with_the_next_batch(dataset):
    source = loader(dataset)
    keys(source, 4)
    state, expected = source.state_dict(), keys(source, 3)
    again = loader(dataset, cache_mb=0)
    again.load_state_dict(state)
    assert keys(again, 3) == expected


def test_another_data_set_is_refused(dataset, tmp_path):
    state = loader(dataset).state_dict()
    write_shard(tmp_path / "00002.tar", [RawRecord("new", png(0), "png", "x")])
    with pytest.raises(DataError, match="samples=40, this run has 41"):
        loader(RawDataset(tmp_path)).load_state_dict(state)


def test_an_unusable_image_gives_its_place_to_the_next_one_up_to_a_limit(tmp_path, caplog):
    records = [RawRecord(f"{i}", b"no image" if i in (1, 3) else png(i), "png", "x") for i in range(6)]
    write_shard(tmp_path / "00000.tar", records)
    batch = loader(RawDataset(tmp_path), shuffle=False).next_batch()
    assert list(batch.keys)[:6] == ["0", "2", "2", "4", "4", "5"]
    with pytest.raises(DataError, match=r"unusable image number 2, more than data\.max_bad_samples=1"):
        loader(RawDataset(tmp_path), max_bad_samples=1).next_batch()


@pytest.mark.parametrize(("channels", "values"), [(1, [76]), (3, [255, 0, 0]), (4, [255, 0, 0, 255])])
def test_channels(tmp_path, channels, values):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(file, "PNG")
    write_shard(tmp_path / "00000.tar", [RawRecord("red", file.getvalue(), "png", "x")])
    source = ImageLoader(
        ImageLoaderConfig(prefetch=0),
        dataset=RawDataset(tmp_path),
        image_size=4,
        channels=channels,
        batch_size=1,
        seed=0,
    )
    pixels = source.next_batch().pixels
    assert pixels.shape == (1, channels, 4, 4) and pixels.dtype == torch.uint8
    assert pixels[0, :, 0, 0].tolist() == values


class Words:
    """A text tokenizer that remembers what it is given: id 1 for captions with a comma, 2 for others."""

    num_tokens, fingerprint = 3, "w"

    def encode(self, captions, length):
        ids = torch.tensor([[1 if "," in caption else 2] + [0] * (length - 1) for caption in captions])
        return ids, ids != 0


def test_each_line_is_a_caption_and_mirror_images_are_chosen_by_position(tmp_path):
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    file = io.BytesIO()
    image.save(file, "PNG")
    write_shard(tmp_path / "00000.tar", [RawRecord("corner", file.getvalue(), "png", "first\nsecond, longer\n")])

    def batch(**options):
        config = ImageLoaderConfig(prefetch=0, **options)
        source = {"dataset": RawDataset(tmp_path), "image_size": 8, "text_tokenizer": Words(), "text_length": 4}
        return ImageLoader(config, batch_size=200, seed=0, **source).next_batch()

    given = batch(flips=True, split_lines=True)
    assert 60 < (given.text[:, 0] == 1).sum() < 140
    left, right = given.pixels[:, 0, 0, 0] == 255, given.pixels[:, 0, 0, 7] == 255
    assert (left ^ right).all() and 60 < left.sum() < 140
    assert torch.equal(batch(flips=True, split_lines=True).pixels, given.pixels)
    plain = batch()
    assert (plain.text[:, 0] == 1).all() and (plain.pixels[:, 0, 0, 0] == 255).all()
