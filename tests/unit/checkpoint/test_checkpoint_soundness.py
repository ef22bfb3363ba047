"""What is saved is sound, what is loaded is what was saved, and a sound checkpoint always stays."""

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from tokscale.base.errors import CheckpointError, NonFiniteError
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.manifest import Manifest, manifest_bytes, read_checkpoint_manifest
from tokscale.checkpoint.soundness import first_not_finite
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import Flat, alone, tensors

FILE = "model.rank_00000.safetensors"


def store(folder: Path, **config) -> CheckpointStore:
    return CheckpointStore(folder, CheckpointConfig(**config), alone())


def saved(folder: Path, *steps: int, **config) -> CheckpointStore:
    target = store(folder, **config)
    for step in steps:
        target.save(step, {"model": Flat(tensors(step), updates=step)}, {"at": step})
    return target


def resumed(target: CheckpointStore) -> tuple[int, Flat]:
    engine = Flat(tensors(99))

    def load(checkpoint) -> None:
        engine.load(checkpoint.source("model"))

    found = target.resume({"model": engine}, load)
    assert found is not None
    return found.step, engine


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_?????????"))


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int((len(data) - 1) * at)] ^= 1
    path.write_bytes(bytes(data))


def spoil(folder: Path, *, mark: bool | None = None) -> None:
    """Make a checkpoint what an earlier version saved in a streak: whole, with hashes that hold, and full of NaN."""
    manifest = read_checkpoint_manifest(folder)
    path = folder / FILE
    data = bytearray(path.read_bytes())
    data[-64:] = b"\xff" * 64
    path.write_bytes(bytes(data))
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    values = manifest.model_dump(mode="json")
    values["files"][FILE], values["sound"] = record, mark
    content = json.loads(manifest_bytes(Manifest.model_validate(values)))["content"]
    if mark is None:
        del content["sound"]  # as it was written before
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"content": content, "sha256": digest}))


@pytest.mark.parametrize("at", [0.6, 0.8, 1.0])
def test_one_flipped_bit_in_a_tensor_file_is_found_by_reading_it(tmp_path, at, caplog):
    saved(tmp_path, 10, 20)
    flip(tmp_path / "step_000000020" / FILE, at)
    with caplog.at_level(logging.ERROR, logger="tokscale.checkpoint"):
        step, engine = resumed(store(tmp_path))
    assert step == 10 and engine.updates == 10 and "FALLING BACK" in caplog.text and "sha256" in caplog.text
    assert all(torch.equal(value, tensors(10)[key].flatten()) for key, value in engine.local.items())


def test_the_cheaper_check_does_not_hash(tmp_path):
    saved(tmp_path, 10, 20)
    manifest = read_checkpoint_manifest(tmp_path / "step_000000020")
    values = manifest.model_dump(mode="json")
    values["files"][FILE]["sha256"] = "0" * 64
    (tmp_path / "step_000000020/manifest.json").write_bytes(manifest_bytes(Manifest.model_validate(values)))
    assert resumed(store(tmp_path, verify="sizes"))[0] == 20
    assert resumed(store(tmp_path))[0] == 10


@pytest.mark.parametrize("verify", ["sizes", "read", "full"])
def test_values_that_are_not_finite_are_found_whatever_is_verified(tmp_path, verify, caplog):
    saved(tmp_path, 10, 20, 30)
    for step in (20, 30):
        spoil(tmp_path / f"step_0000000{step}")
    with caplog.at_level(logging.ERROR, logger="tokscale.checkpoint"):
        assert resumed(store(tmp_path, verify=verify))[0] == 10
    assert "is not finite" in caplog.text and "FALLING BACK" in caplog.text


def test_no_sound_checkpoint_at_all_is_an_error_that_lists_them(tmp_path):
    saved(tmp_path, 10, 20)
    spoil(tmp_path / "step_000000010")
    spoil(tmp_path / "step_000000020", mark=False)
    with pytest.raises(CheckpointError, match=r"(?s)none of its 2.*not finite.*not finite"):
        resumed(store(tmp_path))


