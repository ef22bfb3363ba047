"""Raw shards to token shards: right, in input order, byte for byte the same, and nothing stops the rest."""

import errno
import io
import json
import os
import tarfile
import threading

import numpy as np
import pytest
import torch
from token_folders import LetterTokenizer
from tokenizing import CPU, MeanTokenizer, encoded, image, make_raw, make_recipe, plain_records, tokenize

from tokscale.base.errors import ConfigError, DataError, StopRequested, StorageError
from tokscale.data.raw.places import LocalRaw
from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.data.tokenization import inputs, pipeline, units
from tokscale.data.tokenization.config import FilterConfig, TextConfig, TransformConfig, VariantConfig
from tokscale.data.tokenization.finalise import finalise, outcome
from tokscale.data.tokenization.leases import Leases
from tokscale.data.tokenization.memory import ImageMemory, Stacker
from tokscale.data.tokenization.plan import make_plan
from tokscale.data.tokenization.units import finished, is_done
from tokscale.data.tokenization.verify import verify_unit
from tokscale.data.tokens.manifest import TokenDataset


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def rows(folder) -> list[tuple[str, list[str], list[int]]]:
    dataset = TokenDataset(folder)
    found = []
    for number in range(len(dataset.sizes)):
        block = dataset.read(number)
        for row, key in enumerate(block.keys(np.arange(len(block)))):
            found.append((key, block.captions(row), block.tensors["codes"][row].flatten().tolist()))
    return found


def test_every_sample_comes_through_in_input_order(tmp_path):
    recipe = make_recipe(make_raw(tmp_path / "raw", 30, 25, 40, 3))
    plan, report = tokenize(tmp_path / "tokens", recipe)
    assert rows(tmp_path / "tokens") == [(f"{n:06d}", [f"number {n}"], [n] * 4) for n in range(98)]
    assert [(unit.first_input, len(unit.inputs)) for unit in plan.units] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert report.samples == 98 and [record.unit for record in sorted(report.done, key=lambda r: r.unit)] == [
        0,
        1,
        2,
        3,
    ]
    dataset = TokenDataset(tmp_path / "tokens")
    assert dataset.sizes.tolist() == [16, 14, 16, 9, 16, 16, 8, 3]
    block = dataset.read(3)
    assert block.tensors["src"].tolist() == [[1, n] for n in range(16, 25)]
    assert block.tensors["wh"].tolist() == [[8, 8]] * 9 and block.tensors["crop"].tolist() == [[0, 0, 8, 8]] * 9


def test_batches_never_cross_a_unit_and_are_always_full_size(tmp_path):
    recipe = make_recipe(make_raw(tmp_path / "raw", 11, 9))
    tokenize(tmp_path / "tokens", recipe)
    assert recipe.tokenizers["codes"].batches == [8] * 4  # 8 + 3, and 8 + 1


def test_a_batch_is_filled_up_with_black_although_its_memory_is_used_again():
    stacker = Stacker(4, CPU)
    full, two = torch.full((4, 3, 2, 2), 7, dtype=torch.uint8), torch.full((1, 3, 2, 2), 9, dtype=torch.uint8)
    wide = torch.full((4, 3, 2, 5), 5, dtype=torch.uint8)
    assert torch.equal(stacker.stack([full]), full) and torch.equal(stacker.stack([wide]), wide)
    batch = stacker.stack([two, two])
    assert batch.shape == (4, 3, 2, 2) and (batch[:2] == 9).all() and not batch[2:].any()


def test_images_are_made_in_the_memory_that_was_given_back():
    memory = ImageMemory()
    first, second = memory.take((1, 3, 2, 2)), memory.take((1, 3, 2, 2))
    assert first.data_ptr() != second.data_ptr()
    memory.give(first)
    assert memory.take((1, 3, 2, 5)).shape == (1, 3, 2, 5)
    assert memory.take((1, 3, 2, 2)) is first


