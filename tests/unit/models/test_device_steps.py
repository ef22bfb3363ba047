"""Drawing by steps that the host repeats blindly, as a GPU replays them, against steps that know their position."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import test_dalle_sampling as dalle
import test_maskgit_sampling as maskgit
import test_parti_sampling as parti
import test_rqtransformer_sampling as rq
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokscale.models.dalle import DALLESampling
from tokscale.models.rqtransformer import RQSampling
from tokscale.nn import replay
from tokscale.nn.replay import StepRunner

SEEDS = [5, 6, 7]
DALLES: dict[str, dict[str, Any]] = {
    "seed": {},
    "all kinds": dalle.ALL_KINDS,
    "sparse": {"attn_types": ("sparse", "full")},
    "learned positions": {"rotary_emb": False, "shift_tokens": False},
    "reversible": {"reversible": True},
}


def draw_dalle(options: dict[str, Any], scale: float, primed: int = 0, **guidance: Any) -> Callable[[], torch.Tensor]:
    model, batch = dalle.sharp(**options), dalle.make_batch()
    how = DALLESampling(cond_scale=scale, filter_thres=0.3, num_init_img_tokens=primed, **guidance)
    img = batch.codes if primed else None
    return lambda: model.generate_codes(batch.text, batch.text_mask, options=how, seeds=SEEDS, img=img)


def write_dalle(options: dict[str, Any]) -> Callable[[], torch.Tensor]:
    model, prompts, how = dalle.sharp(**options), ["", "ab", "abcde"], DALLESampling(filter_thres=0.2)
    return lambda: model.generate_texts(dalle.Letters(), prompts, options=how, seeds=SEEDS)[0]


def draw_parti(options: dict[str, Any], scale: float) -> Callable[[], torch.Tensor]:
    model, batch = parti.sharp(**options), parti.make_batch()
    return lambda: parti.generate(model, batch, cond_scale=scale, filter_thres=0.2)


def draw_rq(options: dict[str, Any], scale: float, known: int = 0) -> Callable[[], torch.Tensor]:
    model, batch = rq.sharp(rq.make(condition=rq.CAPTION, **options)), rq.make_batch()
    how, prime = RQSampling(cond_scale=scale, filter_thres=0.3), batch.codes.flatten(1)[:, :known]
    return lambda: model.generate_codes(batch.text, batch.text_mask, options=how, seeds=SEEDS, prime=prime)


def draw_hierarchy() -> Callable[[], torch.Tensor]:
    model = rq.sharp(rq.make_hierarchy())
    return lambda: model.generate(batch=2, options=RQSampling(filter_thres=0.3), seeds=[1, 2])


def draw_maskgit(options: dict[str, Any], **how: Any) -> Callable[[], torch.Tensor]:
    model, batch = maskgit.sharp(**options), maskgit.make_batch()
    return lambda: maskgit.drawn(model, batch, **how)


MASKGITS: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {
    "maskgit": partial(draw_maskgit, {}),
    "maskgit unguided": partial(draw_maskgit, {}, cond_scale=1.0),
    "maskgit with its own look": partial(draw_maskgit, {"self_cond": True}),
    "maskgit with a critic": partial(draw_maskgit, maskgit.SEPARATE),
    "maskgit with its own critic": partial(draw_maskgit, {"self_token_critic": True}),
    "maskgit at a higher resolution": partial(draw_maskgit, maskgit.LOWRES),
}
DRAWINGS: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {
    **{f"dalle {name}": partial(draw_dalle, options, 3.0) for name, options in DALLES.items()},
    **{f"captions of dalle {name}": partial(write_dalle, options) for name, options in DALLES.items()},
    "dalle unguided": partial(draw_dalle, {}, 1.0),
    "dalle guided for a while": partial(
        draw_dalle, {}, 4.0, cond_scale_schedule="linear", cond_scale_interval=(0.2, 0.7)
    ),
    "dalle primed": partial(draw_dalle, dalle.ALL_KINDS, 1.0, 7),
    **{f"parti {name}": partial(draw_parti, options, 3.0) for name, options in parti.VARIANTS.items()},
    "parti unguided": partial(draw_parti, {}, 1.0),
    **{f"rq {name}": partial(draw_rq, options, 3.0) for name, options in rq.VARIANTS.items()},
    **{f"rq with {known} known": partial(draw_rq, rq.FANCY, 1.0, known) for known in (1, 3, 17, 35)},
    "hierarchical": draw_hierarchy,
}


@contextmanager
def device_steps(monkeypatch: pytest.MonkeyPatch, bucket: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(StepRunner, "wanted", staticmethod(lambda device: True))
        patch.setattr(replay, "BUCKET", bucket)
        yield


@pytest.mark.parametrize("name", [*DRAWINGS, *MASKGITS])
def test_blind_steps_draw_the_same_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = (DRAWINGS | MASKGITS)[name]()
    wanted = draw()
    for bucket in (4, 1000):
        with device_steps(monkeypatch, bucket):
            assert torch.equal(draw(), wanted)


class Operations(TorchDispatchMode):
    """What the host asks of a device: names, shapes, numbers, and where results are written in existing memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal"), f"the host looks at a result: {name}"
        told = torch.utils._pytree.tree_map(self._told, (args, kwargs or {}))
        where = args[0].data_ptr() if name in ("index_copy_", "add_") else None
        self.seen.append((name, str(told), where))
        return func(*args, **(kwargs or {}))

    def _told(self, value: Any) -> Any:
        return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", DRAWINGS)
