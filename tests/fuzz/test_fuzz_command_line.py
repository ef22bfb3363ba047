"""Any word, any recipe, any path: a sentence and a documented code."""

from pathlib import Path
from typing import Any

import pytest
import tiny_exports
from fuzzing import TEXT, bounded_memory, cases, hostile, mutated, run
from hypothesis import given
from hypothesis import strategies as st

from tokscale.stages import registry

STAGES = ("sample", "export", "status", "evaluate", "tokenize", "train", "prepare", "import")
KEYS = {
    name: [key for key in registry.import_stage(registry.find(name)).CONFIG.model_fields if key != "source"]
    for name in STAGES
}
QUIET = {"prepare": ["source={kind: csv, path: nowhere.csv}"], "train": ["preflight.enabled=false"], "tokenize": []}
YAML = b"""# a recipe
defaults:
  - /model/dalle/debug@train.model
  - _self_
shared:
  run_dir: runs/x
  data_dir: ${run_dir}/data
  seed: 5
sample: &sample
  prompts: ["a small red circle", 'two']
  batch_size: 4
  num_images: 1
evaluate: {<<: *sample, prompts: 8}
train:
  optim: {lr: 1.0e-2}
  loop: {total_steps: 20, log_every: 1}
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    tiny_exports.make_exports(folder)
    return folder / "dalle"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def typed(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@cases(600)
@given(data=st.data())
def test_any_value_of_any_key(capsys, data):
    stage = data.draw(st.sampled_from(STAGES))
    keys = data.draw(st.lists(st.sampled_from(KEYS[stage]), min_size=1, max_size=4, unique=True))
    below = st.sampled_from(["", "", "", ".kind", ".x", ".a.b", ".0"])
    words = [f"{key}{data.draw(below)}={typed(data.draw(hostile()))}" for key in keys]
    with bounded_memory():
        run(capsys, stage, *QUIET.get(stage, []), *words)


@cases(200)
@given(words=st.lists(st.one_of(st.text(max_size=30), st.sampled_from(["--help", "-h", "recipe=", "=", "a=b=c", "+"]))))
def test_any_words(capsys, words):
    run(capsys, "sample", *words)


@cases(500)
@given(data=st.data())
def test_any_bytes_of_a_recipe(capsys, data):
    text = data.draw(st.one_of(st.just(None), st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
    Path("mine.yaml").write_bytes(mutated(YAML, data.draw) if text is None else text)
    with bounded_memory():
        run(capsys, "sample", "recipe=mine.yaml", "prompts=x")


PATHS = st.one_of(
    TEXT,
    st.sampled_from(["2026", "1e3", "true", "~", "~/x", "a/b", ".", "..", "/dev/null", "/proc/1/x", "x" * 255, "-"]),
    st.sampled_from(["file.txt", "file.txt/x", "loop", "gone", "folder", "\udcff", "${run_dir}", "a=b", "'", '"']),
    st.sampled_from(["x" * 256, "x/" * 2047 + "x", "x/" * 2048, "", "  "]),
)


@cases(200)
@given(data=st.data())
def test_any_path(capsys, data):
    Path("file.txt").write_text("x")
    Path("folder").mkdir(exist_ok=True)
    for name, target in (("loop", "loop"), ("gone", "nowhere")):
        if not Path(name).is_symlink():
            Path(name).symlink_to(target)
    key = data.draw(st.sampled_from(["run_dir", "data_dir", "export", "out", "prompts_file", "rerank", "superres"]))
    path = data.draw(PATHS)
    other = [f"out=folder/{data.draw(st.integers(0, 3))}"] if key != "out" else []
    run(capsys, "sample", "prompts=x", *other, f"{key}={path}")
