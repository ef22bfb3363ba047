"""The command that a stage ends with is run as it was printed: from recipes, folders, links and names of every kind."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import tiny_exports
import tiny_pipeline

from tokscale import cli
from tokscale.base.config import decode
from tokscale.stages import registry

PACKAGE = Path(cli.__file__).parents[1]
KEYS = r"(?: [a-z_]+=[\w/.]+)"
NAMED = re.compile(rf"(?:`tokscale ([a-z-]+)({KEYS}*)(?=[` ])|\btokscale ([a-z-]+)({KEYS}+))")
ACTIONS = {"plan", "run", "embed", "verify", "finalise", "stats", "status", "check", "missing", "true", "false"}
STEPS = ["loop.total_steps=1", "batch_size=4"]
SMALL = {
    "train-tokenizer": ["tokenizer.image_size=32", "loop.total_steps=2", "batch_size=4", "text.vocab_size=280"],
    "tokenize": ["encode_batch=8"],
    "train": ["model.dim=16", "model.depth=1", "model.heads=2", "model.dim_head=8", *STEPS],
    "export": [],
    "sample": ["sampling.temperature=1"],
}  # fmt: skip
"""What keeps each stage small; nothing that the next command has to say by itself."""


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(capsys: pytest.CaptureFixture[str], *words: str, more: dict[str, list[str]] | None = None) -> list[str]:
    """Run a command, then what it says comes next, until nothing does; the stages that were run."""
    more, seen = SMALL if more is None else more, []
    while True:
        seen.append(words[0])
        assert len(seen) < 10
        code = cli.main([*words, *more.get(words[0], [])])
        said = capsys.readouterr()
        assert code == 0, (words, said.err)
        lines = [line.strip() for line in said.out.splitlines()]
        following = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
        if not following:
            return seen
        program, *words = shlex.split(following[0])
        assert program == "tokscale"


ROAD = ["prepare", "train-tokenizer", "tokenize", "train", "export", "sample"]


def test_the_pipeline_without_a_recipe_goes_from_one_command_to_the_next(capsys):
    words = ["run_dir=my runs/it's 2026", "data_dir=数据", "source.count=24", "preview=0"]
    assert follow(capsys, "prepare", *words) == ROAD
    assert Path("my runs/it's 2026/samples/grid.png").exists() and Path("数据/tokens/dataset.json").exists()


def test_the_pipeline_with_a_recipe_keeps_to_it(capsys):
    Path("mine.yaml").write_text(
        """
shared: {run_dir: "runs/a b", data_dir: runs/data}
prepare: {source: {kind: shapes, count: 24}, preview: 0}
train-tokenizer:
  tokenizer: {kind: dvae, image_size: 32, num_layers: 3, num_tokens: 32, codebook_dim: 8, hidden_dim: 8}
  text: {kind: bpe, vocab_size: 280}
  loop: {total_steps: 2}
  batch_size: 4
train:
  model: {kind: dalle, dim: 16, depth: 1, heads: 2, dim_head: 8, text_seq_len: 6}
  loop: {total_steps: 1}
  batch_size: 4
"""
    )
    assert follow(capsys, "prepare", "recipe=mine.yaml", "seed=3", more={}) == ROAD
    assert Path("runs/a b/samples/grid.png").exists()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_inputs(folder)
    tiny_pipeline.make_token_shards(folder / "classes" / "my tokens", folder / "image_tokenizer", labels=True)
    tiny_exports.make_exports(folder / "exports")
    return folder


def test_through_links_and_other_tokenizers(pipeline, work, capsys):
    (work / "link").symlink_to(pipeline)
    words = ["data_dir=link/data", "image_tokenizer=link/image_tokenizer", "text_tokenizer=link/text_tokenizer"]
    model = "model={kind: dalle, dim: 16, depth: 1, heads: 2, dim_head: 8, text_seq_len: 6}"
    assert (
        follow(capsys, "train", *words, "run_dir=7", model, "loop.total_steps=1", "batch_size=4", more={}) == ROAD[3:]
    )
    assert Path("7/samples/grid.png").exists()
    assert follow(capsys, "export", *words, "run_dir=7", "out=else where", "dtype=bf16", more={}) == [
        "export",
        "sample",
    ]


def test_a_model_of_classes_is_told_a_class(pipeline, capsys):
    sources = f'data.sources=[{{path: "{pipeline}/classes/my tokens"}}]'
    model = (
        "model={kind: maskgit, dim: 16, depth: 1, heads: 2, dim_head: 8, condition: {kind: classes, num_classes: 8}}"
    )
    words = [sources, f"image_tokenizer={pipeline}/image_tokenizer", model, *STEPS]
    assert follow(capsys, "train", *words, "run_dir=runs/classes", more={}) == ["train", "export", "sample"]


def test_each_action_of_tokenize_leads_to_the_next_with_all_that_was_typed(capsys, tmp_path):
    assert cli.main(["prepare", "data_dir=data", "source.count=24", "shard_samples=12", "preview=0"]) == 0
    tiny_exports.make_exports(tmp_path / "made")
    capsys.readouterr()
    words = ["image_tokenizer=made/image_tokenizer", "text_tokenizer=made/text_tokenizer", "tokens=my tokens"]
    seen = follow(capsys, "tokenize", "action=plan", "unit_samples=12", *words, more=SMALL | {"tokenize": []})
    assert seen == ["tokenize"] * 5  # plan, run, verify, finalise, stats


def named_commands() -> list[tuple[str, str, str]]:
    """File, stage and words of every command in the package's messages and pages."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for match in NAMED.finditer(" ".join(node.value.split())):
                    found.append((f"{path.name}:{node.lineno}", match[1] or match[3], match[2] or match[4] or ""))
    return found


def test_every_command_that_a_message_names_has_a_stage_its_keys_and_their_values():
    commands = named_commands()
    assert len(commands) > 30
    for where, name, words in commands:
        if name in ("completion", "--help"):
            continue
        stage = registry.find(name)
        known = registry.import_stage(stage).CONFIG.model_fields
        for word in words.split():
            key, _, value = word.partition("=")
            assert key in {"recipe", "cluster", *known}, (where, name, word)
            if key in known and value in ACTIONS:
                decode(known[key].annotation, value, where=where)


def test_what_does_nothing_by_itself_has_no_next_command(pipeline, capsys, monkeypatch):
    assert follow(capsys, "sample", f"export={pipeline}/exports/dalle", "prompts=a small red circle") == ["sample"]