def test_all_steps_of_a_bucket_are_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one captured step stands for all: nothing that the host says follows from the position."""
    steps: list[list[Any]] = []

    def run(runner: StepRunner, count: int, most: int) -> None:
        with Operations() as operations:
            runner._step(most)
        steps.append(operations.seen)

    with device_steps(monkeypatch, 4):
        monkeypatch.setattr(StepRunner, "run", run)
        DRAWINGS[name]()()
    later = steps[1:]  # the first one fills tables that are kept
    assert later or "35" in name
    for step in later:
        assert step == later[0]
    assert not later or any(where for _, _, where in later[0])


@pytest.mark.parametrize("name", MASKGITS)
def test_all_looks_at_an_image_are_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: dict[int, list[list[Any]]] = {}

    def run(runner: StepRunner, count: int, most: int) -> None:
        with Operations() as operations:
            runner._step(most)
        looks.setdefault(id(runner), []).append(operations.seen)

    with device_steps(monkeypatch, 4):
        monkeypatch.setattr(StepRunner, "run", run)
        MASKGITS[name]()()
    # The first look of a model that sees its last one has none to see, and is a kind of its own.
    assert sorted(map(len, looks.values())) == {"maskgit with its own look": [1, 5]}.get(
        name, [6, 6] if "critic" in name else [6]
    )
    for steps in looks.values():
        for step in steps[2:]:  # the first one fills tables that are kept
            assert step == steps[1]


def test_a_replay_reads_its_arguments_where_they_were_when_it_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Callable[[], None]] = []

    def run(runner: StepRunner, count: int, most: int) -> None:
        """As a device: after a capture nothing of Python runs, and results lie where they lay."""
        if not graphs:
            runner._step(most)
            place, kept = places[-1], function_results[-1]
            graphs.append(lambda: kept.copy_(place * 2))
        else:
            graphs[0]()

    places: list[torch.Tensor] = []
    function_results: list[torch.Tensor] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        places.append(x)
        function_results.append(x * 2)
        return function_results[-1]

    monkeypatch.setattr(StepRunner, "wanted", staticmethod(lambda device: True))
    monkeypatch.setattr(StepRunner, "run", run)
    replayed = replay.Replayed(double, torch.device("cpu"))
    for value in (1.0, 5.0, 7.0):
        given = torch.full((2,), value)
        assert torch.equal(replayed(given), 2 * given)
    assert len(places) == 1 and places[0].data_ptr() != given.data_ptr()


class Recorded:
    """A graph of what was asked while it was captured; nothing is done then, as on a device."""

    def __init__(self) -> None:
        self.step: Callable[[], None] | None = None

    def replay(self) -> None:
        assert self.step is not None
        self.step()


def test_a_step_is_run_once_captured_once_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    capturing: list[Recorded] = []

    def step(reach: int) -> None:
        if capturing:
            log.append(f"capture {reach}")
            capturing[0].step = lambda: log.append(f"replay {reach}")
        else:
            log.append(f"run {reach}")

    @contextmanager
    def graph(recorded: Recorded, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        capturing.append(recorded)
        yield
        capturing.clear()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(StepRunner, "_on_own_stream", lambda self, reach: self._step(reach))
    monkeypatch.setattr(replay, "BUCKET", 3)
    runner = StepRunner(step, torch.device("cpu"))
    runner._captures = True
    for count in range(1, 8):
        runner.run(count, most=7)
    assert log == ["run 3", "capture 3", "replay 3", "replay 3", "run 6", "capture 6", "replay 6", "replay 6", "run 7"]


def test_what_cannot_be_captured_runs_launch_by_launch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    @contextmanager
    def graph(recorded: Recorded, capture_error_mode: str) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(StepRunner, "_on_own_stream", lambda self, reach: self._step(reach))
    warnings: list[str] = []
    monkeypatch.setattr(replay._log, "warning", lambda message, *args: warnings.append(message % args))
    runner = StepRunner(ran.append, torch.device("cpu"))
    runner._captures = True
    for count in range(1, 5):
        runner.run(count, most=7)
    assert ran == [7] * 4
    assert len(warnings) == 1 and "not permitted" in warnings[0]
