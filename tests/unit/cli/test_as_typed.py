"""Every stage, every action and every bench, started as a person types it who knows nothing else of it."""

import typing

import pytest

from tokscale import cli
from tokscale.stages import bench, registry
from tokscale.stages.submit import SubmitConfig
from tokscale.stages.tokenize_job import TokenizeConfig

CODES = {0, 64, 65, 69, 74, 78}
"""Those that nothing but a missing or a wrong word, file or machine is to blame for."""
SMALLEST = {
    "prepare": "source.count=4 preview=0",
    "data": "samples=300 codes=16 stock_samples=100 resume_samples=1000 order_samples=1000 memory_samples=100 rounds=1",
    "tokenize": "images=64 source_side=32 image_size=16 memory_images=100 rounds=1",
}
"""Where nothing is missing, so that the work is done."""
LONG = {"calibrate", "checkpoint", "goodput", "gpu", "maskgit", "scale"}
"""Benches that would take minutes; they have tests of their own."""


def actions(config: type) -> list[str]:
    return list(typing.get_args(config.model_fields["action"].annotation))  # pyright: ignore[reportAttributeAccessIssue]


def started(capsys, *words: str) -> int:
    capsys.readouterr()
    code = cli.main(words)
    said = capsys.readouterr()
    assert code in CODES, (words, said.err)
    assert "Traceback" not in said.err and (said.out if code == 0 else said.err).strip()
    if code:
        assert said.err.splitlines()[-1].strip() and "defect" not in said.err
    return code


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("stage", sorted(set(registry.available()) - {"bench"}))
def test_a_stage_says_what_it_needs(capsys, stage):
    started(capsys, stage, *SMALLEST[stage].split() if stage == "prepare" else [])
    started(capsys, stage, "recipe=nowhere")
    started(capsys, stage, "recipe=debug/dalle", "nonsense=1")


@pytest.mark.parametrize("action", actions(TokenizeConfig))
def test_an_action_of_tokenize_says_what_it_needs(capsys, action):
    assert started(capsys, "tokenize", f"action={action}") in (64, 65)
    assert started(capsys, "tokenize", f"action={action}", "recipe=debug/dalle") in (64, 65)


@pytest.mark.parametrize("action", actions(SubmitConfig))
def test_an_action_of_submit_says_what_it_needs(capsys, action):
    started(capsys, "submit", f"action={action}", "recipe=debug/dalle", "dry_run=true")


@pytest.mark.parametrize("what", sorted(bench.whats()))
def test_a_bench_is_found_and_refuses_what_it_does_not_know(capsys, what):
    assert started(capsys, "bench", what, "nonsense=1") == 64
    assert started(capsys, "bench", what, "--help") == 0


@pytest.mark.parametrize("what", sorted(set(bench.whats()) - LONG))
def test_a_bench_measures_or_says_what_it_needs(capsys, monkeypatch, tmp_path, what):
    monkeypatch.setenv("TOKSCALE_ORIGINALS", str(tmp_path / "nowhere"))
    assert started(capsys, "bench", what, *SMALLEST.get(what, "").split()) in (
        (0,) if what in SMALLEST else (64, 65, 69)
    )
