"""Exports, checkpoints, token shards and raw tars with damaged bytes and structure."""

import shutil
from pathlib import Path

import pytest
import tiny_exports
import tiny_pipeline
from fuzzing import bounded_memory, cases, change_file, files_below, fresh, mutated, run, survives
from hypothesis import given
from hypothesis import strategies as st

from tokscale import cli
from tokscale.data.raw.images import decode_image
from tokscale.data.raw.shards import RawDataset
from tokscale.data.tokens.manifest import TokenDataset


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("road")
    tiny_pipeline.make_inputs(folder)
    tiny_exports.make_exports(folder / "exports")
    model = ", ".join(f"{key}: {value}" for key, value in tiny_pipeline.MODEL.items())
    words = [f"data_dir={folder}/data", f"image_tokenizer={folder}/image_tokenizer", f"model={{{model}}}"]
    words += [f"text_tokenizer={folder}/text_tokenizer", f"run_dir={folder}/run", "loop.total_steps=1", "batch_size=8"]
    assert cli.main(["train", *words]) == 0
    assert cli.main(["prepare", f"data_dir={folder}/raw", "source.count=12", "shard_samples=6", "preview=0"]) == 0
    return folder


def damaged(source: Path, folder: Path, draw) -> Path:
    """A copy in which one file, or two, are not what they were."""
    target = fresh(folder) / "copy"
    shutil.copytree(source, target)
    for _ in range(draw(st.integers(1, 2))):
        files = files_below(target)
        path = files[draw(st.integers(0, len(files) - 1))]
        match draw(st.integers(0, 9)):
            case 0:
                path.unlink()
            case 1:
                path.unlink()
                path.symlink_to(draw(st.sampled_from([path.name, "nowhere", "..", "/dev/null", "/dev/zero"])))
            case 2:
                shutil.copyfile(files[draw(st.integers(0, len(files) - 1))], path.with_name("copy"))
                path.with_name("copy").replace(path)
            case _:
                change_file(path, draw)
    return target


@cases(120)
@given(data=st.data())
def test_any_export(road, tmp_path, capsys, data):
    folder = damaged(road / "exports/dalle", tmp_path, data.draw)
    with bounded_memory():
        run(capsys, "sample", f"export={folder}", f"out={folder}/out", "prompts=x", f"run_dir={folder}/run")


@cases(60)
@given(data=st.data())
def test_any_checkpoint(road, tmp_path, capsys, data):
    folder = damaged(road / "run", tmp_path, data.draw)
    with bounded_memory():
        run(capsys, data.draw(st.sampled_from(["export", "status"])), f"run_dir={folder}")


@cases(100)
@given(data=st.data())
def test_any_token_shards(road, tmp_path, data):
    folder = damaged(road / "data/tokens", tmp_path, data.draw)

    def read() -> None:
        dataset = TokenDataset(folder)
        for block in range(len(dataset.sizes)):
            dataset.read(block)

    with bounded_memory():
        survives(read)


@cases(150)
@given(data=st.data())
def test_any_raw_tar(road, tmp_path, data):
    folder = damaged(road / "raw/raw", tmp_path, data.draw)
    tars = [path for path in sorted(folder.glob("*.tar")) if path.is_file()]
    if tars and data.draw(st.booleans()):  # the header of one member: name, size, type, checksum
        content = bytearray(tars[0].read_bytes())
        at = 512 * data.draw(st.integers(0, max(len(content) // 512 - 1, 0)))
        content[at : at + 512] = mutated(bytes(content[at : at + 512]), data.draw)[:512]
        tars[0].write_bytes(content)

    def read() -> None:
        dataset = RawDataset(folder)
        for number in range(min(len(dataset), 12)):
            shard, sample = dataset.sample(number)
            shard.captions(sample)
            decode_image(shard.image(sample), on_corrupt=lambda damage: None)

    with bounded_memory():
        survives(read)
