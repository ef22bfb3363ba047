"""Requests are tried again, copies go on where they stopped and keep to a bound; what cannot pass is said at once."""

import os
import pickle
import sys
from collections import deque

import pytest
from stores import web_store

from tokscale.base.address import Address
from tokscale.base.config import Config, PathKey, PlaceKey, decode, encode
from tokscale.base.errors import ConfigError, DataError, EnvironmentRefused, StorageError
from tokscale.data.remote import copies
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.remote.copies import Copies
from tokscale.data.remote.pattern import expand
from tokscale.data.remote.transport import Transport


@pytest.fixture
def store(tmp_path):
    (tmp_path / "served").mkdir()
    with web_store(tmp_path / "served") as served:
        yield served


@pytest.fixture
def remote(tmp_path) -> RemoteConfig:
    return RemoteConfig(cache=tmp_path / "cache", retry_seconds=0.0, tries=3, connections=2, timeout=20)


def put(store, name: str, size: int, seed: int = 0) -> bytes:
    data = bytes((seed + 7 * at) % 251 for at in range(size))
    (store.folder / name).write_bytes(data)
    return data


def whole(found: int, size: int) -> bytes:
    data = os.pread(found, size + 1, 0)
    os.close(found)
    return data


@pytest.mark.parametrize("fault", ["500", "429", "drop", "short"])
def test_a_request_that_failed_twice_is_made_a_third_time(store, remote, fault):
    data, place = put(store, "a.bin", 1000), Address(f"{store.address}/a.bin")
    transport = Transport(remote)
    store.faults += [fault, fault]
    assert transport.read(place, 100, 700) == data[100:700]
    store.faults += [fault] * 9  # the library asks anew by itself where a connection was dropped
    with pytest.raises(StorageError, match=r"a\.bin: no whole answer after 3 tries"):
        transport.read(place, 100, 700)


def test_fewer_bytes_than_a_store_was_asked_for_are_asked_for_again(remote):
    class Short:
        answers = [b"", b"ab", b"abcd"]

        def cat_file(self, path, start, end):
            return self.answers.pop(0)

    transport = Transport(remote)
    transport._systems["memory"] = Short()
    assert transport.read(Address("memory://a.bin"), 3, 7) == b"abcd" and not Short.answers


@pytest.mark.parametrize("fault", ["500", "drop", "short"])
def test_a_copy_of_a_whole_file_is_whole_whatever_fails_between(store, remote, monkeypatch, fault):
    monkeypatch.setattr(copies, "_PART", 100)
    data, place = put(store, "a.bin", 1050), Address(f"{store.address}/a.bin")
    store.faults = deque(["", fault, "", fault, fault, ""])
    kept = Copies(remote)
    facts = kept.transport.facts(place)
    assert whole(kept.open(place, facts), 1050) == data
    asked = len(store.asked)
    assert whole(Copies(remote).open(place, facts), 1050) == data and len(store.asked) == asked


def test_a_copy_that_was_interrupted_goes_on_where_it_stopped(store, remote, monkeypatch):
    monkeypatch.setattr(copies, "_PART", 100)
    data, place = put(store, "a.bin", 1000), Address(f"{store.address}/a.bin")
    one = remote.model_copy(update={"tries": 1, "connections": 1})
    store.faults = deque(["", "", "", "500"])
    with pytest.raises(StorageError):
        Copies(one).open(place, Transport(one).facts(place))
    assert [first for _, first, _ in store.asked] == [0, 100, 200]
    assert whole(Copies(one).open(place, Transport(one).facts(place)), 1000) == data
    assert [first for _, first, _ in store.asked] == list(range(0, 1000, 100))


def test_a_file_that_was_replaced_is_another_copy(store, remote):
    place = Address(f"{store.address}/a.bin")
    for seed in (0, 1):
        data = put(store, "a.bin", 500, seed)
        kept = Copies(remote)
        assert whole(kept.open(place, kept.transport.facts(place)), 500) == data
        assert kept.read(place, kept.transport.facts(place), 10, 20) == data[10:30]


def test_copies_keep_to_their_bound_and_the_oldest_make_room(store, remote):
    bounded = remote.model_copy(update={"cache_gb": 4e-6})
    kept = Copies(bounded)
    for number in range(12):
        data = put(store, f"{number}.bin", 1000, number)
        place = Address(f"{store.address}/{number}.bin")
        assert whole(kept.open(place, kept.transport.facts(place)), 1000) == data
        os.utime(kept._path(place, kept.transport.facts(place), "whole"), (number, number))
        held = sum(path.stat().st_size for path in (bounded.cache_folder / "copies").rglob("*") if path.is_file())
        assert held <= 4000
    asked = len(store.asked)
    newest, oldest = (Address(f"{store.address}/{number}.bin") for number in (11, 0))
    whole(kept.open(newest, kept.transport.facts(newest)), 1000)
    assert len(store.asked) == asked
    whole(kept.open(oldest, kept.transport.facts(oldest)), 1000)
    assert len(store.asked) == asked + 1


