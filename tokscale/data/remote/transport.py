"""Requests to what lies behind an address: the one door to the network. Each is tried again until it cannot help."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import fsspec
import fsspec.core

from tokscale.base.address import Address
from tokscale.base.errors import DataError, EnvironmentRefused, StorageError, TokscaleError
from tokscale.base.log import logger
from tokscale.data.remote.config import RemoteConfig

T = TypeVar("T")
log = logger("data")
_LONGEST_PAUSE = 30.0
_DEEPEST = 6
"""Folders below one another that are looked into."""
_TAGS = ("md5Hash", "ETag", "etag", "Content-MD5", "sha256", "blob_id", "LastModified", "Last-Modified", "created")
"""What tells one content of a file from another, the best first; each store has its own words. An
`etag` of Google's changes with notes beside the content, too."""
_OF_A_NETWORK = frozenset(
    ("aiohttp", "botocore", "aiobotocore", "gcsfs", "httpx", "httpcore", "huggingface_hub", "requests", "urllib3")
)
"""Libraries whose exceptions speak of connections."""
_EXACTLY: dict[str, dict[str, Any]] = {"hf": {"cache_type": "none"}}
"""What keeps a store's library from reading megabytes ahead of a part."""
_PASSING = frozenset((408, 425, 429))
"""Answers below 500 after which the same request may succeed."""
_REFUSED, _ABSENT = frozenset((401, 403)), frozenset((404, 410))


class Facts(NamedTuple):
    """What a store says of a file without giving it."""

    size: int
    tag: str
    """Changes with the content: a checksum, an ETag, a time; empty where the store says nothing of that kind."""


class Transport:
    """Requests to stores, from any thread. Nothing is opened before the first."""

    def __init__(self, config: RemoteConfig):
        self._config = config
        self._systems: dict[str, Any] = {}
        self._lock = threading.Lock()

    def facts(self, place: Address) -> Facts:
        """What is known of a file.

        Raises:
            DataError: When there is none.
            StorageError: When the store refuses, or does not answer.
            EnvironmentRefused: When the package for such addresses is not installed.
        """
        return _facts(place, self._ask(place, lambda system, path: system.info(path)))

    def facts_of(self, places: list[Address]) -> list[Facts | None]:
        """Of many files, asked at a time; None where there is none."""

        def one(place: Address) -> Facts | None:
            try:
                return self.facts(place)
            except DataError:
                return None

        with ThreadPoolExecutor(self._config.connections) as pool:
            return list(pool.map(one, places))

    def listing(self, folder: Address) -> dict[str, Facts | None]:
        """The files below a folder, by their names from there on; None where the listing says too little of one.

        Raises:
            DataError: When there is nothing, or a web server gives no listing.
            StorageError: As for `facts`.
        """
        find = lambda system, path: system.find(path, maxdepth=_DEEPEST, withdirs=False, detail=True)  # noqa: E731
        found = self._ask(folder, find)
        root = _path(folder).rstrip("/") + "/"
        names: dict[str, Facts | None] = {}
        for path, info in found.items():
            name = path.removeprefix(root)
            # Listings of web servers also link to themselves in another order, and to what lies above.
            if name != path and "?" not in name and not {"", ".", ".."} & set(name.split("/")):
                names[name] = _facts(folder / name, info) if info.get("size") is not None else None
        return names

    def read(self, place: Address, start: int, stop: int) -> bytes:
        """The bytes `[start, stop)` of a file.

        Raises:
            DataError: When there is no such file, or its server sends files only whole.
            StorageError: As for `facts`.
        """

        def take(system: Any, path: str) -> bytes:
            data = system.cat_file(path, start=start, end=stop, **_EXACTLY.get(place.scheme, {}))
            if len(data) > stop - start:
                raise DataError(
                    f"{place}: its server does not send parts of files (it ignores `Range`); copy the shards to this "
                    "machine, or serve them by one that does"
                )
            if len(data) < stop - start:
                raise ConnectionError(f"{len(data)} of {stop - start} bytes came")
            return data

        return self._ask(place, take) if stop > start else b""

    def _ask(self, place: Address, request: Callable[[Any, str], T]) -> T:
        for attempt in itertools.count(1):
            try:
                return request(self._system(place), _path(place))
            except TokscaleError:
                raise
            except Exception as error:
                if (refusal := _refusal(place, error)) is not None:
                    raise refusal from error
                if attempt == self._config.tries:
                    raise StorageError(
                        f"{place}: no whole answer after {attempt} tries ({_words(error)}); check the network and the "
                        "address, then run the same command again: it goes on from there"
                    ) from error
                pause = min(self._config.retry_seconds * 2 ** (attempt - 1), _LONGEST_PAUSE)
                log.warning("%s: try %d failed (%s); again in %g s", place, attempt, _words(error), pause)
                time.sleep(pause)
        raise AssertionError

    def _system(self, place: Address) -> Any:
        # fsspec would make one a thread, each with connections of its own.
        with self._lock:
            if place.scheme not in self._systems:
                try:
                    options = _defaults(place.scheme, self._config.timeout) | self._config.options
                    made = fsspec.filesystem(place.scheme, skip_instance_cache=True, **options)
                except ImportError as error:
                    raise EnvironmentRefused(
                        f"{place}: needs a package that is not installed ({error}): pip install 'tokscale[remote]'"
                    ) from None
                self._systems[place.scheme] = made
            return self._systems[place.scheme]

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self._config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])


