"""The `bench` stage over a bench of the test's own, and sides that run as processes."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import Field

from tokscale import cli
from tokscale.base.config import Config, decode
from tokscale.base.errors import ConfigError, EnvironmentRefused
from tokscale.bench.comparison import Comparison, original, originals_python, ours
from tokscale.bench.measure import row, skipped
from tokscale.bench.worker import MadeOn
from tokscale.stages import bench

ROOT = Path(__file__).parents[3]


class Toy(Config):
    """Keys of a bench that measures nothing."""

    cost: float = Field(default=1.0, gt=0)
    """What ours takes."""


class ToyBench:
    CONFIG = Toy

    @staticmethod
    def rows(config: Toy):
        yield row("toy/step/vs-original/time", config.cost, 4.0, "s", 2.0)
        yield row("toy/step/vs-original/memory", config.cost, 4.0, "MB")
        yield skipped("toy/compiled/vs-original/time", "no compiler")


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(bench, "whats", lambda: {"toy": "measures nothing"})
    monkeypatch.setattr(bench, "_load", lambda what: ToyBench)


def test_what_can_be_measured_is_found_among_the_modules():
    found = bench.whats()
    assert {"attention", "data", "tokenize", "checkpoint"} <= found.keys()
    assert not found.keys() & {"measure", "beside", "side"}
    for what, line in found.items():
        keys = bench.config_for(what)
        assert line and issubclass(keys, bench.BenchConfig) and issubclass(keys, bench._load(what).CONFIG)
    assert decode(bench.config_for("attention"), {"what": "attention", "heads": 2}).model_dump()["heads"] == 2


def test_a_report_has_its_rows_and_says_what_was_missed(toy, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert cli.main(["bench", "toy", f"out={out}"]) == 0
    told = json.loads(out.read_text())
    assert [entry["ratio"] for entry in told["rows"]] == [4.0, 4.0]
    assert told["rows"][0].keys() == {"name", "ours", "baseline", "unit", "ratio", "target"}
    assert told["skipped"] == [{"name": "toy/compiled/vs-original/time", "skipped": "no compiler"}]
    assert told["env"]["versions"]["torch"] and told["env"]["config"]["cost"] == 1.0
    assert "2 rows, 1 of 1 targets met, 1 skipped" in capsys.readouterr().out
    assert cli.main(["bench", "toy", "cost=3"]) == 0
    printed = capsys.readouterr().out
    assert "target 2 MISSED" in printed and "0 of 1 targets met" in printed
    assert "missed: toy/step/vs-original/time" in printed


def test_rows_are_kept_when_a_later_one_cannot_be_measured(toy, tmp_path, monkeypatch):
    def rows(config: Toy):
        yield row("toy/first/time", 1.0, 2.0, "s")
        raise EnvironmentRefused("no original")

    monkeypatch.setattr(ToyBench, "rows", staticmethod(rows))
    assert cli.main(["bench", "toy", f"out={tmp_path}/report.json"]) == 69
    assert [entry["name"] for entry in json.loads((tmp_path / "report.json").read_text())["rows"]] == ["toy/first/time"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to measure"),
        (["atention"], "did you mean 'attention'"),
        (["toy", "costs=1"], "did you mean 'cost'"),
        (["toy", "cost=0"], "cost: got 0"),
    ],
)
def test_bad_words_are_answered(words, said, monkeypatch, capsys):
    real = bench._load
    monkeypatch.setattr(bench, "_load", lambda what: ToyBench if what == "toy" else real(what))
    monkeypatch.setattr(bench, "whats", lambda: {"toy": "", "attention": ""})
    assert cli.main(["bench", *words]) == 64 and said in capsys.readouterr().err


def test_help_shows_what_there_is_and_the_keys_of_one(toy, capsys):
    assert cli.main(["bench", "--help"]) == 0
    assert "toy         measures nothing" in capsys.readouterr().out
    assert cli.main(["bench", "toy", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "usage: tokscale bench toy " in printed and "cost: number = 1.0" in printed


PROGRAM = """
import os
import torch

