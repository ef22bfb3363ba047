"""What `init` sees in a folder or table, and what it chooses for it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.data.raw.survey import Survey, survey
from tokscale.dist.env import ProcessEnv
from tokscale.stages import init, init_sizes
from tokscale.stages.init_sizes import Machine, choose, this_machine


def picture(path: Path, size: tuple[int, int] = (40, 36), caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def test_folders_are_told_apart(tmp_path):
    for number in range(4):
        picture(tmp_path / "captioned" / "deep" / f"{number}.png", (40, 30 + number), f"caption {number}")
        picture(tmp_path / "classes" / ("cat" if number % 2 else "dog") / f"{number}.jpg")
        picture(tmp_path / "alone" / f"{number}.webp")
        picture(tmp_path / "described" / "a" / f"{number}.png")
    (tmp_path / "described" / "b").mkdir()
    rows = [f'{{"file_name": "a/{number}.png", "text": "a thing"}}\n' for number in range(4)]
    (tmp_path / "described" / "metadata.jsonl").write_text("".join(rows))
    (tmp_path / "alone" / "broken.png").write_bytes(b"no image")
    found = {name: survey(tmp_path / name) for name in ("captioned", "classes", "alone", "described")}
    assert sorted(found["captioned"].captions) == [f"caption {number}" for number in range(4)]
    assert sorted(found["captioned"].sizes) == [(30 + number, 40) for number in range(4)]
    assert found["captioned"].source == {"kind": "folder", "path": str(tmp_path / "captioned")}
    assert found["classes"].classes == ("cat", "dog") and found["classes"].source["labels"] == "folder"
    assert found["alone"].source["captions"] == "none" and found["alone"].unusable == Counter(decode=1)
    assert found["described"].captions == ["a thing"] * 4 and found["described"].classes is None
    with pytest.raises(DataError, match="no such folder or table"):
        survey(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="neither a folder nor a table"):
        survey(tmp_path / "notes.txt")


def seen(images: int, side: int, **values: Any) -> Survey:
    return Survey({"kind": "folder"}, images=images, looked=9, sizes=[(side, side + 9)] * 9, **values)


GPU = Machine("cuda", 80e9, 4e14)
CPU = Machine("cpu", 16e9, 1e11)


def test_larger_data_machines_and_hours_have_larger_models():
    captions = {"captions": ["a"] * 9, "captioned": 9}
    few = choose(seen(300, 512, **captions), "dalle", CPU, 1.0, image_size=None, words=16)
    more = choose(seen(100_000, 512, **captions), "dalle", CPU, 48.0, image_size=None, words=16)
    much = choose(seen(1_000_000, 512, **captions), "dalle", GPU, 100.0, image_size=None, words=64)
    assert few.parameters < more.parameters < much.parameters
    assert (few.image_size, more.image_size, much.image_size) == (32, 64, 256)
    assert few.hours < 1.5 and more.hours < 50 and much.hours < 110
    small = Machine("cuda", 8e9, GPU.flops)
    tight = choose(seen(1_000_000, 512, **captions), "dalle", small, 100.0, image_size=None, words=64)
    assert tight.parameters < much.parameters and tight.need < 0.8 * small.memory
    assert choose(seen(300, 20, **captions), "dalle", GPU, 1.0, image_size=None, words=16).image_size == 32


@pytest.mark.parametrize(
    ("values", "model", "answer"),
    [
        ({"captions": ["a"]}, "auto", "dalle"),
        ({"captions": ["a"]}, "parti", "parti"),
        ({"classes": ("a", "b")}, "auto", "maskgit"),
        ({"classes": ("a", "b")}, "dalle", "come with classes; choose maskgit or rqtransformer"),
        ({}, "auto", "rqtransformer"),
        ({}, "maskgit", "maskgit"),
        ({}, "dalle", "come with nothing; choose rqtransformer or maskgit"),
    ],
)
def test_the_model_suits_what_comes_with_the_images(values, model, answer):
    config = decode(init.InitConfig, {"source": "x", "model": model})
    if answer in ("dalle", "parti", "maskgit", "rqtransformer"):
        assert init._model_kind(config, seen(9, 32, **values)) == answer
    else:
        with pytest.raises(ConfigError, match=answer):
            init._model_kind(config, seen(9, 32, **values))


def test_the_share_of_captions_that_are_cut_is_said_before_any_token_is_made():
    long = "a very long caption that says one thing after the other " * 40
    few = seen(200, 32, captions=["a red ring"] * 199 + [long], captioned=200)
    _, words, said = init._text(few)
    assert words == 8 and len(said) == 1 and said[0].endswith("a length of 8 cuts 0.5% of them")
    many = seen(200, 32, captions=["a red ring"] * 100 + [long] * 100, captioned=200)
    assert init._text(many)[1] == 256 and "cuts 50.0% of them" in init._text(many)[2][0]
    assert init._text(seen(9, 32)) == (None, 16, [])


def test_a_recipe_is_not_written_over(tmp_path):
    picture(tmp_path / "pictures" / "1.png", caption="a ${run_dir} thing")
    (tmp_path / "mine.yaml").write_text("train: {}\n")
    keys = {"source": tmp_path / "pictures", "out": tmp_path / "mine.yaml", "flops": 1e11, "device": "cpu"}
    with pytest.raises(ConfigError, match="is there already; choose another name, or overwrite=true"):
        init.run(decode(init.InitConfig, keys), ProcessEnv())
    assert (tmp_path / "mine.yaml").read_text() == "train: {}\n"
    with pytest.raises(ConfigError, match=r"a recipe's name ends in \.yaml"):
        init.run(decode(init.InitConfig, keys | {"out": tmp_path / "mine"}), ProcessEnv())


def test_the_speed_of_a_machine_is_that_of_its_fastest_product_whatever_else_it_does(monkeypatch):
    taken = iter([3.0, 0.5, 2.0, 0.25, 1.0, 9.0, 0.3, 4.0] * 2)
    times = iter([value for second in taken for value in (0.0, second)])
    monkeypatch.setattr(init_sizes.time, "process_time", lambda: next(times))
    wall = iter(range(10_000))
    monkeypatch.setattr(init_sizes.time, "perf_counter", lambda: float(next(wall)))  # as on a machine of others
    expected = 2 * 1024**3 / (0.25 / torch.get_num_threads())
    assert this_machine(torch.device("cpu"), None).flops == pytest.approx(expected)
