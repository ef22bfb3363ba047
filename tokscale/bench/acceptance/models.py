"""Models on the device: first losses beside stored ones, training, decoding, a trace of one step."""

import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tokscale.base.config import encode
from tokscale.bench import decode, plan, train
from tokscale.bench.acceptance.setting import ROOT, Setting, shipped_model
from tokscale.bench.measure import failed, figure, row, skipped
from tokscale.bench.stepping import Stepper, filled
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import resolve_auto_dtype
from tokscale.engine.config import AdamWConfig, ZeroConfig

STORED_LOSSES = ROOT / "tests/contracts/test_losses.py"
ENGINES = {
    "eager": "engine={kind: eager, dtype: DTYPE}",
    "zero1": "engine={kind: zero, stage: 1, dtype: DTYPE}",
    "zero3": "engine={kind: zero, stage: 3, dtype: DTYPE}",
}
CLOSE = {"fp32": 1e-4, "bf16": 3e-2}
"""How far the first losses may be from those of a CPU in fp32, relative."""
MOST_TRACE = 10e6
"""Bytes of a compressed trace; a longer one is left out."""


def losses(setting: Setting) -> Iterator[dict[str, Any]]:
    """The first two losses of every debug recipe by every engine beside those stored of a CPU.

    `ours` is the largest relative difference, `baseline` what is allowed.
    """
    if not STORED_LOSSES.exists():
        yield skipped("gpu/losses", "stored losses lie in tests/ of a checkout; this is an installed package")
        return
    spec = importlib.util.spec_from_file_location("stored_losses", STORED_LOSSES)
    assert spec is not None and spec.loader is not None
    stored = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stored)
    ways = [(name, setting.dtypes[0]) for name in ENGINES] + [("eager", "fp32")]
    for case in stored.CASES:
        if setting.tiny:  # tokenizers take two engines each, which DeepSpeed takes a second to build
            ways = [("zero3" if case.endswith("/train") else "eager", "fp32")]
        wanted = json.loads(stored.stored_file(case).read_text())[0]["losses"]
        for name, dtype in dict.fromkeys(ways):
            title = f"gpu/losses/{case}/{dtype}/{name}"
            try:
                found = stored.measured(case, ENGINES[name].replace("DTYPE", dtype), steps=2)
            except Exception as error:
                yield failed(title, " ".join(f"{type(error).__name__}: {error}".split())[:500])
                continue
            # The second loss of a tokenizer shows which of two equally near codes was chosen.
            pairs = list(zip(found, wanted, strict=False))[: 1 if case in stored.CHOOSES else 2]
            far = max(abs(ours - right) / abs(right) for ours, right in pairs)
            yield row(title, max(far, 1e-12), CLOSE[dtype], "relative", 1.0)


TRAINED: dict[str, dict[str, Any]] = {
    "dalle/gpt_350m": {"micro_batch_sizes": [32], "code_shape": [32, 32]},
    "dalle/gpt_1b": {"micro_batch_sizes": [16], "code_shape": [32, 32]},
    "maskgit/muse_632m": {"micro_batch_sizes": [64], "code_shape": [16, 16]},
    "parti/paper_750m": {"micro_batch_sizes": [16], "code_shape": [32, 32]},
    "rqtransformer/paper_480m_imagenet": {"micro_batch_sizes": [64], "code_shape": [8, 8, 4]},
    "dalle/llamagen_l": {"micro_batch_sizes": [64], "code_shape": [16, 16], "codes": 16384},
    "dalle/llamagen_3b": {"micro_batch_sizes": [32], "code_shape": [16, 16], "codes": 16384},
}
"""What `bench train` is asked, by the model's file."""
MFU_TARGETS = {"dalle/gpt_1b": 0.5, "maskgit/muse_632m": 0.45, "parti/paper_750m": 0.45}
MFU_TARGETS |= {"rqtransformer/paper_480m_imagenet": 0.45, "dalle/llamagen_l": 0.43, "dalle/llamagen_3b": 0.43}
"""MFU with the visible pairs counted, in bf16 on a GPU; LlamaGen's: the most worked out for its authors."""
_TINY = {"micro_batch_sizes": [2], "codes": 32, "words": 50, "steps": 1, "warm_steps": 2}


def training(setting: Setting) -> Iterator[dict[str, Any]]:
    """`bench train` of the models that the field knows, `remat` off and as configured."""
    for name, options in _of_each_kind(TRAINED, setting):
        model = shipped_model(name)
        asked: dict[str, Any] = {"remats": list(dict.fromkeys(["none", model.remat])), **options}
        if setting.tiny:
            model, asked = small_model(model), {"remats": [model.remat], "code_shape": _grid(options), **_TINY}
        engine = {"kind": "zero", "dtype": setting.dtypes[0]}
        config = train.TrainBench.model_validate(
            {"model": model, "engine": engine, "device": str(setting.device), **asked}
        )
        yield from _renamed(name, "training", train.rows(config), setting)
    if setting.device.type == "cuda":
        config = train.TrainBench.model_validate(
            {"model": shipped_model("dalle/gpt_350m"), "engine": {"kind": "zero", "dtype": "bf16"}, "device": "cuda"}
            | {"remats": ["none"], "micro_batch_sizes": [32], "deterministic": True}
        )
        yield from _renamed("dalle/gpt_350m/deterministic", "training", train.rows(config), setting)


