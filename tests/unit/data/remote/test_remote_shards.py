"""Shards behind an address give what they give on this machine: tokenized, and read in training."""

import gzip
import os
import shutil
from collections import deque

import pytest
from stores import web_store
from token_folders import LetterTokenizer, make_tokens
from tokenizing import make_raw, make_recipe, tokenize

from tokscale.base.address import Address
from tokscale.base.errors import DataError
from tokscale.data.loading import SourceConfig, TokenLoader, TokenLoaderConfig
from tokscale.data.loading.token_config import open_sources
from tokscale.data.raw.places import LocalRaw, raw_place
from tokscale.data.raw.shards import RawDataset, RawShard
from tokscale.data.remote import copies
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.data.tokens.views import ViewRule, build_view


@pytest.fixture
def store(tmp_path):
    (tmp_path / "served").mkdir()
    with web_store(tmp_path / "served") as served:
        yield served


@pytest.fixture
def remote(tmp_path) -> RemoteConfig:
    return RemoteConfig(cache=tmp_path / "cache", retry_seconds=0.0, tries=4, connections=2, timeout=20)


def manifest_of(folder):
    return TokenDataset(folder).manifest.id


@pytest.mark.parametrize("how", ["raw", "raw/{00000..00002}.tar"])
def test_tokens_of_remote_shards_are_those_of_local_ones(store, remote, tmp_path, monkeypatch, how):
    monkeypatch.setattr(copies, "_PART", 4096)
    raw = make_raw(store.folder / "raw", 20, 20, 10)
    tokenize(tmp_path / "local", make_recipe(raw))
    store.faults = deque(["", "500", "", "short", "drop", "", "", "429"])
    place = raw_place(Address(f"{store.address}/{how}"), remote)
    plan, report = tokenize(tmp_path / "far", make_recipe(place))
    assert report.samples == 50 and not store.faults
    assert manifest_of(tmp_path / "far") == manifest_of(tmp_path / "local")
    assert all(shard.tag for shard in plan.inputs)


def test_a_remote_shard_that_is_missing_costs_what_it_holds(store, remote, tmp_path):
    make_raw(store.folder / "raw", 20, 20)
    place = raw_place(Address(f"{store.address}/raw/{{00000..00002}}.tar"), remote)
    _, report = tokenize(tmp_path / "tokens", make_recipe(place), unit_samples=1000, close=False)
    (record,) = report.done
    assert record.shard.samples == 40 and [bad.path for bad in record.bad_inputs] == ["00002.tar"]


def test_a_remote_shard_that_was_replaced_by_one_of_the_same_size_is_noticed(store, remote, tmp_path):
    raw = make_raw(store.folder / "raw", 20)
    recipe = make_recipe(raw_place(Address(f"{store.address}/raw"), remote))
    tokenize(tmp_path / "tokens", recipe)
    shard = bytearray((raw / "00000.tar").read_bytes())
    shard[600] ^= 1
    (raw / "00000.tar").write_bytes(bytes(shard))
    with pytest.raises(DataError, match=r"00000\.tar had \d+ bytes.*its tag was [0-9a-f]+, it is [0-9a-f]+"):
        tokenize(tmp_path / "tokens", recipe)


def test_an_address_without_shards_says_how_to_name_them(store, remote):
    (store.folder / "raw").mkdir()
    with pytest.raises(DataError, match=r"raw: lists no raw shards.*\{00000\.\.00099\}"):
        raw_place(Address(f"{store.address}/raw"), remote).names()


def batches(config: TokenLoaderConfig, steps: int = 6):
    datasets = open_sources(config, default=None)  # type: ignore[arg-type]
    loader = TokenLoader(
        config, manifests=datasets, text_tokenizer=LetterTokenizer(), text_length=8, batch_size=8, seed=1
    )
    found = [loader.next_batch() for _ in range(steps)]
    loader.close()
    return [(batch.keys, batch.codes.tolist(), batch.text.tolist()) for batch in found]


def test_batches_of_remote_token_shards_are_those_of_local_ones(store, remote, tmp_path):
    make_tokens(store.folder / "tokens", blocks=[4] * 10, shards=3)
    local = TokenLoaderConfig(sources=(SourceConfig(path=store.folder / "tokens"),), window=2, prefetch=0)
    far = SourceConfig(path=f"{store.address}/tokens")  # type: ignore[arg-type]
    expected = batches(local)
    read = local.model_copy(update={"sources": (far,), "remote": remote})
    store.faults = deque(["", "", "500", "short", "", "drop", "", "short"])
    assert batches(read) == expected and not store.faults
    asked = len(store.asked)
    assert batches(read) == expected
    # What describes the data set is asked for anew; its blocks are not.
    assert {name.rpartition("/")[2] for name, _, _ in store.asked[asked:]} <= {"dataset.json", "index.safetensors"}
    # A bound below one epoch changes how often blocks are asked for, and nothing else.
    small = remote.model_copy(update={"cache": tmp_path / "small", "cache_gb": 3e-6})
    assert batches(local.model_copy(update={"sources": (far,), "remote": small}), 12) == batches(local, 12)
    held = sum(path.stat().st_size for path in (tmp_path / "small" / "copies").rglob("*") if path.is_file())
    assert held <= 3000


