"""`bench maskgit` on sizes too small to mean anything: its rows and our sides, not its metrics."""

import ast
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from tokscale import cli
from tokscale.bench import maskgit
from tokscale.bench.comparison import ORIGINALS, Case, Comparison, Measured
from tokscale.models.maskgit import MaskGit

SIZES = {"dim": 16, "depth": 1, "side": 2, "num_tokens": 20, "words": 3}
TINY = SIZES | {"batch": 2, "timesteps": 2, "images": 1}
SIDES: dict[str, Callable[..., Callable[[], Any]]] = {"step": maskgit.step, "generate": maskgit.generate}


class Pretended(Comparison):
    """Runs our sides here; the originals take four times the time and the memory. Matrix products take half of it."""

    def measure(self, sides: Mapping[str, Case], *, memory: bool = True, **_: object) -> dict[str, Measured]:
        mine = sides["ours"]
        SIDES[mine.program.rpartition(":")[2]](**mine.options)()
        times = {name: 1 if name == "ours" else 4 for name in sides}
        return {name: Measured(0.5 * by, 1e6 * by if memory else None, None) for name, by in times.items()}

    def _process(self, name: str, case: Case) -> Any:
        return SimpleNamespace(ask={"share": {"share": 0.5}}.__getitem__)


def test_the_command_measures_each_part_beside_the_originals_it_names(monkeypatch, tmp_path):
    asked = []

    def original(program: str, **keys: Any) -> Case:
        asked.append((program, keys.pop("flash"), keys))
        return Case(program, keys, "")

    monkeypatch.setattr(maskgit, "Comparison", Pretended)
    monkeypatch.setattr(maskgit, "original", original)
    out = tmp_path / "report.json"
    assert cli.main(["bench", "maskgit", *(f"{key}={value}" for key, value in TINY.items()), f"out={out}"]) == 0
    told = json.loads(out.read_text())
    assert {row["name"]: (row["ratio"], row["target"]) for row in told["rows"]} == {
        "maskgit/step/b2/fp32/vs-original/time": (4.0, 1.25),
        "maskgit/step/b2/fp32/vs-original/memory": (4.0, 1.5),
        "maskgit/step/b2/fp32/vs-original/limit": (8.0, None),
        "maskgit/step/b2/fp32/vs-flash/time": (4.0, 2.0),
        "maskgit/step/b2/fp32/vs-flash/memory": (4.0, 1.5),
        "maskgit/step/b2/fp32/vs-flash/limit": (8.0, None),
        "maskgit/generate/b1/fp32/vs-original/time": (4.0, 1.25),
    }
    steps, drawings = SIZES | {"batch": 2}, SIZES | {"batch": 1, "timesteps": 2}
    assert asked == [
        ("maskgit.py:step", False, steps),
        ("maskgit.py:step", True, steps),
        ("maskgit.py:generate", False, drawings),
    ]


def test_the_original_program_offers_what_is_asked_of_it():
    tree = ast.parse((ORIGINALS / "maskgit.py").read_text())
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"batch", "flash"} <= {argument.arg for argument in functions["step"].args}
    assert {"batch", "timesteps", "flash"} <= {argument.arg for argument in functions["generate"].args}
    assert SIZES.keys() | {"flash"} == {argument.arg for argument in functions["build"].args}


def test_our_sides_train_on_new_positions_and_draw_whole_images():
    calls, model = [], maskgit._model(**SIZES)
    forward = MaskGit.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskgit, "_model", lambda **_: model)
        patch.setattr(MaskGit, "forward", lambda self, batch: calls.append(batch) or forward(self, batch))
        step = maskgit.step(batch=2, **SIZES)
        step()
        step()
    assert [batch.positions.tolist() for batch in calls] == [[2, 3], [4, 5]]
    assert all(parameter.grad is not None for parameter in model.parameters())
    codes: Any = maskgit.generate(batch=1, timesteps=2, **SIZES)()
    assert codes.shape == (1, 2, 2) and 0 <= codes.min() and codes.max() < 20
