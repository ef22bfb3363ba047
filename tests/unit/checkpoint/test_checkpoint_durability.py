"""Bytes reach the medium before the names that promise them: the manifest after all files, the checkpoint last."""

import pytest
from system_calls import record_calls

from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.manifest import MANIFEST
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import Flat, alone, tensors


@pytest.fixture
def saved(tmp_path, monkeypatch):
    calls = record_calls(monkeypatch)
    with CheckpointStore(tmp_path, CheckpointConfig(), alone()) as store:
        folder = store.save(1, {"model": Flat(tensors(1))}, {"step": 1})
    return folder, calls


def test_every_file_is_synced_and_then_its_name_before_the_manifest_is_begun(saved):
    folder, calls = saved
    manifest = calls.index(("create", MANIFEST))
    others = [path for path in folder.iterdir() if path.name != MANIFEST]
    last = max(calls.synced(path) for path in others)
    assert len(others) >= 3 and last < calls.synced(folder, last) < manifest


def test_the_manifest_and_its_name_are_synced_before_the_checkpoint_is_named(saved):
    folder, calls = saved
    synced = calls.synced(folder / MANIFEST)
    assert synced < calls.synced(folder, synced) < calls.index(("rename", folder.name))


def test_the_checkpoints_name_is_synced(saved):
    folder, calls = saved
    assert calls.synced(folder.parent, calls.index(("rename", folder.name)))


def test_the_runs_name_is_synced_before_a_checkpoint_bears_it(saved):
    folder, calls = saved
    named = calls.index(("rename", "run.json"))
    assert calls.synced(folder.parent / "run.json") < named
    assert calls.synced(folder.parent, named) < calls.index(("rename", folder.name))
