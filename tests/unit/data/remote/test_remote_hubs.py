"""`hf://` and `gs://` through the libraries that people read them with, from servers on this machine."""

import os
from pathlib import Path

import pytest
from hubs import buckets, hub
from token_folders import make_tokens
from tokenizing import make_raw, make_recipe, tokenize

from tokscale.base.address import Address
from tokscale.base.errors import DataError
from tokscale.data.raw.places import raw_place
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.tokens.manifest import TokenDataset

STORES = {
    "hf": (hub, "huggingface_hub", "some/set", "hf://datasets/some/set", lambda at: {"endpoint": at}),
    "gs": (buckets, "gcsfs", "pictures", "gs://pictures", lambda at: {"endpoint_url": at, "token": "anon"}),
}


@pytest.fixture(params=STORES)
def served(request, tmp_path, monkeypatch):
    """The store, the folder behind the address, the address, and how it is read."""
    serve, package, name, address, options = STORES[request.param]
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks another server of theirs first
    pytest.importorskip(package)
    (tmp_path / "served" / name).mkdir(parents=True)
    with serve(tmp_path / "served") as store:
        config = RemoteConfig(cache=tmp_path / "cache", retry_seconds=0, tries=3, options=options(store.address))
        yield store, tmp_path / "served" / name, Address(address), config


def test_shards_of_a_hub_and_of_a_bucket_are_read_as_those_of_this_machine(served, tmp_path):
    store, folder, address, remote = served
    raw = make_raw(folder / "raw", 20, 10)
    tokenize(tmp_path / "local", make_recipe(raw))
    store.faults.extend((0, 503))
    place = raw_place(address / "raw", remote)
    plan, _ = tokenize(tmp_path / "far", make_recipe(place))
    assert TokenDataset(tmp_path / "far").manifest.id == TokenDataset(tmp_path / "local").manifest.id
    assert not store.faults and all(shard.tag for shard in plan.inputs)
    _flip_a_byte(raw / "00000.tar")
    with pytest.raises(DataError, match=r"00000\.tar had \d+ bytes.*its tag was"):
        tokenize(tmp_path / "far", make_recipe(raw_place(address / "raw", remote)))
    with pytest.raises(DataError, match="nothing: lists no raw shards"):
        raw_place(address / "nothing", remote).names()


def test_of_token_shards_behind_a_hub_and_a_bucket_only_what_is_asked_for_is_sent(served):
    store, folder, address, remote = served
    here = make_tokens(folder / "tokens", blocks=[4] * 10, shards=3)
    far = TokenDataset(address / "tokens", remote)
    assert far.manifest.id == here.manifest.id
    store.sent.clear()
    for number in range(len(here.sizes)):
        assert (far.read(number).tensors["codes"] == here.read(number).tensors["codes"]).all()
    shards = sum(path.stat().st_size for path in (folder / "tokens").glob("*.tar"))
    assert sum(size for name, size in store.sent if name.endswith(".tar")) <= shards
    with pytest.raises(DataError, match=r"raw/dataset\.json: there is nothing"):
        TokenDataset(address / "raw", remote)


def _flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(600)
        byte = os.pread(file.fileno(), 1, 600)[0]
        file.write(bytes([byte ^ 1]))
