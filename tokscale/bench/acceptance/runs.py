"""Whole parts on the device: image tokenizers, saving beside training, the tests that need a GPU, the quickstart."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any, get_args

import torch

from tokscale.base import rng
from tokscale.base.config import decode
from tokscale.base.package_data import package_data_path
from tokscale.base.strict_yaml import read_yaml
from tokscale.bench import plan
from tokscale.bench.acceptance.models import small_model
from tokscale.bench.acceptance.setting import ROOT, Setting, shipped_model
from tokscale.bench.measure import failed, figure, interleaved, row, skipped
from tokscale.bench.stepping import Stepper, filled, settle
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import resolve_auto_dtype
from tokscale.engine.config import AdamWConfig, ZeroConfig
from tokscale.tokenizers.codec import FrozenImageTokenizer, Precision
from tokscale.tokenizers.image import ImageTokenizerConfig, codec_class

VQGAN_TARGET = 1500.0
"""Pictures that the f16 VQGAN is to tokenize in a second on a GPU."""
TOKENIZERS = ("vqgan_f16_16384", "vitvqgan_base", "rqvae_imagenet", "dvae_dalle_paper")
TINY_TOKENIZERS = ("dvae_shapes", "vqgan_shapes")


def tokenizers(setting: Setting) -> Iterator[dict[str, Any]]:
    """Images a second by arithmetic, and the share of ids equal to those of fp32; of random weights and noise."""
    for name in TINY_TOKENIZERS if setting.tiny else TOKENIZERS:
        values = read_yaml(package_data_path("configs") / "tokenizer" / f"{name}.yaml")
        config: Any = decode(ImageTokenizerConfig, values)
        with rng.scope(0, "bench", "tokenizers"):
            codec = codec_class(config)(config).to(setting.device)
        batch, exact = 2 if setting.tiny else 64, None
        draw = rng.generator(0, "bench", "images")
        shape = (batch, codec.channels, *codec.image_hw)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw).to(setting.device)
        for precision in get_args(Precision):
            case = f"gpu/tokenizers/{name}/b{batch}/{precision}"
            tokenizer = FrozenImageTokenizer(codec, precision=precision)
            codes = tokenizer.encode(pixels)
            exact = codes if exact is None else exact
            calls = {"encode": partial(tokenizer.encode, pixels), "decode": partial(tokenizer.decode, codes)}
            for what, seconds in interleaved(calls, 1 if setting.tiny else 3, setting.device).items():
                yield _rate(f"{case}/{what}/throughput", batch / seconds, name, what, setting)
            yield figure(f"{case}/equal-ids", (codes == exact).float().mean().item(), "of all ids")


def _rate(name: str, rate: float, tokenizer: str, what: str, setting: Setting) -> dict[str, Any]:
    if (tokenizer, what, setting.device.type) == ("vqgan_f16_16384", "encode", "cuda") and "bf16" in name:
        return row(name, rate, VQGAN_TARGET, "images/s", 1.0, more_is_better=True)
    return figure(name, rate, "images/s")


def saving(setting: Setting) -> Iterator[dict[str, Any]]:
    """What an asynchronous save costs the steps beside it, and whether what was saved goes on as if undisturbed."""
    model: Any = shipped_model("dalle/gpt_350m")
    codes, words, shape, size = 8192, 16384, (16, 16), 8
    if setting.tiny:
        model, codes, words, shape, size = small_model(model), 32, 50, (4, 4), 2
    fitted = plan.fit(plan.PlanBench(model=model, codes=codes, words=words, code_shape=shape))
    asked = plan.PlanBench(model=fitted, micro_batch_size=size, code_shape=shape)
    batch = filled(plan.example(fitted, asked), setting.device, codes=codes, words=words)
    comm = Comm(ProcessEnv(), setting.device)
    engine: Any = resolve_auto_dtype(decode(ZeroConfig, {"dtype": setting.dtypes[0]}), comm)
    step = Stepper(fitted, engine, AdamWConfig(), comm, batch)
    folder = setting.scratch / "checkpoints"
    store = CheckpointStore(folder, CheckpointConfig(async_save=True), comm)
    alone = [_timed(step, setting.device) for _ in range(3 if setting.tiny else 10)][1:]
    began = time.perf_counter()
    store.save(step.done, {"model": step.engine}, {})
    yield figure("gpu/saving/stall/time", 1e3 * (time.perf_counter() - began), "ms")
    wanted, beside = step().item(), []
    while store.poll() is None:
        beside.append(_timed(step, setting.device))
    store.close()
    if beside:
        yield row("gpu/saving/step-beside-a-save/vs-step/time", median(beside) * 1e3, median(alone) * 1e3, "ms")
    saved = CheckpointStore(folder, CheckpointConfig(), comm).newest()
    assert saved is not None
    del step
    settle(setting.device)
    again = Stepper(fitted, engine, AdamWConfig(), comm, batch, first=saved.step)
    with saved.source("model") as source:
        again.engine.load(source)
    far = abs(again().item() - wanted) / abs(wanted)
    yield row("gpu/saving/loss-after-loading", max(far, 1e-12), 1e-5, "relative", 1.0)


def _timed(step: Stepper, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def tests(setting: Setting) -> Iterator[dict[str, Any]]:
    """The tests marked `gpu`, by pytest, whose last words stay in the report."""
    files = sorted(
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^@pytest\.mark\.gpu", path.read_text(), re.M)
    )
    if not files:
        yield skipped("gpu/tests", "the tests lie in a checkout; this is an installed package")
        return
    files = files[:1] if setting.tiny else files
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *map(str, files)]
    ended = subprocess.run(words, cwd=ROOT, env=_environment(setting), capture_output=True, text=True)
    (setting.folder / "tests.txt").write_text(ended.stdout[-20_000:])
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", ended.stdout)}
    for word in ("passed", "skipped"):
        yield figure(f"gpu/tests/{word}", counts.get(word, 0), "tests")
    if ended.returncode != 0:
        told = (ended.stdout + ended.stderr).strip().splitlines()[-1:]
        yield failed("gpu/tests", f"pytest ended with {ended.returncode}: {' '.join(told)}; see tests.txt")


STAGES = ("prepare", "train-tokenizer", "tokenize", "train", "export", "sample", "evaluate")
ON_DEVICE = frozenset(STAGES) - {"prepare", "export"}
_COMMANDS = """
import json, sys, time
from tokscale.cli import main
for words in json.loads(sys.argv[1]):
    began = time.perf_counter()
    code = main(words)
    print("ROW " + json.dumps([words[0], code, time.perf_counter() - began]), flush=True)
    if code:
        sys.exit(code)
