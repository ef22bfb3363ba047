"""Shell completion, in real shells."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tokscale import cli
from tokscale.cli.completion import script

ASKED = {
    "tokscale tra": {"train", "train-tokenizer"},
    "tokscale bench atten": {"attention"},
    "tokscale train recipe=debug/dal": {"recipe=debug/dalle", "debug/dalle"},
    "tokscale train engine=zero3": {"engine=zero3", "engine=zero3_offload", "zero3", "zero3_offload"},
    "tokscale export dty": {"dtype="},
    "tokscale train loop.total_st": {"loop.total_steps="},
    "tokscale completion z": {"zsh"},
    "tokscale nothing x": set(),
}
PROGRAMS = {"bash": "", "zsh": "autoload -U +X compinit && compinit -u; "}


@pytest.fixture(scope="module", params=PROGRAMS)
def shell(request, tmp_path_factory) -> tuple[str, Path]:
    if shutil.which(request.param) is None:
        pytest.skip(f"needs {request.param}")
    path = tmp_path_factory.mktemp("completion") / "script"
    path.write_text(script(request.param))
    return request.param, path


def test_the_words_are_those_of_the_registries(shell):
    program, path = shell
    asking = "; ".join(
        f"COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; COMPREPLY=(); _tokscale; echo \"${{COMPREPLY[@]}}\""
        for line in ASKED
    )
    ended = subprocess.run(
        [program, "-c", f"{PROGRAMS[program]}source {path}; {asking}"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    for (line, expected), said in zip(ASKED.items(), ended.stdout.split("\n"), strict=False):
        found = set(said.split())
        assert found <= expected and bool(found) == bool(expected), (line, said)


def test_another_shell_is_refused(capsys):
    assert cli.main(["completion", "zhs"]) == 64
    assert "did you mean 'zsh'?" in capsys.readouterr().err
    assert cli.main(["completion"]) == 64
