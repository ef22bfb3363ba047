"""One process: what is saved comes back bit for bit, and nothing damaged is ever taken for whole."""

import json
import logging
import shutil

import pytest
import torch
from safetensors import safe_open

from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import Flat, alone, tensors

STATE = {"step": 3, "loader": {"position": 12}, "config": {"seed": 1}}


def store(folder, **config) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", CheckpointConfig(**config), alone())


def assert_equal(engine: Flat, expected: dict) -> None:
    for key, value in engine.local.items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key].flatten()), key


@pytest.mark.parametrize("async_save", [False, True])
def test_a_saved_state_comes_back_bit_for_bit(tmp_path, async_save):
    saved = tensors(1)
    with store(tmp_path, async_save=async_save) as target:
        assert target.newest() is None
        target.save(3, {"model": Flat(saved, updates=3)}, STATE)
    found = store(tmp_path, verify="full").newest()
    assert found is not None and found.step == 3 and found.state == STATE and found.engines == ("model",)
    fresh = Flat(tensors(2))
    fresh.load(found.source("model"))
    assert_equal(fresh, saved)
    assert fresh.updates == 3


def test_files_are_ordinary_safetensors(tmp_path):
    saved = tensors(1)
    path = store(tmp_path).save(1, {"model": Flat(saved)}, {})
    with safe_open(path / "model.rank_00000.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("weight|embed.weight@0"), saved["embed.weight", "weight"].flatten())
        assert torch.equal(file.get_tensor("frozen|norm.scale@0"), saved["norm.scale", "frozen"])
        assert torch.equal(file.get_tensor("buffer|mask@0"), saved["mask", "buffer"].flatten())


def test_only_the_asked_range_is_read(tmp_path):
    saved = tensors(1)
    store(tmp_path).save(1, {"model": Flat(saved)}, {})
    source = store(tmp_path).newest().source("model")
    assert torch.equal(source.read("embed.weight", "exp_avg", 4, 9), saved["embed.weight", "exp_avg"].flatten()[4:9])
    assert source.bytes_read == 5 * 4
    assert source.read("nothing", "buffer", 0, 0).numel() == 0
    assert source.shape("nothing", "buffer") == (0, 4)
    assert source.names()[:2] == ("embed.weight", "head.bias")
    assert source.slots("head.bias") == ("weight", "exp_avg", "exp_avg_sq", "ema/0.999") and source.slots("x") == ()


def test_unknown_names_and_ranges_are_explained(tmp_path):
    store(tmp_path).save(1, {"model": Flat(tensors(1))}, {})
    found = store(tmp_path).newest()
    with pytest.raises(CheckpointError, match="did you mean 'model'"):
        found.source("modle")
    source = found.source("model")
    with pytest.raises(CheckpointError, match=r"no 'ema/0.9' of 'head.bias'; stored are weight, "):
        source.read("head.bias", "ema/0.9", 0, 3)
    with pytest.raises(CheckpointError, match=r"did you mean 'head\.bias'"):
        source.read("head.bia", "weight", 0, 3)
    with pytest.raises(CheckpointError, match=r"\[0, 4\) lies outside its 3 elements"):
        source.read("head.bias", "weight", 0, 4)


def test_retention_keeps_the_last_and_the_marked_ones(tmp_path):
    target = store(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 10):
        target.save(step, {"model": Flat(tensors(step))}, {})
    names = sorted(path.name for path in target.folder.iterdir())
    assert names == ["latest", "run.json"] + [f"step_{step:09d}" for step in (4, 8, 9)]
    assert (target.folder / "latest").read_text() == "step_000000009\n"


def test_keeping_fewer_than_two_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        CheckpointConfig(keep_last=1)


def test_a_step_that_is_saved_already_is_left_alone_and_a_damaged_one_is_replaced(tmp_path):
    target = store(tmp_path)
    path = target.save(1, {"model": Flat(tensors(1))}, {})
    before = (path / "manifest.json").read_bytes()
    assert target.save(1, {"model": Flat(tensors(1))}, {}) == path
    assert (path / "manifest.json").read_bytes() == before
    (path / "state.json").write_bytes(b"")
    target.save(1, {"model": Flat(tensors(1))}, {})
    assert target.newest().step == 1
    assert [entry.name.split("-")[0] for entry in target.folder.glob("*damaged*")] == ["step_000000001.damaged"]


def two_steps(folder) -> CheckpointStore:
    target = store(folder)
    for step in (10, 20):
        target.save(step, {"model": Flat(tensors(step), updates=step), "critic": Flat(tensors(step + 1))}, {"at": step})
    return target


FILES = ["manifest.json", "index.json", "state.json", "model.rank_00000.safetensors", "critic.rank_00000.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "grown"])
def test_damage_that_sizes_show_falls_back_loudly(tmp_path, name, damage, caplog):
    target = two_steps(tmp_path)
    path = target.folder / "step_000000020" / name
    data = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:-1], "emptied": b"", "grown": data + b"x"}[damage])
    with caplog.at_level(logging.ERROR, logger="tokscale.checkpoint"):
        assert target.newest().step == 10
    assert "FALLING BACK" in caplog.text and name in caplog.text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.01, 0.5, 0.99])
