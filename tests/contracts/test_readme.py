"""Every command that the README shows is one: its program exists, its stage decodes its keys."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tokscale.base.config import decode
from tokscale.cli import without_local_rank
from tokscale.cli.compose import compose, compose_pipeline
from tokscale.stages import registry

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / ".github/CONTRIBUTING.md",
    ROOT / "slurm/README.md",
    ROOT / "tokscale/data/README.md",
    ROOT / "configs/README.md",
]


def commands(text: str) -> list[str]:
    """The lines of shell blocks, continued lines joined, without prompts and comments."""
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


SHOWN = [command for page in PAGES for command in commands(page.read_text())]


@pytest.mark.parametrize("command", SHOWN)
def test_the_command_exists(command, tmp_path, monkeypatch):
    # A recipe of one's own, as `tokscale init` would write one.
    shutil.copy(ROOT / "configs/recipe/emoji/quick.yaml", tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    words = words[next(at for at, word in enumerate(words) if "=" not in word) :]  # variables set for the command
    files = [word for word in words if re.match(r"(\./)?(launch|\.ci|slurm|tests|configs)/", word)]
    assert all((ROOT / word).exists() for word in files), command
    if words[0] == "tokscale":
        check_stage(words[1:])
    elif "-m" in words and words[words.index("-m") + 1] == "tokscale":
        check_stage(words[words.index("-m") + 2 :])
    elif files and files[0].endswith("launch/run.py"):
        check_stage(words[words.index(files[0]) + 1 :])
    elif files and files[0].endswith("launch/train.py"):
        check_stage(["train", *words[words.index(files[0]) + 1 :]])
    elif files and files[0].endswith(".sbatch"):
        check_stage([Path(files[0]).stem, *words[words.index(files[0]) + 1 :]])


def check_stage(words: list[str]) -> None:
    words = without_local_rank(words)
    if words[0].startswith("-") or "--help" in words:
        return
    stage = registry.find(words[0])
    values = (compose_pipeline if stage.takes_all_sections else compose)(stage, words[1:])
    decode(registry.config_class(stage, values), values)


def test_commands_are_found_in_a_page():
    page = "```bash\n# say hello\n$ tokscale train \\\n    recipe=x\n```\ntext\n```python\nimport y\n```\n"
    assert commands(page) == ["tokscale train      recipe=x"]