def test_equal_bytes_whatever_the_threads_the_queue_and_the_number_of_workers(tmp_path):
    raw = make_raw(tmp_path / "raw", 70, 33, 50, 41)
    tokenize(tmp_path / "one", make_recipe(raw), threads=1, queue=1)
    tokenize(tmp_path / "many", make_recipe(raw), threads=4)
    together = tmp_path / "together"
    workers = [
        threading.Thread(target=tokenize, args=(together, make_recipe(raw)), kwargs={"close": False}) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    tokenize(together, make_recipe(raw))
    assert contents(tmp_path / "one") == contents(tmp_path / "many") == contents(together)
    assert len(list(tmp_path.glob("one/*.tar"))) == 4


def test_what_is_done_is_recognised_and_what_is_new_is_added(tmp_path):
    raw, folder = make_raw(tmp_path / "raw", 20, 20), tmp_path / "tokens"
    tokenize(folder, make_recipe(raw))
    before = contents(folder)
    _, again = tokenize(folder, make_recipe(raw))
    assert not again.done and contents(folder) == before
    write_shard(raw / "00002.tar", plain_records(range(40, 50)))
    plan, extended = tokenize(folder, make_recipe(raw))
    assert [record.unit for record in extended.done] == [2] and len(plan.units) == 3
    assert [key for key, *_ in rows(folder)] == [f"{n:06d}" for n in range(50)]
    for name in ("tokens-000000.tar", "tokens-000001.tar"):
        assert contents(folder)[name] == before[name]


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizers": {"codes": MeanTokenizer(fingerprint="other")}},
        {"encode_batch": 16},
        {"variants": VariantConfig(flips=True)},
        {"filters": FilterConfig(min_side=5)},
        {"text": TextConfig(split_lines=True)},
        {"scores": ("aesthetic",)},
    ],
)
def test_a_folder_of_another_fingerprint_is_refused(tmp_path, change):
    raw = make_raw(tmp_path / "raw", 5)
    tokenize(tmp_path / "tokens", make_recipe(raw))
    with pytest.raises(
        DataError, match=rf"What differs: {next(iter(change)) if 'text' not in change else 'split_lines'}"
    ):
        tokenize(tmp_path / "tokens", make_recipe(raw, **change))


def test_a_shard_of_another_size_is_made_again(tmp_path):
    raw, folder = make_raw(tmp_path / "raw", 20), tmp_path / "tokens"
    plan, _ = tokenize(folder, make_recipe(raw))
    whole = contents(folder)
    path = folder / "tokens-000000.tar"
    path.write_bytes(path.read_bytes()[:-512])
    assert not is_done(folder, plan, 0)
    tokenize(folder, make_recipe(raw))
    assert contents(folder) == whole
    (folder / "tokens-000000.json").write_text("{")
    tokenize(folder, make_recipe(raw))
    assert contents(folder) == whole


def test_variants_are_crops_and_mirror_images_in_a_fixed_order(tmp_path):
    # 44 x 40 pixels: the centre square starts at x=2; at scale 1.25 crops are 32 pixels wide.
    values = np.random.default_rng(0).integers(0, 256, (40, 44, 3)).astype(np.uint8)
    write_shard(tmp_path / "raw" / "0.tar", [RawRecord("a", encoded(values), "png", "x")])
    variants = VariantConfig(crops=5, flips=True, scale=1.25)
    tokenizer = MeanTokenizer(image_size=32, grid=4)
    recipe = make_recipe(tmp_path / "raw", variants=variants, tokenizers={"codes": tokenizer}, encode_batch=24)
    tokenize(tmp_path / "tokens", recipe)
    tensors = TokenDataset(tmp_path / "tokens").read(0).tensors
    expected = []
    for left, top in [(6, 4), (2, 0), (10, 0), (2, 8), (10, 8)]:
        crop = torch.from_numpy(values[top : top + 32, left : left + 32].transpose(2, 0, 1).copy())
        expected.append(crop)
    expected += [crop.flip(2) for crop in expected]
    assert tensors["codes"][0].tolist() == tokenizer.encode(torch.stack(expected)).tolist()
    assert tensors["crop"][0, 0].tolist() == [6, 4, 38, 36] and tensors["crop"][0, 5].tolist() == [38, 4, 6, 36]
    assert TokenDataset(tmp_path / "tokens").manifest.variants == 10
    with pytest.raises(ConfigError, match="encode_batch=9: an image has 10 variants"):
        tokenize(tmp_path / "other", make_recipe(tmp_path / "raw", variants=variants, encode_batch=9))