def _defaults(scheme: str, timeout: float) -> dict[str, Any]:
    """Options under which a store neither remembers what it was asked before nor waits for ever."""
    match scheme:
        case "http" | "https":
            import aiohttp  # of the extra; whoever reads no address needs none

            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            return {"use_listings_cache": False, "client_kwargs": {"timeout": limits}}
        case "s3":
            limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}
            return {"use_listings_cache": False, "config_kwargs": limits}
        case _:
            return {"use_listings_cache": False}


def _path(place: Address) -> str:
    """A place as its file system names it."""
    return str(fsspec.core.strip_protocol(place))


def _facts(place: Address, info: dict[str, Any]) -> Facts:
    if info.get("type") == "directory":
        raise DataError(f"{place}: is a folder, where a file is wanted; check the address")
    if info.get("size") is None:
        raise DataError(f"{place}: its server does not say how large it is; copy it to this machine")
    lfs = info.get("lfs")
    stated = (lfs.get("sha256") if isinstance(lfs, dict) else None) or next(
        (info[word] for word in _TAGS if info.get(word)), ""
    )
    return Facts(int(info["size"]), str(stated).strip('"'))


def _refusal(place: Address, error: Exception) -> TokscaleError | None:
    """What no further try would mend; None for what may pass."""
    chain = list(_chain(error))
    status = next((found for cause in chain if (found := _status(cause)) is not None), None)
    if status in _REFUSED or any(isinstance(e, PermissionError) or "Credentials" in type(e).__name__ for e in chain):
        return StorageError(
            f"{place}: its store refuses access ({_words(error)}); give credentials as the store's own tools want "
            "them (environment or configuration files), or remote.options={anon: true} where it is public"
        )
    if status in _ABSENT:
        return DataError(f"{place}: there is nothing ({status}); check the address")
    if status is not None and status < 500 and status not in _PASSING:
        return DataError(f"{place}: its server refuses the request ({status}: {_words(error)}); check the address")
    if status is None and isinstance(error, FileNotFoundError) and len(chain) == 1:
        return DataError(f"{place}: there is nothing; check the address")
    if any(isinstance(e, OSError | EOFError) or _module(e) in _OF_A_NETWORK for e in chain):
        return None
    return DataError(f"{place}: cannot be read ({_words(error)}); check the address and remote.options")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The number of a server's answer, wherever a library keeps it."""
    response = getattr(error, "response", None)
    held = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    stated = getattr(error, "status", None) or getattr(response, "status_code", None)
    # To aiohttp a body that breaks off is a bad message of the code 400, which no server has sent.
    for value in (held, stated, getattr(error, "code", None) if _module(error) == "gcsfs" else None):
        if str(value).isdecimal() and 100 <= int(str(value)) < 600:
            return int(str(value))
    return None


def _module(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _words(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__ or error
    return f"{type(cause).__name__}: {cause}"[:200].rstrip(": ")
