"""The list of mutants fits the code: each still applies, and the tests it names exist. Killing them is `--long`."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# By its path: a folder with a `run.py` on sys.path would hide `launch/run.py` from whoever looks for it.
_spec = importlib.util.spec_from_file_location("mutant_runner", ROOT / "tests" / "mutants" / "run.py")
assert _spec is not None and _spec.loader is not None
run = importlib.util.module_from_spec(_spec)
sys.modules["mutant_runner"] = run  # dataclasses look their module up
_spec.loader.exec_module(run)

MUTANTS = run.mutants()
LAYERS = {"base", "dist", "nn", "tokenizers", "models", "data", "engine", "checkpoint", "train"}
LAYERS |= {"evaluation", "inference", "runs", "bench", "stages", "cli", "slurm"}


def test_the_list_covers_every_layer():
    assert {mutant.id.partition("/")[0] for mutant in MUTANTS} == LAYERS
    assert len({mutant.id for mutant in MUTANTS}) == len(MUTANTS) >= 60


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_applies_and_its_tests_exist(mutant):
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.old) == 1, f"{mutant.file}: the place of the mutant has changed; bring it along"
    changed = source.replace(mutant.old, mutant.new)
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")  # a mutant that cannot even be read shows nothing
    assert changed != source and mutant.tests and mutant.why
    for test in mutant.tests:
        file, _, name = test.partition("::")
        name = name.partition("[")[0]
        assert re.search(rf"^\s*(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test


def test_a_survivor_is_reported(tmp_path):
    """The runner itself, on a tree of two lines: one mutant that a test sees and one that none does."""
    (tmp_path / "doubling.py").write_text("def twice(x):\n    return 2 * x\n")
    (tmp_path / "test_code.py").write_text(
        "from doubling import twice\n\n\ndef test_twice():\n    assert twice(0) == 0\n"
    )
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import run\n"
        "tree = Path(sys.argv[2])\n"
        "for new in ('3 * x', '2 + x', '2 *'):\n"
        "    with run.applied(run.Mutant('a', 'doubling.py', '2 * x', new, (), ''), tree):\n"
        "        print(run.judged(('test_code.py',), tree)[0])\n"
        "print(run.judged(('test_code.py',), tree)[0])\n"
    )
    arguments = [sys.executable, "-c", program, str(ROOT / "tests" / "mutants"), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["SURVIVED", "killed", "BROKEN", "SURVIVED"]
