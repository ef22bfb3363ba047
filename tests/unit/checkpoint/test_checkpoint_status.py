"""What a person is told about a folder of checkpoints."""

import time

from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.status import describe, table
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import Flat, alone, tensors


def test_each_checkpoint_is_described_as_it_lies_there(tmp_path):
    began = time.time()
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=5), alone())
    for step in (1, 2, 3, 4):
        store.save(step, {"model": Flat(tensors(step))}, {})
    (tmp_path / "step_000000002" / "manifest.json").unlink()
    (tmp_path / "step_000000003" / "index.json").write_bytes(b"")
    damaged = tmp_path / "step_000000004" / "model.rank_00000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    quick, full = describe(tmp_path), describe(tmp_path, verify="full")
    assert [info.step for info in quick] == [1, 2, 3, 4]
    assert [info.complete for info in quick] == [True, False, False, True]
    assert [info.hashes_hold for info in quick] == [None] * 4
    assert [info.hashes_hold for info in full] == [True, None, None, False]
    assert (full[0].world, full[0].engines) == (1, ("model",)) and 0 <= full[0].age_seconds <= time.time() - began + 1
    assert full[1].world is None and "never finished" in full[1].problem
    assert full[0].bytes == sum(path.stat().st_size for path in full[0].folder.iterdir())
    lines = table(full).splitlines()
    assert lines[0].split() == ["step", "complete", "size", "ranks", "engines", "age", "hashes", "problem"]
    assert "BROKEN" in lines[4] and lines[1].split()[1] == "yes" and lines[2].split()[1] == "NO"


def test_a_folder_that_is_not_there_has_no_checkpoints(tmp_path):
    assert describe(tmp_path / "none") == []
