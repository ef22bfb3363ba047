"""Weights of another run, taken by name: strictly, or with named exclusions, and nothing but weights."""

import shutil

import pytest
import torch

from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.protocols import Engine
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.export import write_export
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import alone
from tokscale.checkpoint.warmstart import warm_start
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig
from tokscale.engine.testing import ToyModel, snapshot, toy, train


def engine(seed: int, **options) -> Engine:
    return build_engine(
        "model",
        toy(seed, **options),
        config=EagerConfig(ema=(0.9,)),
        optimizer=AdamWConfig(lr=0.1),
        schedule=ScheduleConfig(kind="constant"),
        comm=alone(),
        micro_batches=1,
        micro_batch_size=8,
        total_steps=10,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained engine, its checkpoint folder and its export."""
    folder = tmp_path_factory.mktemp("source")
    trained = engine(1)
    train(trained, alone(), range(3))
    CheckpointStore(folder / "checkpoints", CheckpointConfig(), alone()).save(3, {"model": trained}, {})
    with torch.device("meta"):
        meta = ToyModel()
    write_export(
        folder / "export", meta_model=meta, model_config={"kind": "toy"}, state_dict=trained.model.state_dict()
    )
    return folder, trained


@pytest.mark.parametrize("kind", ["export", "checkpoints", "checkpoints/step_000000003"])
def test_weights_are_taken_and_nothing_else(source, kind):
    folder, trained = source
    fresh = engine(2)
    done = warm_start(fresh, folder / kind, alone())
    assert done.fresh == () and "embed.weight" in done.loaded and "scale" in done.loaded
    expected, found, untouched = (snapshot(e, alone()).whole() for e in (trained, fresh, engine(2)))
    for (name, slot), value in found.items():
        source_slot = slot if slot in ("frozen", "buffer") else "weight"
        same = (
            expected[name, source_slot] if slot in ("weight", "frozen", "buffer", "ema/0.9") else untouched[name, slot]
        )
        assert torch.equal(value, same), (name, slot)
    assert fresh.scalars() == engine(2).scalars()
    train(fresh, alone(), range(1))


def test_an_average_can_be_the_start(source):
    folder, trained = source
    fresh = engine(2)
    warm_start(fresh, folder / "checkpoints", alone(), weights="ema")
    state = snapshot(trained, alone()).whole()
    assert torch.equal(fresh.model.embed.weight, state["embed.weight", "ema/0.9"])
    assert not torch.equal(fresh.model.embed.weight, state["embed.weight", "weight"])


def test_a_larger_model_needs_its_new_tensors_excluded_by_name(source):
    folder, trained = source
    fresh, before = engine(2, uses=(0, 1, 0, 1)), engine(2, uses=(0, 1, 0, 1))
    with pytest.raises(CheckpointError, match=r"2 tensors do not fit.*norms\.3\.weight is missing"):
        warm_start(fresh, folder / "export", alone())
    done = warm_start(fresh, folder / "export", alone(), exclude=["norms.3.*", "blocks.0.2.bias"])
    assert set(done.fresh) == {"norms.3.weight", "norms.3.bias", "blocks.0.2.bias"}
    assert torch.equal(fresh.model.blocks[0][2].bias, before.model.blocks[0][2].bias)
    assert torch.equal(fresh.model.blocks[1][2].bias, trained.model.blocks[1][2].bias)


def test_another_shape_is_refused_unless_excluded(source):
    folder, _ = source
    with pytest.raises(CheckpointError, match=r"embed\.weight has shape \(23, 15\), the model says \(23, 9\)"):
        warm_start(engine(2, dim=9), folder / "export", alone())


def test_an_exclusion_that_excludes_nothing_is_a_misspelling(source):
    folder, _ = source
    with pytest.raises(ConfigError, match=r"'haed\.\*' matches no tensor"):
        warm_start(engine(2), folder / "export", alone(), exclude=["haed.*"])


def test_a_run_folder_stands_for_its_checkpoints(source, tmp_path):
    one, other = engine(2), engine(2)
    warm_start(one, source[0] / "checkpoints", alone())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(source[0] / "checkpoints")
    warm_start(other, tmp_path / "run", alone())
    assert torch.equal(one.model.embed.weight, other.model.embed.weight)


def test_a_folder_of_neither_kind_is_refused(source, tmp_path):
    del source
    with pytest.raises(ConfigError, match="neither an export nor a checkpoint"):
        warm_start(engine(2), tmp_path, alone())


@pytest.mark.parametrize("kind", ["export", "checkpoints", "checkpoints/step_000000003"])
def test_one_flipped_bit_is_not_trained_from(source, kind, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source[0], copy)
    (path,) = copy.glob("export/model.safetensors" if kind == "export" else "checkpoints/step_*/model.rank*")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"cannot be trained from: .*sha256"):
        warm_start(engine(2), copy / kind, alone())


def test_weights_that_are_not_finite_are_not_trained_from(tmp_path):
    state = engine(1).model.state_dict()
    state["scale"][0] = float("nan")
    with torch.device("meta"):
        meta = ToyModel()
    write_export(tmp_path / "export", meta_model=meta, model_config={"kind": "toy"}, state_dict=state)
    with pytest.raises(CheckpointError, match=r"scale .*is not finite"):
        warm_start(engine(2), tmp_path / "export", alone())
