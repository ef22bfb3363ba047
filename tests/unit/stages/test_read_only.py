"""Runs, exports and tokens that may only be read: what only reads them works, the rest says so before the work."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import rights
import tiny_exports
import tiny_pipeline

from tokscale import cli
from tokscale.base.files import may_write
from tokscale.runs.outcome import read_outcomes


def set_modes(folder: Path, mode: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(mode if path.is_dir() else mode & ~0o111)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Iterator[Path]:
    """Somebody else's run folder, with an export and the data it was trained on."""
    folder = tmp_path_factory.mktemp("theirs")
    tiny_pipeline.make_inputs(folder)
    tiny_exports.make_exports(folder / "exports")
    shutil.copytree(folder / "exports/dalle", folder / "run/export")
    shutil.copytree(folder / "text_tokenizer", folder / "run/text_tokenizer")
    shutil.copytree(folder / "image_tokenizer", folder / "run/image_tokenizer")
    model = ", ".join(f"{key}: {value}" for key, value in tiny_pipeline.MODEL.items())
    words = [f"run_dir={folder}/run", f"data_dir={folder}/data", f"model={{{model}}}", "loop.total_steps=1"]
    assert cli.main(["train", *words, "batch_size=8"]) == 0
    set_modes(folder, 0o555)
    yield folder
    set_modes(folder, 0o755)


def run(*words: object) -> int:
    with rights.ordinary_rights():
        return cli.main([str(word) for word in words])


@pytest.mark.parametrize(
    ("stage", "name", "words"),
    [
        ("sample", "mine", ["prompts=x"]),
        ("evaluate", "report.json", ["prompts=0", "images=4", "judge=true"]),
        ("export", "weights", ["dtype=bf16"]),
    ],
)
def test_the_record_of_work_on_somebody_elses_run_lies_beside_what_was_made(theirs, tmp_path, stage, name, words):
    out = tmp_path / name
    assert run(stage, f"run_dir={theirs}/run", f"out={out}", *words) == 0
    assert out.exists()
    beside = tmp_path / f"{name}.run"
    record = json.loads((beside / "exit.json").read_text())
    assert (record["stage"], record["code"]) == (stage, 0)
    assert [(found["stage"], found["state"]) for found in read_outcomes(beside)] == [(stage, "ended")]
    # A failure is kept there, too, and takes the success away.
    assert run(stage, f"run_dir={theirs}/run", f"out={out}", "image_tokenizer=7", "nonsense=1") == 64
    assert json.loads((beside / "exit.json").read_text())["code"] == 64


@pytest.mark.parametrize("stage", ["sample", "evaluate"])
def test_without_a_place_for_it_nothing_is_computed(theirs, capsys, monkeypatch, stage):
    def computed(*_: object, **__: object) -> None:
        raise AssertionError

    opens = {"sample": "sample_job", "evaluate": "evaluate"}[stage]
    monkeypatch.setattr(f"tokscale.stages.{opens}.load_pretrained", computed)
    assert run(stage, f"run_dir={theirs}/run", *(["prompts=x"] if stage == "sample" else [])) == 74
    said = capsys.readouterr().err
    assert "may only be read" in said and "give out=" in said and len(said.splitlines()) == 2


def test_exports_checkpoints_and_tokens_that_may_only_be_read_are_read(theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ", ".join(f"{key}: {value}" for key, value in tiny_pipeline.MODEL.items())
    words = [f"data_dir={theirs}/data", f"model={{{model}}}", "loop.total_steps=1", "batch_size=8"]
    words += [f"{kind}_tokenizer={theirs}/{kind}_tokenizer" for kind in ("image", "text")]
    assert run("train", "run_dir=mine", f"init_from={theirs}/run/checkpoints", *words) == 0
    assert run("sample", f"export={theirs}/run/export", "run_dir=drawn", "prompts=x") == 0
    assert run("status", f"run_dir={theirs}/run") == 0
    assert run("train", f"run_dir={theirs}/run", *words) == 0  # is done


def test_whether_a_place_may_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "loop").symlink_to("loop")
    with rights.ordinary_rights():
        found = {
            name: may_write(tmp_path / name) for name in ("a", "a/b/c", "file", "file/x", "closed", "closed/x", ".")
        }
    wanted = {"a": True, "a/b/c": True, "file": True, "file/x": False, "closed": False, "closed/x": False, ".": True}
    assert found == wanted
    assert not may_write("/dev/null/x") and may_write(os.devnull)
