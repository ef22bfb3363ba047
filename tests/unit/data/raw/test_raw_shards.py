import io
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from tokscale.base.errors import DataError
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.shards import RawDataset, RawRecord, RawShard, shard_paths, write_shard


def records(count: int, start: int = 0) -> list[RawRecord]:
    return [
        RawRecord(f"{i:09d}", f"image {i}".encode() * 90, "png", f"caption {i} é", {"number": i})
        for i in range(start, start + count)
    ]


def tar_of(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def flaw_of(shard: RawShard, number: int, what: str = "image") -> str:
    with pytest.raises(BadSample) as caught:
        getattr(shard, what)(shard.samples[number])
    return caught.value.reason


def test_what_is_written_is_read_back_by_offset(tmp_path):
    assert write_shard(tmp_path / "00000.tar", records(20)) == 20
    with RawShard(tmp_path / "00000.tar") as shard:
        assert [sample.key for sample in shard.samples] == [record.key for record in records(20)]
        for sample, record in reversed(list(zip(shard.samples, records(20), strict=True))):
            assert shard.image(sample) == record.image
            assert shard.caption(sample) == record.caption
            assert b'"number"' in shard.read(sample, "json")


def test_stock_webdataset_reads_it(tmp_path):
    write_shard(tmp_path / "00000.tar", records(5))
    samples = list(wds.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [record.key for record in records(5)]
    assert [sample["png"] for sample in samples] == [record.image for record in records(5)]


def test_the_same_records_give_the_same_bytes_without_pax_headers(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, records(7))
    data = (tmp_path / "a.tar").read_bytes()
    assert data == (tmp_path / "b.tar").read_bytes()
    assert b"mtime" not in data


def test_a_failing_source_leaves_no_shard(tmp_path):
    def failing():
        yield from records(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "00000.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_every_cut_is_noticed(tmp_path):
    path = tmp_path / "00000.tar"
    write_shard(path, records(3))
    data = path.read_bytes()
    with RawShard(path) as shard:
        ends = [member.offset + member.size for sample in shard.samples for member in sample.members.values()]
        starts = [sample.offset for sample in shard.samples]
    whole = max(-(-end // 512) * 512 for end in ends) + 1024
    cuts = {
        0,
        1,
        *starts,
        *(s + 100 for s in starts),
        *ends,
        *(e - 5 for e in ends),
        *(-(-e // 512) * 512 for e in ends),
    }
    cuts |= {whole - 1, whole - 512, whole - 1024}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"00000\.tar"):
            RawShard(path)
    path.write_bytes(data[:whole])  # the padding after the end mark is not needed
    assert len(RawShard(path).samples) == 3


def test_a_flipped_bit_in_any_header_is_noticed(tmp_path):
    path = tmp_path / "00000.tar"
    write_shard(path, records(3))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for header in headers:
        for byte in (0, 124, 150, 257):
            damaged = bytearray(data)
            damaged[header + byte] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"00000\.tar"):
                RawShard(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"x" * 5000, b"\x1f\x8b" + b"z" * 2000], ids=len)
def test_what_is_not_a_tar_is_refused(tmp_path, content):
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"00000\.tar"):
        RawShard(tmp_path / "00000.tar")


def test_two_tars_in_one_file_are_not_read_as_the_first(tmp_path):
    write_shard(tmp_path / "a.tar", records(2))
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    with pytest.raises(DataError, match="not the end either"):
        RawShard(tmp_path / "b.tar")


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(DataError, match=r"7\.tar: no such file"):
        RawShard(tmp_path / "7.tar")


def test_flawed_samples_are_reported_with_a_reason_and_the_others_are_read(tmp_path):
    path = tar_of(
        tmp_path / "00000.tar",
        [
            ("a.jpg", b"A"), ("a.txt", b"fine"),
            ("b.jpg", b"B"),
            ("c.txt", b"no image"),
            ("d.jpg", b"D"), ("d.txt", b" \n "),
            ("e.jpg", b"E"), ("e.txt", b"caf\xe9"),
            ("a.jpg", b"again"), ("a.txt", b"again"),
            ("f.JPG", b"F"), ("f.txt", b"\xef\xbb\xbfwith a mark\n"),
            ("f.jpg", b"again"), ("f.txt", b"again"),
            ("bad\udcff.jpg", b"G"), ("bad\udcff.txt", b"name"),
        ],
        encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip
    with RawShard(path) as shard:
        assert [s.key for s in shard.samples] == ["a", "b", "c", "d", "e", "a", "f", "f", "bad\udcff"]
        assert (shard.image(shard.samples[0]), shard.caption(shard.samples[0])) == (b"A", "fine")
        assert (shard.image(shard.samples[6]), shard.caption(shard.samples[6])) == (b"F", "with a mark")
        assert flaw_of(shard, 1, "caption") == "caption_missing" and shard.image(shard.samples[1]) == b"B"
        assert flaw_of(shard, 2) == "image_missing"
        assert flaw_of(shard, 3, "caption") == "caption_empty"
        assert flaw_of(shard, 4, "caption") == "caption_encoding"
        assert flaw_of(shard, 5) == flaw_of(shard, 5, "caption") == "duplicate_key"
        assert flaw_of(shard, 7) == "duplicate_key"
        assert flaw_of(shard, 8) == "key_encoding"


def test_webdatasets_rules_of_names(tmp_path):
    members = [
        ("__meta__", b"{}"), ("sub/x.y.jpg", b"1"), ("sub/x.txt", b"one"), ("other/x.txt", b"two"), ("README", b"-"),
    ]  # fmt: skip
    with RawShard(tar_of(tmp_path / "0.tar", members)) as shard:
        assert [(sample.key, sorted(sample.members)) for sample in shard.samples] == [
            ("sub/x", ["txt", "y.jpg"]),
            ("other/x", ["txt"]),
        ]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_non_ascii_names_are_read_in_both_formats(tmp_path, form):
    name = "日本/" + "n" * 180
    path = tar_of(tmp_path / "0.tar", [(f"{name}.jpg", b"J"), (f"{name}.txt", b"t")], format=form)
    with RawShard(path) as shard:
        assert [sample.key for sample in shard.samples] == [name]
        assert shard.image(shard.samples[0]) == b"J"


def test_a_shard_cut_while_open_is_an_error(tmp_path):
    write_shard(tmp_path / "0.tar", records(3))
    shard = RawShard(tmp_path / "0.tar")
    with open(tmp_path / "0.tar", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="became shorter"):
        shard.image(shard.samples[2])


def test_a_folder_is_one_sequence_in_the_order_of_numbers(tmp_path, monkeypatch):
    for number in range(12):
        write_shard(tmp_path / f"{number}.tar", records(3, start=3 * number))
    (tmp_path / ".00000.tar.7.partial").write_bytes(b"left by a killed process")
    assert [path.name for path in shard_paths(tmp_path)] == [f"{number}.tar" for number in range(12)]
    monkeypatch.setattr("tokscale.data.raw.shards._OPEN_SHARDS", 2)
    dataset = RawDataset(tmp_path)
    assert len(dataset) == 36
    for index in (35, 0, 17, 18, 35):
        shard, sample = dataset.sample(index)
        assert sample.key == f"{index:09d}" and shard.image(sample).startswith(f"image {index}".encode())
    with pytest.raises(IndexError):
        dataset.sample(36)


def test_an_evicted_shard_serves_those_who_still_hold_it(tmp_path, monkeypatch):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", records(1, start=number))
    monkeypatch.setattr("tokscale.data.raw.shards._OPEN_SHARDS", 1)
    dataset = RawDataset(tmp_path)
    held = [dataset.sample(index) for index in range(3)]
    assert [shard.caption(sample) for shard, sample in held] == [f"caption {index} é" for index in range(3)]


def test_an_empty_folder_names_the_command(tmp_path):
    with pytest.raises(DataError, match="tokscale prepare"):
        shard_paths(tmp_path)


SEPARATORS = "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""What `str.splitlines` splits at."""


def test_a_caption_with_line_breaks_is_one_caption(tmp_path):
    text = "a red" + "".join(f"{sign}box {n}" for n, sign in enumerate(SEPARATORS))
    write_shard(tmp_path / "0.tar", [RawRecord("a", b"", "png", text)])
    with RawShard(tmp_path / "0.tar") as shard:
        (sample,) = shard.samples
        assert shard.captions(sample) == (text,)
        first, second = text.split("\n")
        assert shard.captions(sample, split_lines=True) == (first, second)  # on request, and at line feeds alone


def test_several_captions_are_listed_beside_the_text(tmp_path):
    record = RawRecord("a", b"", "png", "one\ntwo", captions=("one", "two\nlines", " "))
    write_shard(tmp_path / "0.tar", [record])
    with RawShard(tmp_path / "0.tar") as shard:
        assert shard.captions(shard.samples[0]) == ("one", "two\nlines")
        assert shard.caption(shard.samples[0]) == "one\ntwo"


@pytest.mark.parametrize("listed", ["{}", "[1]", "not json", "[]", '[" "]'])
def test_a_list_of_captions_that_is_none_costs_its_sample(tmp_path, listed):
    tar_of(tmp_path / "0.tar", [("a.txt", b"x"), ("a.captions.json", listed.encode())])
    with RawShard(tmp_path / "0.tar") as shard, pytest.raises(BadSample, match=r"captions\.json"):
        shard.captions(shard.samples[0])


def test_a_tar_made_on_a_mac_holds_what_webdataset_finds_in_it(tmp_path):
    members = [("._.", b"\0")]
    for number in range(6):
        for ending in ("png", "txt"):
            members += [(f"./._{number}.{ending}", b"\0\5\x16\7"), (f"./{number}.{ending}", f"{number}".encode())]
    members += [("__MACOSX/._0.png", b"\0"), (".DS_Store", b"\0"), ("./.ipynb_checkpoints/0-checkpoint.png", b"old")]
    members += [("Thumbs.db", b"\0"), ("x/desktop.ini", b"\0"), ("@eaDir/0.png", b"small")]
    members += [(".png", b"no name"), ("a/.hidden/7.png", b"7"), ("a/.hidden/7.txt", b"7")]
    path = tar_of(tmp_path / "0.tar", members)
    with RawShard(path) as shard:
        keys = [sample.key for sample in shard.samples]
        assert [shard.captions(sample) for sample in shard.samples] == [(f"{n}",) for n in range(6)]
        assert shard.hidden == len(members) - 12
    assert keys == [f"./{number}" for number in range(6)]
    theirs = [sample["__key__"] for sample in wds.WebDataset(str(path), shardshuffle=False)]
    strange = ("/.", "MACOSX", "Thumbs", "desktop", "@eaDir")
    assert [key for key in theirs if not any(word in key[1:] or key.startswith(word) for word in strange)] == keys


@pytest.mark.parametrize("kept", [0, 1, 7])
def test_a_shard_whose_tail_was_lost_to_zeros_is_refused(tmp_path, kept):
    members = [(f"{number}.{ending}", b"x" * 3000) for number in range(9) for ending in ("png", "txt")]
    path = tar_of(tmp_path / "0.tar", members)
    data = path.read_bytes()
    with RawShard(path) as shard:
        assert len(shard.samples) == 9
    end = kept * 2 * (512 + 3072)  # between two members, as a file system leaves pages it had not yet written
    path.write_bytes(data[:end] + bytes(len(data) - end))
    with pytest.raises(DataError, match=f"zero bytes follow where it ends, at byte {end}.*lost"):
        RawShard(path)


@pytest.mark.parametrize("factor", [64, 128, 512, 2048])
def test_a_shard_in_larger_records_is_whole(tmp_path, factor):
    members = [(f"{number}.{ending}", b"x" * 3000) for number in range(10) for ending in ("png", "txt")]
    path, record = tar_of(tmp_path / "0.tar", members), 512 * factor
    data = path.read_bytes().rstrip(b"\0")
    whole = -(-len(data) // 512) * 512 + 1024
    path.write_bytes(data + bytes(-(-whole // record) * record - len(data)))
    with RawShard(path) as shard:
        assert len(shard.samples) == 10
    # In such a file, too, zeros that cut a member short are damage.
    path.write_bytes(data[:40_000] + bytes(path.stat().st_size - 40_000))
    with pytest.raises(DataError, match="zero bytes follow"):
        RawShard(path)


def test_zeros_after_the_end_can_be_cut_off_as_the_message_says(tmp_path):
    path = tar_of(tmp_path / "a tar.tar", [("1.png", b"x" * 3000), ("1.txt", b"y")])
    path.write_bytes(path.read_bytes() + bytes(50_000))
    with pytest.raises(DataError, match="cut them off: truncate -s 5632 ") as caught:
        RawShard(path)
    subprocess.run(shlex.split(str(caught.value).partition("cut them off: ")[2]), check=True)
    with RawShard(path) as shard:
        assert len(shard.samples) == 1


def test_an_empty_shard_is_one(tmp_path):
    with RawShard(tar_of(tmp_path / "0.tar", [])) as shard:
        assert not shard.samples