def test_a_full_disk_costs_the_copy_of_a_part_and_not_the_part(store, remote, monkeypatch):
    data, place = put(store, "a.bin", 100), Address(f"{store.address}/a.bin")

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies, "_put", full)
    kept = Copies(remote)
    assert kept.read(place, kept.transport.facts(place), 0, 50) == data[:50]


def test_copies_are_sent_to_other_ranks_as_their_configuration(store, remote):
    data, place = put(store, "a.bin", 100), Address(f"{store.address}/a.bin")
    sent = pickle.loads(pickle.dumps(Copies(remote)))
    assert sent.read(place, sent.transport.facts(place), 0, 100) == data


def test_what_cannot_pass_is_said_at_once_with_the_address_and_a_code(store, remote):
    put(store, "a.bin", 100)
    store.denied.add("secret.bin")
    transport = Transport(remote)
    at = lambda name: Address(f"{store.address}/{name}")  # noqa: E731
    with pytest.raises(DataError, match=r"gone\.bin: there is nothing"):
        transport.facts(at("gone.bin"))
    with pytest.raises(DataError, match=r"gone\.bin: there is nothing"):
        transport.read(at("gone.bin"), 0, 10)
    with pytest.raises(StorageError, match=r"secret\.bin: its store refuses access.*give credentials"):
        transport.facts(at("secret.bin"))
    with pytest.raises(StorageError, match=r"secret\.bin: its store refuses access"):
        transport.read(at("secret.bin"), 0, 10)
    store.ranges = False
    with pytest.raises(DataError, match=r"a\.bin: its server does not send parts"):
        transport.read(at("a.bin"), 0, 10)
    assert DataError.exit_code == 65 and StorageError.exit_code == 74 and EnvironmentRefused.exit_code == 69


def test_a_server_that_is_not_there_is_named_after_the_tries(remote):
    with pytest.raises(StorageError, match=r":9/a: no whole answer after 3 tries.*check the network"):
        Transport(remote).facts(Address("http://127.0.0.1:9/a"))


def test_a_package_that_is_missing_is_named_with_the_extra_that_has_it(remote, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    known = sys.modules["fsspec.registry"]
    monkeypatch.setattr(known, "_registry", {})
    monkeypatch.setattr(known, "registry", known._registry)
    with pytest.raises(EnvironmentRefused, match=r"http://host/a: needs a package.*pip install 'tokscale\[remote\]'"):
        Transport(remote).facts(Address("http://host/a"))


def test_a_listing_names_files_of_all_folders_below(store, remote):
    (store.folder / "raw" / "deep").mkdir(parents=True)
    for name in ("raw/a.tar", "raw/deep/b.tar"):
        put(store, name, 100)
    found = Transport(remote).listing(Address(f"{store.address}/raw"))
    assert set(found) == {"a.tar", "deep/b.tar"}


def test_a_pattern_stands_for_its_addresses():
    root, names = expand(Address("https://host/set/{train,val}/{008..011}.tar"))
    assert root == "https://host/set" and names[:2] == ["train/008.tar", "train/009.tar"] and len(names) == 8
    root, names = expand(Address("s3://bucket/{0..2}.tar"))
    assert root == "s3://bucket" and names == ["0.tar", "1.tar", "2.tar"]
    with pytest.raises(ConfigError, match="braces do not close"):
        expand(Address("https://host/{0..2.tar"))
    with pytest.raises(ConfigError, match="more than 1000000"):
        expand(Address("https://host/{0..9999999}.tar"))
    with pytest.raises(ConfigError, match="no common folder"):
        expand(Address("https://{a,b}/0.tar"))


class Keys(Config):
    place: PlaceKey = "."  # type: ignore[assignment]
    path: PathKey = "."  # type: ignore[assignment]


def test_a_key_takes_a_path_or_an_address_and_gives_it_back():
    given = decode(Keys, {"place": "s3://bucket/tokens"})
    assert isinstance(given.place, Address) and encode(given)["place"] == "s3://bucket/tokens"
    assert decode(Keys, encode(given)) == given
    assert not isinstance(decode(Keys, {"place": "a/b"}).place, str)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"place": "s4://bucket/a"},
            r"place: got 's4://bucket/a'; s4:// is not read; choose from gs, hf",
        ),
        ({"place": "https:/host/a"}, r"place: .*two slashes: https://host/a"),
        ({"place": "https://me:secret@host/a"}, r"place: https://\.\.\.@host/a: an address may not hold a password"),
        ({"path": "s3://bucket/a"}, r"path: got 's3://bucket/a'; this key takes a path of this machine"),
    ],
)
def test_addresses_that_cannot_be_meant_are_refused_by_their_key(values, words):
    with pytest.raises(ConfigError, match=words) as refused:
        decode(Keys, values)
    assert "secret" not in str(refused.value)
