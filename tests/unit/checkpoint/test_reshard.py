"""Any number of ranks to any other, bit for bit, reading every stored byte once. Ranks are made one after another."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokscale.base.errors import CheckpointError
from tokscale.checkpoint import commit
from tokscale.checkpoint.disk import Disk
from tokscale.checkpoint.manifest import Part, StoredTensor, index_bytes, merge_ranks, parse_index
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.testing import Flat, tensors
from tokscale.checkpoint.verify import check_belongs, check_hashes
from tokscale.checkpoint.writer import write_share


def save(root: Path, step: int, ranks: list[Flat]) -> Checkpoint:
    """What the store does, with the ranks one after another."""
    root.mkdir(exist_ok=True)
    pending = commit.Pending(root, step, f"id{step}", "run", b"{}", {"model": ranks[0].scalars()})
    disk = Disk()
    disk.make_folder(pending.temporary)
    shares = [
        {"model": write_share(disk, pending.temporary, "model", rank.rank, list(rank.shards()), pending.id)}
        for rank in ranks
    ]
    commit.finish(disk, pending, shares)
    found = Checkpoint(pending.final)
    check_belongs(found.folder, found.manifest, found.manifest.files)
    check_hashes(found.folder, found.manifest, found.manifest.files)
    return found


def load(checkpoint: Checkpoint, world: int) -> tuple[list[Flat], int]:
    """Ranks that took over a checkpoint, and how many data bytes they read together."""
    ranks, total = [], 0
    for rank in range(world):
        engine = Flat(tensors(99), rank, world)
        with checkpoint.source("model") as source:
            engine.load(source)
            total += source.bytes_read
        ranks.append(engine)
    return ranks, total


def assert_whole(ranks: list[Flat], expected: dict[tuple[str, str], torch.Tensor]) -> None:
    for key, value in expected.items():
        assert torch.equal(torch.cat([rank.local[key] for rank in ranks]), value.flatten()), key


def test_a_chain_of_world_sizes_changes_no_bit_and_reads_each_byte_once(tmp_path):
    expected = tensors(1)
    stored = sum(value.numel() * value.element_size() for value in expected.values())
    ranks = [Flat(expected)]
    for step, world in enumerate((2, 4, 3, 1)):
        checkpoint = save(tmp_path, step, ranks)
        assert checkpoint.manifest.engines["model"].bytes == stored
        ranks, read = load(checkpoint, world)
        assert read == stored
        assert_whole(ranks, expected)


def test_training_in_between_follows_the_undivided_engine(tmp_path):
    whole, ranks = Flat(tensors(1)), [Flat(tensors(1))]
    for step, world in enumerate((2, 4, 3, 1)):
        ranks, _ = load(save(tmp_path, step, ranks), world)
        for engine in (whole, *ranks):
            engine.step()
    assert ranks[0].updates == whole.updates == 4
    assert_whole(ranks, whole.local)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 7), max_size=3), worlds=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_any_shape_survives_any_change(tmp_path_factory, shape, worlds):
    value = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    expected = {("a", "weight"): value, ("b", "weight"): value.bool()}
    before, after = worlds
    checkpoint = save(tmp_path_factory.mktemp("c") / "x", 0, [Flat(expected, rank, before) for rank in range(before)])
    ranks = [Flat(expected, rank, after) for rank in range(after)]
    for rank in ranks:
        for data in rank.local.values():
            data.zero_()
        rank.load(checkpoint.source("model"))
    assert_whole(ranks, expected)


def stored(*bounds: tuple[int, int], shape=(10,), dtype="F32") -> list[StoredTensor]:
    return [StoredTensor("w", "weight", dtype, shape, [Part("f", *bound) for bound in bounds])]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([stored((0, 4)), stored((6, 10))], r"nobody stored elements \[4, 6\) of 10"),
        ([stored((0, 6)), stored((4, 10))], r"two ranks stored elements \[4, 6\) of 10"),
        ([stored((0, 4)), stored((4, 9))], r"nobody stored elements \[9, 10\)"),
        ([stored((0, 4)), stored((4, 10), shape=(10, 1))], r"ranks hold F32\(10,\) and F32\(10, 1\)"),
        ([stored((0, 4)), stored((4, 10), dtype="BF16")], "and BF16"),
    ],
)
def test_shares_that_do_not_tile_a_tensor_are_refused(ranks, message):
    with pytest.raises(CheckpointError, match=message):
        merge_ranks("model", ranks)


def test_the_index_is_read_back_as_written():
    tensors_ = merge_ranks("model", [stored((0, 4)), stored((4, 10))])
    assert parse_index(index_bytes({"model": tensors_, "critic": []})) == {"model": tensors_, "critic": []}