def test_any_flipped_bit_falls_back_when_verifying_in_full(tmp_path, name, where):
    two_steps(tmp_path)
    path = tmp_path / "checkpoints" / "step_000000020" / name
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(bytes(data))
    assert store(tmp_path, verify="full").newest().step == 10


def test_checkpoints_that_cannot_be_read_stop_the_run(tmp_path):
    target = two_steps(tmp_path)
    for path in target.folder.glob("step_*/manifest.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"(?s)none of its 2 checkpoints.*never finished.*move the folder away"):
        target.newest()
    assert CheckpointError.exit_code == 78


def test_an_empty_or_wrong_latest_changes_nothing(tmp_path):
    target = two_steps(tmp_path)
    for text in ("", "step_000000010\n", "nonsense"):
        (target.folder / "latest").write_text(text)
        assert target.newest().step == 20


def test_latest_without_any_checkpoint_is_not_a_fresh_run(tmp_path):
    target = two_steps(tmp_path)
    for path in target.folder.glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="deleted or moved"):
        target.newest()


def test_a_file_of_another_save_is_found_by_its_header(tmp_path):
    target = two_steps(tmp_path)
    first, second = (target.folder / f"step_0000000{step}" / FILES[3] for step in (10, 20))
    shutil.copy(first, second)
    assert first.stat().st_size == second.stat().st_size
    assert target.newest().step == 10


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path):
    target = two_steps(tmp_path / "a")
    other = two_steps(tmp_path / "b")
    other.save(30, {"model": Flat(tensors(1))}, {})
    shutil.copytree(other.folder / "step_000000030", target.folder / "step_000000030")
    assert target.newest().step == 20
    # A folder that lost its identity takes over that of its newest checkpoint.
    (other.folder / "run.json").unlink()
    other.save(40, {"model": Flat(tensors(1))}, {})
    assert other.newest().step == 40 and len(list(other.folder.glob("step_*"))) == 3


def test_a_renamed_checkpoint_is_passed_over(tmp_path):
    target = two_steps(tmp_path)
    (target.folder / "step_000000020").rename(target.folder / "step_000000021")
    assert target.newest().step == 10


def test_what_a_crashed_save_left_is_ignored_and_swept(tmp_path):
    target = two_steps(tmp_path)
    shutil.copytree(target.folder / "step_000000020", target.folder / ".step_000000030.ab.tmp")
    (target.folder / ".latest.ab.tmp").write_text("x")
    assert target.newest().step == 20
    target.save(40, {"model": Flat(tensors(1))}, {})
    assert not [path for path in target.folder.iterdir() if path.name.startswith(".")]


def test_only_a_crashed_first_save_is_a_fresh_run(tmp_path):
    target = store(tmp_path)
    (target.folder / ".step_000000030.ab.tmp").mkdir(parents=True)
    assert target.newest() is None and target.empty()
    target.save(1, {"model": Flat(tensors(1))}, {})
    assert not target.empty()


def test_a_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        store(tmp_path).save(1, {"model": Flat(tensors(1))}, {"a": object()})
    assert not (tmp_path / "checkpoints").exists()


def test_an_engine_name_that_is_no_file_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'\.\./evil'"):
        store(tmp_path).save(1, {"../evil": Flat(tensors(1))}, {})


@pytest.mark.parametrize(
    ("rank", "world", "message"), [(0, 2, "nobody stored elements"), (1, 2, "nobody stored elements [0,")]
)
def test_an_engine_that_forgets_a_range_is_refused(tmp_path, rank, world, message):
    target = two_steps(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        target.save(30, {"model": Flat(tensors(1), rank, world)}, {})
    assert message in str(caught.value)
    assert target.newest().step == 20
    assert not list(target.folder.glob(".*"))


def test_a_newer_format_is_refused_by_name(tmp_path):
    target = two_steps(tmp_path)
    path = target.folder / "step_000000020" / "manifest.json"
    stored = json.loads(path.read_text())
    stored["content"]["format"] = 99
    path.write_text(json.dumps(stored))
    assert target.newest().step == 10