def test_after_falling_back_the_steps_are_saved_again_and_the_bad_ones_kept_aside(tmp_path):
    saved(tmp_path, 10, 20)
    flip(tmp_path / "step_000000020" / FILE, 0.9)
    target = store(tmp_path)
    assert resumed(target)[0] == 10
    target.save(20, {"model": Flat(tensors(20), updates=20)}, {})
    assert resumed(store(tmp_path))[0] == 20
    assert len(list(tmp_path.glob("step_000000020.damaged-*"))) == 1


@pytest.mark.parametrize("mark", [None, False])
def test_unsound_checkpoints_do_not_push_out_the_last_sound_one(tmp_path, mark):
    saved(tmp_path, 10, 20, 30, 40, keep_last=9)
    for step in (20, 30, 40):
        spoil(tmp_path / f"step_0000000{step}", mark=mark)
    target = store(tmp_path, keep_last=2)
    assert resumed(target)[0] == 10
    target.save(15, {"model": Flat(tensors(15), updates=15)}, {})
    assert {10, 15} <= set(steps(tmp_path))
    assert resumed(store(tmp_path))[0] == 15


def test_nothing_is_committed_from_a_state_that_is_not_finite(tmp_path):
    target = saved(tmp_path, 10)
    for key in (("embed.weight", "weight"), ("embed.weight", "exp_avg")):
        for value in (float("nan"), float("inf")):
            state = tensors(1)
            state[key].view(-1)[-1] = value
            with pytest.raises(NonFiniteError, match="not finite after step 20"):
                target.save(20, {"model": Flat(state)}, {})
    assert steps(tmp_path) == [10] and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_element_of_any_kind_is_seen(dtype):
    for size, at in ((1, 0), (17, 16), (10_001, 5000)):
        for value in (float("nan"), float("inf"), -float("inf")):
            data = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
            assert first_not_finite({"model": Flat({("w", "weight"): data})}, alone()) is None
            data[at] = value
            assert "w (weight)" in str(first_not_finite({"model": Flat({("w", "weight"): data})}, alone()))


def test_a_mask_of_infinities_is_sound_and_a_buffer_of_nan_is_not():
    for value, sound in ((float("-inf"), True), (float("nan"), False)):
        mask = Flat({("mask", "buffer"): torch.full((3,), value)})
        assert (first_not_finite({"model": mask}, alone()) is None) is sound


# ------------------------------------------------------------------------------------------------------- links


def test_a_checkpoint_that_was_moved_away_and_linked_back_is_never_emptied(tmp_path):
    root, archive = tmp_path / "checkpoints", tmp_path / "archive"
    target = saved(root, 10, keep_last=2)
    os.rename(root / "step_000000010", archive)
    before = {path.name: path.read_bytes() for path in archive.iterdir()}
    (root / "step_000000010").symlink_to(archive)
    assert resumed(store(root))[0] == 10  # a linked one works as a checkpoint
    for step in (20, 30, 40, 50):
        target.save(step, {"model": Flat(tensors(step))}, {})
    assert {path.name: path.read_bytes() for path in archive.iterdir()} == before
    assert steps(root) == [10, 40, 50]  # and neither counts nor goes


def test_links_among_what_is_swept_lose_the_link_alone(tmp_path):
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    target = saved(root, 10)
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("mine")
    (root / ".step_000000020.ab.tmp").symlink_to(elsewhere)
    (root / ".step_000000030.cd.tmp").mkdir()
    (root / ".step_000000030.cd.tmp/inside").symlink_to(elsewhere)
    (root / ".notes.tmp").write_text("not ours")
    target.save(20, {"model": Flat(tensors(20))}, {})
    assert (elsewhere / "thesis").read_text() == "mine"
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == [".notes.tmp"]


def test_a_linked_folder_of_checkpoints_works_as_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    saved(tmp_path / "checkpoints", 10, 20, 30, keep_last=2)
    assert steps(tmp_path / "disk") == [20, 30] and resumed(store(tmp_path / "checkpoints"))[0] == 30