def test_several_tokenizers_in_one_pass(tmp_path):
    tokenizers = {"codes": MeanTokenizer(), "codes.low": MeanTokenizer(image_size=4, grid=1)}
    recipe = make_recipe(make_raw(tmp_path / "raw", 20), tokenizers=tokenizers)
    tokenize(tmp_path / "tokens", recipe)
    tensors = TokenDataset(tmp_path / "tokens").read(0).tensors
    assert tensors["codes.low"][:, 0, 0].tolist() == tensors["codes"][:, 0, 0].tolist() == list(range(16))
    assert tensors["codes.low"].shape == (16, 1, 1)


def test_caption_lines_ids_and_scores(tmp_path):
    records = [
        RawRecord("a", image(1), "png", "red\n\n  blue \n", {"aesthetic": 5.5, "width": 3}),
        RawRecord("b", image(2), "png", "green", {"aesthetic": "high"}),
        RawRecord("c", image(3), "png", "grey"),
    ]
    write_shard(tmp_path / "raw" / "0.tar", records)
    tokenizer = LetterTokenizer()
    recipe = make_recipe(
        tmp_path / "raw",
        text=TextConfig(split_lines=True, ids=True, length=4),
        text_tokenizer=tokenizer,
        scores=("aesthetic",),
    )
    tokenize(tmp_path / "tokens", recipe)
    dataset = TokenDataset(tmp_path / "tokens")
    block = dataset.read(0)
    assert [block.captions(row) for row in range(3)] == [["red", "blue"], ["green"], ["grey"]]
    ids = block.caption_ids(np.arange(4))
    assert ["".join(map(chr, entry)) for entry in ids] == ["red", "blue", "gree", "grey"]
    assert dataset.stored_text(tokenizer, 4)
    assert block.tensors["score.aesthetic"][0] == 5.5 and np.isnan(block.tensors["score.aesthetic"][1:]).all()
    whole = make_recipe(tmp_path / "raw", text=TextConfig())
    tokenize(tmp_path / "whole", whole)
    assert TokenDataset(tmp_path / "whole").read(0).captions(0) == ["red\n\n  blue"]


def test_filters_leave_out_with_reasons(tmp_path):
    records = [
        RawRecord("small", image(1, (3, 9)), "png", "a caption"),
        RawRecord("wide", image(1, (40, 10)), "png", "a caption"),
        RawRecord("short", image(1), "png", "a"),
        RawRecord("one-line-fits", image(1), "png", "a\na caption\n" + "long " * 20),
        RawRecord("good", image(1), "png", "a caption"),
    ]
    write_shard(tmp_path / "raw" / "0.tar", records)
    filters = FilterConfig(min_side=4, max_aspect=3, min_caption=2, max_caption=20)
    recipe = make_recipe(tmp_path / "raw", filters=filters, text=TextConfig(split_lines=True))
    plan, _ = tokenize(tmp_path / "tokens", recipe, work={"max_drop_fraction": 1.0})
    assert rows(tmp_path / "tokens") == [(key, ["a caption"], [1] * 4) for key in ("one-line-fits", "good")]
    assert finished(tmp_path / "tokens", plan)[0].drops == {"aspect": 1, "caption_length": 1, "too_small": 1}
    assert TokenDataset(tmp_path / "tokens").manifest.drops == {"aspect": 1, "caption_length": 1, "too_small": 1}


def test_too_many_drops_fail_the_unit_and_the_others_go_on(tmp_path):
    raw, folder = make_raw(tmp_path / "raw", 20, 20, 20), tmp_path / "tokens"
    write_shard(raw / "00001.tar", [RawRecord(f"{n}", b"no image", "png", "x") for n in range(20)])
    _, report = tokenize(folder, make_recipe(raw), work={"max_attempts": 2})
    assert sorted(record.unit for record in report.done) == [0, 2]
    assert list(report.failed_for_good) == [1] and "work.max_drop_fraction=1 (now 0.02)" in report.failed_for_good[1]
    assert "20 of 20 samples were left out (decode 20" in report.failed_for_good[1]
    assert len((folder / "attempts" / "000001.jsonl").read_text().splitlines()) == 1  # the same files give the same
    listed = [json.loads(line) for line in (folder / "quarantine" / "000001.jsonl").read_text().splitlines()]
    assert len(listed) == 20 and {entry["reason"] for entry in listed} == {"decode"}
    assert listed[3]["key"] == "3" and listed[3]["input"] == "00001.tar" and listed[3]["offset"] > 0