"""
"""All commands in one process: a start of each would take longer than most of them."""


def quickstart(setting: Setting) -> Iterator[dict[str, Any]]:
    """The quickstart's commands with 100 training steps, pictures and their evaluation."""
    recipe, steps = ("debug/dalle", 5) if setting.tiny else ("quickstart/dalle", 100)
    keys = [f"recipe={recipe}", f"run_dir={setting.scratch / 'quickstart'}"]
    where = f"device={setting.device}"
    own: dict[str, list[str]] = {
        "prepare": ["source.count=64"] if setting.tiny else ["source.count=5000"],
        "train-tokenizer": [f"loop.total_steps={steps if setting.tiny else 300}"],
        "train": [f"loop.total_steps={steps}", "loop.log_every=1"],
        "evaluate": ["prompts=2", "images=8"] if setting.tiny else ["prompts=16", "images=256"],
    }
    commands = [[stage, *keys, *([where] if stage in ON_DEVICE else []), *own.get(stage, [])] for stage in STAGES]
    words = [sys.executable, "-c", _COMMANDS, json.dumps(commands)]
    process = subprocess.Popen(
        words, cwd=ROOT, env=_environment(setting), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("ROW "):
            stage, code, seconds = json.loads(line.removeprefix("ROW "))
            if not code:
                yield figure(f"gpu/quickstart/{stage}/time", seconds, "s")
    if process.wait() != 0:
        last = [line.strip() for line in said if line.strip() and not line.startswith("ROW ")][-3:]
        yield failed("gpu/quickstart", f"ended with {process.returncode}: {' / '.join(last)}"[:800])
        return
    lines = (setting.scratch / "quickstart" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    yield row("gpu/quickstart/loss/vs-first", losses[-1], losses[0], "nats", None if setting.tiny else 1.2)


def _environment(setting: Setting) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    if setting.device.type == "cuda":
        environment.pop("DS_ACCELERATOR", None)
    else:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
