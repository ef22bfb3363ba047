"""Classes are asked for by number, or by the name that the data gave them."""

import pytest

from tokscale.base.errors import DataError
from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.evaluation.measures import load_eval_pairs
from tokscale.inference.pretrained import _classes


def test_names_and_numbers_are_understood():
    assert _classes(["1", " dog", "cat"], 2, ["cat", "dog"]).tolist() == [1, 1, 0]
    with pytest.raises(DataError, match="number below 2; did you mean 'dog'"):
        _classes(["dogg"], 2, ["cat", "dog"])
    with pytest.raises(DataError, match=r"number below 2$"):
        _classes(["2"], 2, [])


def test_held_out_images_of_a_class_model_come_with_their_classes(tmp_path):
    from tokenizing import image

    records = [RawRecord("a", image(1), "png", "", label=3), RawRecord("b", image(2), "png", "")]
    write_shard(tmp_path / "raw" / "0.tar", records)
    told, images = load_eval_pairs(tmp_path / "raw", 8, classes=True)
    assert told == ["3"] and len(images) == 1
    with pytest.raises(DataError, match="none of 2 samples can be used, the first: a: caption_missing"):
        load_eval_pairs(tmp_path / "raw", 8)
