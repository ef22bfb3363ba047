"""A package with a model, both tokenizers and a stage of its own: trained, exported and sampled by the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from outside_package import ENTRY_POINTS, install

RUN = """
import json, sys
from tokscale.cli import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    if code:
        sys.exit(code)
"""


def tokscale(folder: Path, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run commands one after the other, in a process that finds the package."""
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_another_packages_model_and_tokenizer_go_the_whole_way(tmp_path):
    install(tmp_path / "site")
    shared = ["run_dir=run", "data_dir=data", "image_tokenizer=greys", "text_tokenizer=words"]
    ended = tokscale(
        tmp_path,
        ["greys", "out=greys"],
        ["prepare", "data_dir=data", "source={kind: shapes, count: 32}", "shard_samples=16"],
        [
            "train-tokenizer",
            "run_dir=run",
            "data_dir=data",
            "text_tokenizer=words",
            "tokenizer={kind: letters, most: 40}",
        ],
        ["tokenize", *shared],
        ["train", *shared, "model={kind: word_bag, dim: 4}", "loop.total_steps=2", "loop.log_every=1", "batch_size=8"],
        ["export", *shared, "out=export"],
        ["sample", "export=export", "prompts=[a small red circle]", "out=drawn", "sampling.temperature=0.5"],
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-6000:]
    assert json.loads((tmp_path / "export" / "config.json").read_text())["kind"] == "word_bag"
    assert json.loads((tmp_path / "export" / "text_tokenizer" / "config.json").read_text())["kind"] == "letters"
    assert json.loads((tmp_path / "export" / "image_tokenizer" / "config.json").read_text())["kind"] == "greys"
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss]) == 2
    assert list((tmp_path / "drawn").rglob("*.png"))


def test_help_lists_what_is_installed_and_unknown_kinds_say_how_more_is(tmp_path):
    install(tmp_path / "site")
    ended = tokscale(tmp_path, ["--help"], ["train", "--help", "all"], ["train", "model.kind=word_bagg"])
    assert ended.returncode == 64
    assert "greys            write a folder of the greys tokenizer" in ended.stdout
    assert "with kind=word_bag: A bag of words." in ended.stdout
    assert "model.kind: got 'word_bagg'; did you mean 'word_bag'?" in ended.stderr
    assert "entry points of the group tokscale.models" in ended.stderr


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        ("word_bag = word_bag.gone:WordBag", "No module named 'word_bag.gone'"),
        ("word_bag = word_bag.tokenizer:Greys", "is no subclass of tokscale.models.model.Model"),
        ("bag = word_bag.model:WordBag", "has kind='word_bag', not 'bag'"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_and_takes_nothing_else_away(tmp_path, offer, reason):
    install(tmp_path / "site", ENTRY_POINTS.replace("word_bag = word_bag.model:WordBag", offer))
    kind = offer.split()[0]
    ended = tokscale(tmp_path, ["train", "--help", "all"], ["train", f"model.kind={kind}"])
    assert ended.returncode == 64, ended.stderr[-3000:]
    assert "with kind=dalle" in ended.stdout
    assert f"'{kind}' of the installed package word-bag cannot be used" in ended.stderr and reason in ended.stderr
