"""`verify` notices every kind of damage, says which unit to do again, and finds nothing wrong with what is right."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import safetensors.numpy
import torch
from tokenizing import CPU, MeanTokenizer, make_raw, make_recipe, plain_records, tokenize

from tokscale.base.config import fingerprint
from tokscale.data.raw.shards import write_shard
from tokscale.data.tokenization import pipeline
from tokscale.data.tokenization.plan import read_plan
from tokscale.data.tokenization.recheck import agreement, chosen_blocks, contact_sheet
from tokscale.data.tokenization.stats import CodeUse, data_stats, shown
from tokscale.data.tokenization.units import read_unit, record_path
from tokscale.data.tokenization.verify import strays, verify_manifest, verify_unit
from tokscale.data.tokens.blocks import pack, unpack
from tokscale.data.tokens.manifest import StreamRecord, TokenDataset


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    tokenize(root / "tokens", make_recipe(make_raw(root / "raw", 40, 30)))
    return root


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made / "tokens", tmp_path / "tokens")
    return tmp_path / "tokens"


def problems(folder) -> list[str]:
    plan = read_plan(folder)
    found = [problem for unit in plan.units for problem in verify_unit(folder, plan, unit)]
    return [str(problem) for problem in found + verify_manifest(folder, plan)]


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_nothing_is_wrong_with_what_is_right(folder):
    assert problems(folder) == [] and strays(folder, read_plan(folder)) == []


def test_a_flipped_bit_is_found_wherever_it_is(folder):
    path = folder / "tokens-000000.tar"
    whole, record = path.read_bytes(), read_unit(folder, 0)
    first, second = record.shard.blocks[:2]
    places = {
        "the header member": 600,
        "a tar header": second.offset - 400,
        "a safetensors header": first.offset + 20,
        "the codes": first.offset + first.size - 40,
        "the padding": first.offset + first.size + 1,
        "the end mark": len(whole) - 1,
    }
    for what, place in places.items():
        data = bytearray(whole)
        data[place] ^= 0x10
        path.write_bytes(data)
        found = problems(folder)
        assert any("sha256" in line for line in found), what
        inside = any(block.offset <= place < block.offset + block.size for block in record.shard.blocks)
        assert any("checksum" in line for line in found) == inside, what


def test_a_truncation_is_found_at_every_kind_of_boundary(folder):
    path = folder / "tokens-000001.tar"
    whole, record = path.read_bytes(), read_unit(folder, 1)
    last = record.shard.blocks[-1]
    cuts = {
        "inside a payload": last.offset + 100,
        "inside a header": last.offset - 100,
        "between members": last.offset - 512,
        "before the end mark": len(whole) - 1024,
        "inside the end mark": len(whole) - 512,
        "to nothing": 0,
    }
    for what, cut in cuts.items():
        path.write_bytes(whole[:cut])
        assert any(f"has {cut} of {len(whole)} bytes" in line for line in problems(folder)), what


def test_a_missing_shard_or_record_is_found(folder):
    (folder / "tokens-000000.tar").unlink()
    found = problems(folder)
    assert "the shard is missing" in found[0] and any("names tokens-000000.tar, which no unit made" in f for f in found)
    record_path(folder, 1).unlink()
    assert any("tokens-000001.json: no such file" in line for line in problems(folder))


@pytest.mark.parametrize(
    "values,what",
    [
        ({"samples_in": 41}, "41 samples went in and 40 came out"),
        ({"run": "0" * 64}, "of run 000000000000, not of this one"),
        ({"unit": 3}, "is the record of unit 3"),
        ({"drops": {"decode": 1}}, "40 samples went in and 41 came out"),
        ({"shard": None}, "not a UnitRecord"),
    ],
)
def test_an_edited_record_is_found(folder, values, what):
    change(record_path(folder, 0), **values)
    assert any(what in line for line in problems(folder))


@pytest.mark.parametrize("honest", [False, True])
@pytest.mark.parametrize(
    "values,what",
    [
        ({"samples": 71}, "its 71 samples are not those of the units"),
        ({"run": "0" * 64}, "its run"),
        ({"drops": {"decode": 3}}, "its drops are not those of the units"),
        ({"shards": []}, "leaves out tokens-000000.tar"),
        ({"index_sha256": "0" * 64}, "not the index"),
    ],
)
def test_an_edited_manifest_is_found(folder, values, what, honest):
    path = folder / "dataset.json"
    change(path, **values)
    if honest:  # edited by somebody who knew to mend its id as well
        content = {name: value for name, value in json.loads(path.read_text()).items() if name != "id"}
        change(path, id=fingerprint(content))
    found = problems(folder)
    assert any((what if honest else "states") in line for line in found)


@pytest.mark.parametrize(
    "what,damage",
    [
        ("has the id 300, the tokenizer only 256", lambda t: t["codes"].__setitem__((3, 0, 0), 300)),
        ("cap_off does not ascend", lambda t: t["cap_off"].__setitem__(2, 90)),
        ("the key '000001' comes twice", lambda t: t.update(key=np.frombuffer(b"000001" * 16, np.uint8))),
        ("is not UTF-8", lambda t: t["cap"].__setitem__(4, 0xFF)),
        ("the tokenizer (2, 2)", lambda t: t.update(codes=t["codes"].reshape(16, 4))),
    ],
)
def test_wrong_content_is_found_behind_right_checksums(tmp_path, monkeypatch, what, damage):
    # What a faulty writer would make: bytes, hashes and offsets agree, but the samples are wrong.
    def faulty(samples, dtypes, text_dtype):
        tensors = {name: array.copy() for name, array in unpack(pack(samples, dtypes, text_dtype)).tensors.items()}
        damage(tensors)
        return safetensors.numpy.save(tensors)

    monkeypatch.setattr(pipeline, "pack", faulty)
    tokenize(tmp_path / "tokens", make_recipe(make_raw(tmp_path / "raw", 16)), close=False)
    assert any(what in line for line in problems(tmp_path / "tokens"))


def test_stray_shards_are_named(folder):
    shutil.copy(folder / "tokens-000000.tar", folder / "tokens-000009.tar")
    assert [path.name for path in strays(folder, read_plan(folder))] == ["tokens-000009.tar"]


def recheck(made, folder, samples: int, **changes):
    dataset, recipe = TokenDataset(folder), make_recipe(made / "raw", **changes)
    numbers = chosen_blocks(dataset.sizes.tolist(), samples, seed=1)
    return agreement((dataset.read(n) for n in numbers), recipe, read_plan(folder), samples, CPU)


def test_images_encode_to_the_same_ids_again(made, folder):
    found = recheck(made, folder, 25)
    assert (found.images, found.ids, found.share, found.missing) == (25, 100, 1.0, ())

    class Other(MeanTokenizer):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            codes = super().encode(pixels)
            codes[:, 0, 0] += 1
            return codes

    assert recheck(made, folder, 25, tokenizers={"codes": Other()}).share == 0.75


def test_changed_inputs_are_named_when_encoding_again(made, folder, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(made / "raw", raw)
    write_shard(raw / "00001.tar", plain_records(range(100, 105)))
    dataset, recipe = TokenDataset(folder), make_recipe(raw)
    found = agreement((dataset.read(n) for n in range(len(dataset.sizes))), recipe, read_plan(folder), 70, CPU)
    assert found.share == 1.0 and len(found.missing) > 10 and found.missing[0] == "000040: is '000100' now"


def test_the_sheet_shows_what_is_stored(made, folder):
    dataset, recipe = TokenDataset(folder), make_recipe(made / "raw")
    pixels, captions = contact_sheet((dataset.read(n) for n in (1, 3)), recipe, 20)
    assert pixels.shape == (20, 3, 8, 8) and captions[0] == "number 16" and pixels[0].unique().tolist() == [16]
    assert captions[16:] == [f"number {n}" for n in range(40, 44)]


def test_chosen_blocks_cover_what_is_asked_for_and_no_more():
    assert sorted(chosen_blocks([5] * 10, 1000, seed=0)) == list(range(10))
    assert len(chosen_blocks([5] * 10, 11, seed=0)) == 3 and chosen_blocks([], 5, seed=0) == []
    assert chosen_blocks([5] * 50, 20, seed=0) != chosen_blocks([5] * 50, 20, seed=1)


def test_stats_count_as_a_loop_would(made):
    dataset = TokenDataset(made / "tokens")
    stats = data_stats(dataset)
    counts: Counter[int] = Counter()
    lengths = []
    for number in range(len(dataset.sizes)):
        block = dataset.read(number)
        counts.update(block.tensors["codes"].flatten().tolist())
        lengths += [len(caption) for row in range(len(block)) for caption in block.captions(row)]
    (level,) = stats["codes"]["codes"]
    assert level["histogram"] == [counts[code] for code in range(256)]
    assert level["used"] == 70 and level["dead"] == 186 and level["perplexity"] == pytest.approx(70, abs=1e-3)
    assert stats["captions"]["count"] == 70 and stats["captions"]["bytes_max"] == max(lengths) == 9
    assert stats["captions"]["bytes_mean"] == pytest.approx(sum(lengths) / 70, abs=0.01)
    assert stats["captions"]["histogram"][">=1"] == 70 and sum(stats["captions"]["histogram"].values()) == 70
    assert stats["timings"]["samples/s"] > 0
    assert any("70 of 256 codes used, perplexity 70.0" in line for line in shown(stats))


def test_stats_of_residual_codes_are_by_level():
    use = CodeUse(StreamRecord(tokenizer="rq", num_tokens=4, code_shape=(2, 2, 3), image_size=8))
    use.add(np.array([[[[0, 1, 3], [0, 1, 2]], [[0, 2, 1], [0, 2, 0]]]]))
    first, second, third = use.summary()
    assert (first["histogram"], first["perplexity"]) == ([4, 0, 0, 0], 1.0)
    assert (second["histogram"], second["perplexity"], second["dead"]) == ([0, 2, 2, 0], 2.0, 2)
    assert third["perplexity"] == pytest.approx(4.0)