def case(name, book, size=1):
    def call():
        print("what a program says is no answer")
        with open(book, "a") as file:
            file.write(name)
        return [float(torch.ones(size).sum()), os.getpid(), torch.get_num_threads()]
    return call

def product(size):
    matrix = torch.ones(size, size)
    return lambda: (matrix @ matrix).sin().sum().item()

def broken():
    raise ValueError("cannot build this")

def gone():
    return lambda: os._exit(3)
"""


def test_sides_are_processes_of_their_own_called_in_turn(tmp_path):
    program, book = tmp_path / "program.py", tmp_path / "book"
    program.write_text(PROGRAM)
    with Comparison() as comparison:
        sides = {
            name: ours(f"{program}:case", name=name, book=str(book), size=8_000_000 * n)
            for n, name in ((1, "a"), (2, "b"))
        }
        found = comparison.measure(sides, rounds=2)
        assert book.read_text() == "ababab" + "ab"  # a round that is not counted, two that are, memory
        again = comparison.measure(
            {name: ours(f"{program}:case", name=name, book=str(book)) for name in "ab"}, memory=False
        )
        for failing, said in (("broken", "cannot build this"), ("gone", "ended with code 3")):
            with pytest.raises(RuntimeError, match=said):
                comparison.measure({"a": ours(f"{program}:{failing}")})
    assert found["a"].result[0] == 8e6 and found["b"].result[0] == 16e6
    assert found["a"].result[1] != found["b"].result[1] and found["a"].result[2] == 1
    assert [again[name].result[1] for name in "ab"] == [found[name].result[1] for name in "ab"]
    assert all(side.seconds > 0 for side in found.values())
    if found["a"].peak is not None:
        assert 30e6 < found["a"].peak < 40e6 and 60e6 < found["b"].peak < 80e6


def test_the_limit_is_the_ratio_that_matrix_products_leave_room_for(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with Comparison() as comparison:
        mine, twice = (ours(f"{program}:product", size=size) for size in (256, 512))
        time, limit = comparison.rows("toy", mine, original=twice, measure_memory=False, limit=True)
    assert [time["name"], limit["name"]] == ["toy/vs-original/time", "toy/vs-original/limit"]
    assert limit["baseline"] == time["baseline"] and 0 < limit["ours"] < time["ours"]


def test_69_without_the_originals_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKSCALE_ORIGINALS", str(tmp_path))
    with pytest.raises(EnvironmentRefused, match=r"build them with \./launch/originals"):
        original("attention.py:formulation")


def test_an_original_runs_beside_ours():
    try:
        originals_python()
    except EnvironmentRefused as error:
        pytest.skip(f"originals: {error}")
    options = {"kind": "axial_row", "batch": 1, "text": 4, "grid": 4, "heads": 2, "dim_head": 8}
    with Comparison() as comparison:
        mine = ours("tokscale.bench.attention:formulation", **options)
        rows = list(
            comparison.rows(
                "attention/axial_row", mine, original=original("attention.py:formulation", **options), rounds=1
            )
        )
    assert rows[0]["name"] == "attention/axial_row/vs-original/time" and rows[0]["baseline"] > 0


def test_a_bench_of_unknown_name_is_no_configuration():
    with pytest.raises(ConfigError, match="unknown bench 'nothing'"):
        bench.config_for("nothing")


def test_a_side_that_knows_of_no_device_is_made_on_the_one_that_is_asked_for():
    draw = torch.Generator().manual_seed(0)
    with MadeOn(torch.device("meta")):
        layer, drawn = torch.nn.Linear(3, 2), torch.rand(4, 3, generator=draw)
        named = torch.zeros(1, device="cpu")
        assert layer(drawn).is_meta and torch.arange(3).is_meta and drawn.is_meta and named.is_cpu
    assert torch.rand(1, generator=draw).item() != torch.rand(1, generator=draw.manual_seed(0)).item()
    assert torch.zeros(1).is_cpu
