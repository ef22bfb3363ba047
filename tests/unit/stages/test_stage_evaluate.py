"""An evaluation that is ended early goes on from what it had drawn and measured, to the same report."""

import json
import os
import signal

import pytest
import tiny_pipeline
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, StopRequested
from tokscale.dist.env import ProcessEnv
from tokscale.dist.slurm import time_limit
from tokscale.evaluation import gen6
from tokscale.inference.pretrained import Pretrained
from tokscale.stages import evaluate, export, sample, train

ALONE = ProcessEnv()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_inputs(folder)
    shared = {
        "run_dir": folder / "run",
        "data_dir": folder / "data",
        "image_tokenizer": folder / "image_tokenizer",
        "text_tokenizer": folder / "text_tokenizer",
    }
    values = {"model": tiny_pipeline.MODEL, "loop": {"total_steps": 2}, "batch_size": 8}
    train.run(decode(train.CONFIG, shared | values), ALONE)
    export.run(decode(export.CONFIG, shared), ALONE)
    return folder / "run/export"


def asked(exported, run_dir, **values):
    keys = {"run_dir": run_dir, "export": exported, "prompts": 8, "images": 4, "batch_size": 2} | values
    return decode(evaluate.CONFIG, keys)


def test_what_was_drawn_and_measured_before_the_end_of_the_time_is_kept(exported, tmp_path, monkeypatch):
    evaluate.run(asked(exported, tmp_path / "undisturbed"), ALONE)
    monkeypatch.setenv("TOKSCALE_OUTCOME", str(tmp_path / "7"))
    drawn, real = [], Pretrained.sample

    def counted(self, captions, **keys):
        if len(drawn) == 2:
            drawn.append(None)
            os.kill(os.getpid(), signal.SIGUSR1)  # in the middle of the third batch
        drawn.append(list(captions))
        return real(self, captions, **keys)

    monkeypatch.setattr(Pretrained, "sample", counted)
    config = asked(exported, tmp_path / "run")
    with pytest.raises(StopRequested, match="2 more piece"), time_limit("evaluate"):
        evaluate.run(config, ALONE)
    assert not (tmp_path / "run/report.json").exists()
    with time_limit("evaluate"):
        evaluate.run(config, ALONE)
    batches = [batch for batch in drawn if batch is not None]
    assert len(batches) == 4 and len({tuple(batch) for batch in batches}) == 4  # nothing was drawn twice
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("undisturbed", "run")]
    ignored = ("seconds", "metrics", "request")
    first, second = ({k: v for k, v in report.items() if k not in ignored} for report in reports)
    assert first == second and first["prompt_accuracy"]
    assert not list((tmp_path / "run").glob(".report.json.parts*"))


@pytest.mark.parametrize(("dtype", "held"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_held_in_the_type_that_was_asked_for(dtype, held, exported, tmp_path, monkeypatch):
    seen, real = [], Pretrained.sample

    def watched(self, captions, **keys):
        seen.extend(parameter.dtype for parameter in self.model.parameters())
        return real(self, captions, **keys)

    monkeypatch.setattr(Pretrained, "sample", watched)
    evaluate.run(asked(exported, tmp_path / "run", dtype=dtype, device="cpu"), ALONE)
    drawn = {"export": exported, "out": tmp_path / "drawn", "prompts": ["a"], "dtype": dtype, "device": "cpu"}
    before = len(seen)
    sample.run(decode(sample.CONFIG, drawn), ALONE)
    assert 0 < before < len(seen) and set(seen) == {held}


def test_another_question_finds_no_parts_of_the_first(exported, tmp_path):
    evaluate.run(asked(exported, tmp_path / "run"), ALONE)
    first = json.loads((tmp_path / "run/report.json").read_text())
    evaluate.run(asked(exported, tmp_path / "run", seed=3), ALONE)
    assert json.loads((tmp_path / "run/report.json").read_text())["request"] != first["request"]


def test_six_questions_are_asked_and_their_answers_kept(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(gen6, "PROMPTS", dict.fromkeys(gen6.TASKS, 4))
    evaluate.run(asked(exported, tmp_path / "run", gen6=2, batch_size=250, judge=True), ALONE)
    found = json.loads((tmp_path / "run/report.json").read_text())["gen6"]
    assert set(found) == {*gen6.TASKS, "overall", "images_per_prompt", "judge_accuracy"}
    assert found["images_per_prompt"] == 2 and [found[task]["prompts"] for task in gen6.TASKS] == [4] * 6
    assert min(found["judge_accuracy"].values()) >= 0.99 and (tmp_path / "run/samples/gen6.png").exists()
    with pytest.raises(ConfigError, match="gen6: its judge reads only shapes"):
        evaluate.run(asked(exported, tmp_path / "run", gen6=1, judge=False), ALONE)