def test_what_was_allowed_meanwhile_is_taken_without_further_keys(tmp_path):
    raw, folder = make_raw(tmp_path / "raw", 20), tmp_path / "tokens"
    write_shard(raw / "00000.tar", [*plain_records(range(19)), RawRecord("bad", b"no image", "png", "x")])
    _, report = tokenize(folder, make_recipe(raw))
    assert "work.max_drop_fraction=0.05 (now 0.02)" in report.failed_for_good[0]
    _, report = tokenize(folder, make_recipe(raw), work={"max_drop_fraction": 0.04})
    assert "work.max_drop_fraction=0.05 (now 0.04)" in report.failed_for_good[0]
    _, report = tokenize(folder, make_recipe(raw), work={"max_drop_fraction": 0.05})
    assert report.samples == 19 and not report.failed_for_good


def damage(path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "torn":
            path.write_bytes(data[: len(data) // 2])
        case "no tar":
            path.write_bytes(b"<html>404</html>" * 400)
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "damaged header":
            path.write_bytes(data[:5120] + b"x" * 512 + data[5632:])
        case "pipe":
            path.unlink()
            os.mkfifo(path)
        case "dangling link":
            path.unlink()
            path.symlink_to(path.with_name("nowhere"))
        case "folder":
            path.unlink()
            path.mkdir()


KINDS = ("torn", "no tar", "empty", "gone", "damaged header", "pipe", "dangling link", "folder")


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("when", ["before planning", "after planning"])
def test_a_bad_input_costs_what_it_holds_and_mending_it_makes_nothing_twice(tmp_path, how, when):
    raw, folder = make_raw(tmp_path / "raw", 20, 20, 20), tmp_path / "tokens"
    whole, recipe = (raw / "00001.tar").read_bytes(), make_recipe(raw)
    (raw / "manifest.json").unlink(missing_ok=True)
    if when == "after planning":
        make_plan(folder, recipe.identity, lambda: inputs.list_inputs(LocalRaw(raw)), 1000)
    elif how == "gone":
        pytest.skip("nobody knows of a shard that was never there")
    damage(raw / "00001.tar", how)
    plan, report = tokenize(folder, recipe, unit_samples=1000, close=False)
    assert report.samples == 40 and not report.failed_for_good  # one unit of three inputs
    (record,) = finished(folder, plan)
    assert [bad.path for bad in record.bad_inputs] == ["00001.tar"] and verify_unit(folder, plan, plan.units[0]) == []
    with pytest.raises(DataError, match=r"(?s)00001\.tar: .*mend or replace them.*on_bad_shard=drop"):
        finalise(folder, plan, {}, allow_missing=False)
    assert finalise(folder, plan, {}, allow_missing=False, drop_bad_inputs=True)[0][""].samples == 40
    made = (folder / "tokens-000000.tar").stat().st_mtime_ns
    if how == "folder":
        (raw / "00001.tar").rmdir()
    else:
        (raw / "00001.tar").unlink(missing_ok=True)
    (raw / "00001.tar").write_bytes(whole)
    plan = make_plan(
        folder,
        recipe.identity,
        lambda: inputs.list_inputs(LocalRaw(raw)),
        1000,
        lambda plan: outcome(folder, LocalRaw(raw), plan),
    )
    _, report = tokenize(folder, recipe, unit_samples=1000)
    assert report.samples == 20 and sorted(rows(folder)) == sorted(
        (f"{n:06d}", [f"number {n}"], [n] * 4) for n in range(60)
    )
    assert (folder / "tokens-000000.tar").stat().st_mtime_ns == made


def test_inputs_that_hold_other_counts_than_stated_are_bad(tmp_path):
    raw = make_raw(tmp_path / "raw", 20)
    (raw / "00000_stats.json").write_text('{"successes": 21}')
    _, report = tokenize(tmp_path / "tokens", make_recipe(raw), close=False)
    assert "states 21 samples, but it holds 20" in report.done[0].bad_inputs[0].why


@pytest.mark.parametrize("stats", ["", "[]", '{"successes": "many"}', '{"count": 3}', "null"])
def test_a_torn_record_of_a_shard_does_not_block_the_others(tmp_path, stats):
    raw = make_raw(tmp_path / "raw", 20, 20)
    (raw / "00000_stats.json").write_text('{"successes": 20}')
    (raw / "00001_stats.json").write_text(stats)
    assert [shard.path for shard in inputs.list_inputs(LocalRaw(raw))] == ["00000.tar"]


def test_what_happened_with_other_files_is_forgotten(tmp_path):
    raw, folder = make_raw(tmp_path / "raw", 20), tmp_path / "tokens"
    good = (raw / "00000.tar").read_bytes()
    write_shard(raw / "00000.tar", [RawRecord(f"{n}", b"no image", "png", "x") for n in range(20)])
    _, report = tokenize(folder, make_recipe(raw))
    assert report.failed_for_good
    (raw / "00000.tar").write_bytes(good)
    _, report = tokenize(folder, make_recipe(raw))
    assert not report.failed_for_good and len(rows(folder)) == 20


def test_a_shard_that_was_replaced_between_planning_and_reading_is_planned_anew(tmp_path):
    raw, folder = make_raw(tmp_path / "raw", 20, 20), tmp_path / "tokens"
    recipe = make_recipe(raw)
    make_plan(folder, recipe.identity, lambda: inputs.list_inputs(LocalRaw(raw)), 1000)
    write_shard(raw / "00001.tar", plain_records(range(20, 90)))
    _, report = tokenize(folder, recipe, unit_samples=1000, close=False)
    assert report.samples == 20 and "planned; it was replaced" in report.done[0].bad_inputs[0].why
    tokenize(folder, recipe, unit_samples=1000)
    assert [key for key, *_ in rows(folder)] == [f"{n:06d}" for n in range(90)]


def test_what_is_lost_or_left_aside_is_counted(tmp_path):
    png = image(1)
    members = [("._a.png", b"\0"), ("a.png", png), ("a.txt", b"one\ntwo"), ("a.cls", b"3"), ("b.png", png)]
    members += [
        ("b.jpg", image(1, form="JPEG")),
        ("b.txt", b"x"),
        ("c.png", png),
        ("c.txt", b"\xe2\x80\xa8one"),
        ("c.json", b"{"),
    ]
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw" / "0.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    plan, _ = tokenize(tmp_path / "one", make_recipe(tmp_path / "raw", scores=("clip",)))
    assert finished(tmp_path / "one", plan)[0].noted == {
        "captions_with_lines": 1,
        "hidden_files": 1,
        "other_files": 1,
        "scores_missing": 3,
        "second_images": 1,
    }
    text = TextConfig(split_lines=True)
    plan, _ = tokenize(tmp_path / "two", make_recipe(tmp_path / "raw", text=text, labels=False))
    assert finished(tmp_path / "two", plan)[0].noted["captions_split"] == 1


def test_damaged_images_are_kept_on_request_counted_and_listed(tmp_path):
    whole = image(1)
    write_shard(
        tmp_path / "raw" / "0.tar", [RawRecord("cut", whole[:-12], "png", "x"), RawRecord("ok", whole, "png", "y")]
    )
    plan, _ = tokenize(tmp_path / "tokens", make_recipe(tmp_path / "raw", transform=TransformConfig(keep_corrupt=True)))
    (record,) = finished(tmp_path / "tokens", plan)
    assert record.noted == {"corrupt_kept": 1} and record.shard.samples == 2
    (entry,) = [json.loads(line) for line in (tmp_path / "tokens/quarantine/000000.jsonl").read_text().splitlines()]
    assert (entry["key"], entry["reason"], entry["kept"]) == ("cut", "corrupt", True)


def test_torn_img2dataset_shards_are_left_for_later(tmp_path):
    raw, folder = make_raw(tmp_path / "raw", 20, 20), tmp_path / "tokens"
    (raw / "00000_stats.json").write_text('{"successes": 20}')
    plan, _ = tokenize(folder, make_recipe(raw))
    assert [shard.path for shard in plan.inputs] == ["00000.tar"]
    (raw / "00001_stats.json").write_text('{"successes": 20}')
    tokenize(folder, make_recipe(raw))
    assert len(rows(folder)) == 40


def test_a_passing_failure_is_tried_again(tmp_path, monkeypatch):
    recipe = make_recipe(make_raw(tmp_path / "raw", 20))
    read, failures = inputs.read_chunks, [OSError(errno.EIO, "a moment of trouble")]

    def flaky(*arguments):
        yield from read(*arguments)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(pipeline, "read_chunks", flaky)
    _, report = tokenize(tmp_path / "tokens", recipe)
    assert report.samples == 20 and not report.failed_for_good and not failures
    assert "a moment of trouble" in (tmp_path / "tokens" / "attempts" / "000000.jsonl").read_text()
    assert len(rows(tmp_path / "tokens")) == 20


def test_stopping_keeps_finished_units_and_nothing_of_the_one_in_work(tmp_path):
    raw, folder = make_raw(tmp_path / "raw", 64, 64, 64), tmp_path / "tokens"
    asked = iter(range(1000))
    with pytest.raises(StopRequested):
        tokenize(folder, make_recipe(raw), stop=lambda: next(asked) > 4)
    records = len(list(folder.glob("tokens-*.json")))
    assert 0 < records < 3 and len(list(folder.glob("*.tar"))) == records
    assert not list(folder.glob(".*.partial")) and not Leases(folder, 60).active()
    assert not any(path.stat().st_size for path in (folder / "leases").iterdir())
    tokenize(folder, make_recipe(raw))
    assert len(rows(folder)) == 192


def test_a_full_disk_stops_the_work_and_leaves_nothing_behind(tmp_path, monkeypatch):
    recipe, folder = make_recipe(make_raw(tmp_path / "raw", 40)), tmp_path / "tokens"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(units.ShardWriter, "add", full)
    with pytest.raises(StorageError, match=r"tokens-000000\.tar.*free space"):
        tokenize(folder, recipe)
    assert not list(folder.glob("*.tar")) and not list(folder.glob(".*.partial"))
    monkeypatch.undo()
    tokenize(folder, recipe)
    assert len(rows(folder)) == 40


def test_ids_out_of_the_tokenizers_range_fail_the_unit(tmp_path):
    tokenizer = MeanTokenizer()
    tokenizer.num_tokens = 10
    recipe = make_recipe(make_raw(tmp_path / "raw", 20), tokenizers={"codes": tokenizer})
    _, report = tokenize(tmp_path / "tokens", recipe, work={"max_attempts": 1})
    assert "ids from 8 to 15, outside its own range of 10" in report.failed_for_good[0]


def test_a_record_only_stands_beside_its_own_shard(tmp_path, monkeypatch):
    # A worker that was taken for dead wakes up: the other one replaces the shard between its two renames.
    recipe, folder = make_recipe(make_raw(tmp_path / "raw", 20)), tmp_path / "tokens"
    write, raced = units.write_json, []

    def late(path, value):
        if not raced:
            raced.append(True)
            (folder / "other").write_bytes((folder / "tokens-000000.tar").read_bytes() + b"x")
            (folder / "other").rename(folder / "tokens-000000.tar")
        write(path, value)

    monkeypatch.setattr(units, "write_json", late)
    _, report = tokenize(folder, recipe)
    assert raced and report.samples == 20 and len(rows(folder)) == 20
    assert "another worker replaced it" in (folder / "attempts" / "000000.jsonl").read_text()


def test_a_unit_that_is_invalidated_while_it_is_looked_at_raises_nothing(tmp_path, monkeypatch):
    folder, read = tmp_path / "tokens", units.read_unit
    plan, _ = tokenize(folder, make_recipe(make_raw(tmp_path / "raw", 20, 20)))

    def withdrawn_after(place, unit):
        record = read(place, unit)
        units.invalidate(place, unit)
        return record

    monkeypatch.setattr(units, "read_unit", withdrawn_after)
    assert [record.unit for record in finished(folder, plan)] == [0, 1] and finished(folder, plan) == []


def test_equal_keys_in_different_inputs_are_different_samples(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / "raw" / f"{shard}.tar", [RawRecord("same", image(shard), "png", f"{shard}")])
    tokenize(tmp_path / "tokens", make_recipe(tmp_path / "raw"))
    assert rows(tmp_path / "tokens") == [("same", ["0"], [0] * 4), ("same", ["1"], [1] * 4)]


def test_closing_needs_all_units(tmp_path):
    raw, folder = make_raw(tmp_path / "raw", 20, 20), tmp_path / "tokens"
    write_shard(raw / "00001.tar", [RawRecord(f"{n}", b"no image", "png", "x") for n in range(20)])
    plan, _ = tokenize(folder, make_recipe(raw))
    with pytest.raises(DataError, match=r"1 of 2 units are not done \(1\).*allow_missing=true"):
        finalise(folder, plan, {}, allow_missing=False)
    manifest = finalise(folder, plan, {}, allow_missing=True)[0][""]
    assert manifest.samples == 20
    empty = make_plan(tmp_path / "empty", make_recipe(raw).identity, lambda: inputs.list_inputs(LocalRaw(raw)), 20)
    with pytest.raises(DataError, match="no sample to close"):
        finalise(tmp_path / "empty", empty, {}, allow_missing=True)


def test_captions_of_too_many_tokens_are_left_out_and_a_sample_with_its_last_one(tmp_path):
    captions = [("abc", "abcdefgh"), ("abcdefgh", "abcdefghi"), ("ab", "abcd")]
    records = [RawRecord(f"{n}", image(n), "png", "", captions=several) for n, several in enumerate(captions)]
    write_shard(tmp_path / "raw" / "00000.tar", records)
    limited = {"filters": FilterConfig(max_tokens=4), "caption_tokenizer": LetterTokenizer()}
    plan, _ = tokenize(tmp_path / "tokens", make_recipe(tmp_path / "raw", **limited), work={"max_drop_fraction": 1})
    assert rows(tmp_path / "tokens") == [("0", ["abc"], [0] * 4), ("2", ["ab", "abcd"], [2] * 4)]
    (record,) = finished(tmp_path / "tokens", plan)
    assert record.drops == {"caption_length": 1} and record.noted["captions_left_out"] == 1
    assert plan.identity["caption_tokens"] == {"most": 4, "tokenizer": "letters"}
    assert "caption_tokens" not in make_recipe(tmp_path / "raw").identity


def test_tars_of_others_are_read_by_names_of_members_and_fields(tmp_path):
    members = []
    for number, about in enumerate(({"meta": {"text": ["one", "two"]}, "clip": 0.3}, {"clip": 0.1}, {"meta": 1})):
        members += [(f"{number}.input.png", image(number)), (f"{number}.mask.png", image(9))]
        members += [(f"{number}.json", json.dumps(about).encode()), (f"{number}.long.txt", b"a long caption")]
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw" / "0.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    transform = TransformConfig(member="input.png")
    recipe = make_recipe(tmp_path / "raw", transform=transform, text=TextConfig(member="long.txt"))
    tokenize(tmp_path / "long", recipe)
    assert rows(tmp_path / "long") == [(f"{n}", ["a long caption"], [n] * 4) for n in range(3)]
    text, filters = TextConfig(member="json", field="meta.text"), FilterConfig(least={"clip": 0.2})
    recipe = make_recipe(tmp_path / "raw", transform=transform, text=text, filters=filters)
    plan, _ = tokenize(tmp_path / "json", recipe)
    assert rows(tmp_path / "json") == [("0", ["one", "two"], [0] * 4)]
    assert finished(tmp_path / "json", plan)[0].drops == {"quality": 2}
    assert recipe.identity["members"] == {"image": "input.png", "caption": ["json", "meta.text"]}
    assert not {"members", "quality"} & make_recipe(tmp_path / "raw").identity.keys()
