"""The page "Your own pictures": its eight commands, typed as they stand there, on images that the test draws."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tokscale.base.files import read_json
from tokscale.base.strict_yaml import read_yaml
from tokscale.cli import main
from tokscale.data.raw.shards import RawRecord, write_shard

ROOT = Path(__file__).parents[2]
COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square")
SHORT = {
    "init": ["flops=1e11", "device=cpu"],  # a machine that is the same everywhere
    "train-tokenizer": ["device=cpu", "loop.total_steps=4", "schedule.warmup_steps=1", "batch_size=8"],
    "tokenize": ["device=cpu"],
    "train": ["device=cpu", "loop.total_steps=4", "schedule.warmup_steps=1", "batch_size=8", "loop.log_every=1"],
    "sample": ["device=cpu", "num_images=1"],
}
"""What makes the commands of the page quick; nothing of it changes what they do."""


def page() -> str:
    return (ROOT / "configs" / "README.md").read_text()


def eight() -> list[list[str]]:
    first = re.findall(r"```bash\n(.*?)```", page(), flags=re.DOTALL)[0]
    return [shlex.split(line)[1:] for line in first.splitlines()]


def draw(number: int) -> tuple[Image.Image, str, str]:
    colour, shape = COLOURS[number % 3], SHAPES[number // 3 % 2]
    image = Image.new("RGB", (40 + number % 7, 36), "white")
    box = (4 + number % 5, 4, 30 + number % 5, 30)
    brush = ImageDraw.Draw(image)
    (brush.ellipse if shape == "circle" else brush.rectangle)(box, fill=colour)
    return image, colour, shape


def save(number: int, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:03d}.png"
    draw(number)[0].save(path)
    return path


def captioned(folder: Path, count: int) -> None:
    for number in range(count):
        path, (_, colour, shape) = save(number, folder / ("a" if number % 2 else "b")), draw(number)
        path.with_suffix(".txt").write_text(f"a {colour} {shape} on white")


def in_classes(folder: Path, count: int) -> None:
    for number in range(count):
        save(number, folder / draw(number)[1])


def alone(folder: Path, count: int) -> None:
    for number in range(count):
        save(number, folder)


def tars(folder: Path, count: int) -> None:
    images = folder.with_name("files")
    records = []
    for number in range(count):
        path, (_, colour, shape) = save(number, images), draw(number)
        records.append(RawRecord(f"{number:05d}", path.read_bytes(), "png", f"a {colour} {shape}", {"width": 40}))
    folder.mkdir()
    write_shard(folder / "00000.tar", records)


def type_all(capsys, skip: tuple[str, ...] = ()) -> None:
    for words in eight():
        if words[0] not in skip:
            assert main([*words, *SHORT.get(words[0], [])]) == 0, capsys.readouterr().err


def test_the_page_has_eight_commands():
    stages = ["init", "prepare", "train-tokenizer", "tokenize", "train", "export", "sample", "status"]
    assert [words[0] for words in eight()] == stages
    assert "(configs/README.md)" in (ROOT / "README.md").read_text()


def test_from_a_folder_of_pictures_to_samples_in_eight_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    captioned(tmp_path / "pictures", 300)
    type_all(capsys)
    recipe = read_yaml(tmp_path / "mine.yaml")
    assert recipe["train"]["model"]["kind"] == "dalle" and recipe["train"]["model"]["text_seq_len"] == 8
    assert recipe["train-tokenizer"]["tokenizer"]["image_size"] == 32
    rows = read_json(tmp_path / "runs/mine/samples/samples.json")["images"]
    assert {row["prompt"] for row in rows} == {f"a {c} {s} on white" for c in COLOURS for s in SHAPES}
    assert (tmp_path / "runs/mine/samples/grid.png").exists() and (tmp_path / "runs/mine/data/raw/preview.png").exists()
    said = capsys.readouterr().out
    assert "300 samples, of which 256 were looked at" in said and "next: tokscale prepare recipe=./mine.yaml" in said
    assert main(["init", "pictures", "out=mine.yaml"]) == 64
    assert "mine.yaml is there already; choose another name, or overwrite=true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "kind", "told", "prompts"),
    [
        (in_classes, "maskgit", {"kind": "classes", "num_classes": 3}, ["blue", "green", "red"]),
        pytest.param(alone, "rqtransformer", None, ["an image"], marks=pytest.mark.long),
    ],
)
def test_classes_and_pictures_alone_go_the_same_way(tmp_path, monkeypatch, capsys, make, kind, told, prompts):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "pictures", 30)
    type_all(capsys)
    model = read_yaml(tmp_path / "mine.yaml")["train"]["model"]
    assert model["kind"] == kind and model.get("condition") == told
    rows = read_json(tmp_path / "runs/mine/samples/samples.json")["images"]
    assert [row["prompt"] for row in rows] == prompts
    assert not (tmp_path / "runs/mine/text_tokenizer").exists()


def test_tars_of_img2dataset_need_no_prepare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tars(tmp_path / "pictures", 20)
    assert main([*eight()[0], *SHORT["init"]]) == 0, capsys.readouterr().err
    assert "next: tokscale train-tokenizer recipe=./mine.yaml" in capsys.readouterr().out
    recipe = read_yaml(tmp_path / "mine.yaml")
    assert "prepare" not in recipe and (tmp_path / "runs/mine/data/raw/00000.tar").exists()
    for words in (eight()[2], eight()[3]):
        assert main([*words, *SHORT[words[0]]]) == 0, capsys.readouterr().err
    assert read_json(tmp_path / "runs/mine/data/tokens/dataset.json")["samples"] == 20