DECODED: dict[str, dict[str, Any]] = {
    "dalle/rar_xl": {"batches": [128], "code_shape": [16, 16], "codes": 1024, "cond_scale": 4.0},
    "dalle/gpt_1b": {"batches": [1, 8, 64], "code_shape": [8, 8]},
    "maskgit/muse_632m": {"batches": [1, 8, 64], "code_shape": [16, 16], "cond_scale": 3.0},
    "parti/paper_750m": {"batches": [8], "code_shape": [8, 8], "cond_scale": 3.0},
    "rqtransformer/paper_480m_imagenet": {"batches": [8], "code_shape": [8, 8, 4]},
}
"""What `bench decode` is asked."""


def decoding(setting: Setting) -> Iterator[dict[str, Any]]:
    """`bench decode` of the same families; the first is the size for which others have published rates."""
    for name, options in _of_each_kind(DECODED, setting):
        model, asked = shipped_model(name), {"rounds": 1, **options}
        if setting.tiny:
            model = small_model(model)
            asked |= {"batches": [1], "code_shape": _grid(options), "codes": 32, "words": 50}
        config = decode.DecodeBench.model_validate(
            {"model": model, "device": str(setting.device), "dtype": setting.dtypes[0], **asked}
        )
        yield from _renamed(name, "decoding", decode.rows(config), setting)


def _of_each_kind(asked: dict[str, dict[str, Any]], setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """All that is asked; of tiny models, which differ no more, the first of each kind."""
    kinds: set[str] = set()
    for name, options in asked.items():
        kind = name.partition("/")[0]
        if not (setting.tiny and kind in kinds):
            yield name, options
        kinds.add(kind)


def _renamed(name: str, section: str, found: Iterator[dict[str, Any]], setting: Setting) -> Iterator[dict[str, Any]]:
    """Rows under the model's file; a failure becomes one of them."""
    try:
        for entry in found:
            case = entry["name"].split("/", 2)[2]
            told = entry | {"name": f"gpu/{section}/{name}/{case}"}
            if not setting.tiny and case.startswith("best/") and "/mfu/" in case and "target" in entry:
                told["target"] = MFU_TARGETS.get(name)
            yield told
    except Exception as error:
        yield failed(f"gpu/{section}/{name}", " ".join(f"{type(error).__name__}: {error}".split())[:500])


def small_model(model: Any) -> Any:
    """The same kind of model with the same options, as small as it can be."""
    values = encode(model)
    small = {"dim": 32, "heads": 2, "dim_head": 16, "depth": 2, "spatial_layers": 2, "depth_layers": 1}
    small |= {"text_seq_len": 8, "max_text_len": 8, "kernel_size": 3}
    values |= {key: value for key, value in small.items() if key in values and isinstance(values[key], int)}
    if (condition := values.get("condition")) is not None:
        small |= {"width": 16, "num_classes": 10, "depth": 1}
        condition |= {key: value for key, value in small.items() if isinstance(condition.get(key), int)}
    return type(model).model_validate(values)


def _grid(options: dict[str, Any]) -> list[int]:
    return [4, 4, *([2] if len(options["code_shape"]) > 2 else [])]


def trace(setting: Setting) -> Iterator[dict[str, Any]]:
    """One training step of the 350M DALL-E as a trace for a browser (ui.perfetto.dev), and what its kernels took."""
    model = shipped_model("dalle/gpt_350m")
    codes, words, shape, size = 8192, 16384, (32, 32), 8
    if setting.tiny:
        model, codes, words, shape, size = small_model(model), 32, 50, (4, 4), 2
    fitted = plan.fit(plan.PlanBench(model=model, codes=codes, words=words, code_shape=shape))
    asked = plan.PlanBench(model=fitted, micro_batch_size=size, code_shape=shape)
    batch = filled(plan.example(fitted, asked), setting.device, codes=codes, words=words)
    comm = Comm(ProcessEnv(), setting.device)
    engine = resolve_auto_dtype(ZeroConfig(dtype=setting.dtypes[0]), comm)  # type: ignore[arg-type]
    step = Stepper(fitted, engine, AdamWConfig(), comm, batch)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if setting.device.type == "cuda" else []
    with profile(activities=activities) as seen:
        step().item()
    plain, packed = setting.scratch / "trace.json", setting.folder / "trace.json.gz"
    seen.export_chrome_trace(str(plain))
    with open(plain, "rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    size_found = packed.stat().st_size
    yield figure("gpu/trace/file", size_found / 1e6, "MB")
    if size_found > MOST_TRACE:
        packed.unlink()
        yield skipped("gpu/trace", f"the trace has {size_found / 1e6:.0f} MB, more than a report may; it is left out")
    on_device = setting.device.type == "cuda"
    spent: Callable[[Any], float] = lambda event: (  # noqa: E731
        event.self_device_time_total if on_device else event.self_cpu_time_total
    )
    for event in sorted(seen.key_averages(), key=spent, reverse=True)[:10]:
        yield figure(f"gpu/trace/top/{event.key[:60].replace('/', '-')}", spent(event) / 1e3, "ms")