def test_a_copy_that_went_bad_is_fetched_again(store, remote):
    made = make_tokens(store.folder / "tokens")
    far = TokenDataset(f"{store.address}/tokens", remote)
    assert far.read(0).captions(1) == made.read(0).captions(1)
    for path in (remote.cache_folder / "copies").rglob("*-*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert far.read(0).captions(1) == made.read(0).captions(1)


def test_a_remote_block_that_is_damaged_is_said_with_its_address(store, remote):
    make_tokens(store.folder / "tokens")
    shard = store.folder / "tokens" / "tokens-000000.tar"
    data = bytearray(shard.read_bytes())
    data[1600] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"{store.address}/tokens/tokens-000000\.tar: block at byte \d+ fails"):
        TokenDataset(f"{store.address}/tokens", remote).read(0)


def test_views_and_held_out_samples_work_behind_an_address(store, remote):
    made = make_tokens(store.folder / "tokens", blocks=[4] * 10)
    build_view(made, "few", ViewRule(min_scores={"aesthetic": 20}))
    values = {"window": 2, "prefetch": 0, "held_out": {"share": 0.2}}
    local, far = (
        TokenLoaderConfig.model_validate({**values, "sources": [{"path": path, "view": "few"}], "remote": remote})
        for path in (store.folder / "tokens", f"{store.address}/tokens")
    )
    assert batches(far) == batches(local)


def test_token_shards_that_are_not_finished_behind_an_address_are_named(store, remote):
    with pytest.raises(DataError, match=rf"{store.address}/tokens/dataset\.json: there is nothing"):
        TokenDataset(f"{store.address}/tokens", remote)


@pytest.fixture(scope="module")
def bucket():
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    yield {"endpoint_url": f"http://{host}:{port}"}
    server.stop()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        os.environ.pop(name)


def test_an_object_store_is_listed_tokenized_and_trained_on(bucket, remote, tmp_path):
    s3fs = pytest.importorskip("s3fs")
    raw = make_raw(tmp_path / "raw", 20, 12)
    tokenize(tmp_path / "local", make_recipe(raw))
    store = s3fs.S3FileSystem(**bucket, skip_instance_cache=True)
    store.mkdir("pictures")
    for path in (*raw.iterdir(), *(p for p in (tmp_path / "local").iterdir() if p.is_file())):
        store.put_file(str(path), f"pictures/{path.parent.name}/{path.name}")
    config = remote.model_copy(update={"options": bucket})
    place = raw_place(Address("s3://pictures/raw"), config)
    plan, _ = tokenize(tmp_path / "far", make_recipe(place))
    assert manifest_of(tmp_path / "far") == manifest_of(tmp_path / "local") and all(i.tag for i in plan.inputs)
    values = {"window": 2, "prefetch": 2, "remote": config}
    local, far = (
        TokenLoaderConfig.model_validate({**values, "sources": [{"path": path}]})
        for path in (tmp_path / "local", "s3://pictures/local")
    )
    assert batches(far) == batches(local)
    with pytest.raises(DataError, match="s3://nowhere/a: lists no raw shards"):
        raw_place(Address("s3://nowhere/a"), config).names()


def test_shards_in_memory_are_read_like_others(remote, tmp_path):
    import fsspec

    made = make_tokens(tmp_path / "tokens")
    fsspec.filesystem("memory").put(str(tmp_path / "tokens") + "/", "/set/tokens", recursive=True)
    far = TokenDataset("memory://set/tokens", remote)
    assert far.manifest.id == made.manifest.id
    assert [block.captions(0) for block in far.blocks()] == [block.captions(0) for block in made.blocks()]


def test_shards_in_folders_and_packed_by_gzip_give_the_same_tokens(tmp_path):
    plain = make_raw(tmp_path / "plain", 20, 20, 10)
    tokenize(tmp_path / "expected", make_recipe(plain))
    nested = tmp_path / "nested"
    for shard, name in enumerate(["a/00000.tar", "a/00001.tar.gz", "b/deep/00002.tgz"]):
        (nested / name).parent.mkdir(parents=True, exist_ok=True)
        source = plain / f"{shard:05d}.tar"
        if name.endswith(".tar"):
            shutil.copy(source, nested / name)
        else:
            (nested / name).write_bytes(gzip.compress(source.read_bytes(), 1))
    (nested / ".hidden").mkdir()
    shutil.copy(plain / "00000.tar", nested / ".hidden" / "00003.tar")
    assert LocalRaw(nested).names() == ["a/00000.tar", "a/00001.tar.gz", "b/deep/00002.tgz"]
    tokenize(tmp_path / "found", make_recipe(nested))
    assert manifest_of(tmp_path / "found") == manifest_of(tmp_path / "expected")
    keys = [RawDataset(nested).sample(index)[1].key for index in range(50)]
    assert keys == [RawDataset(plain).sample(index)[1].key for index in range(50)]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_packed_shard_that_is_damaged_is_named(tmp_path, damage):
    raw = make_raw(tmp_path / "raw", 20)
    packed = bytearray(gzip.compress((raw / "00000.tar").read_bytes(), 1))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    else:
        packed[-6] ^= 1
    path = tmp_path / "00000.tar.gz"
    path.write_bytes(bytes(packed))
    with pytest.raises(DataError, match=r"00000\.tar\.gz: its gzip stream is damaged or cut off"):
        RawShard(path)
