"""How long a stage took over all its processes: stopped ones, killed ones, and the tasks of an array."""

import json
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

from tokscale.base.errors import DataError
from tokscale.base.files import read_regular
from tokscale.base.log import logger

FOLDER = Path("stages", ".clocks")
_TICK_SECONDS = 5.0
_log = logger("stages")


class StageClock:
    """The time of one process: a small file whose last change is the process's last heartbeat."""

    def __init__(self, run_dir: Path, stage: str, tick: float = _TICK_SECONDS, record: Path | None = None):
        """Start. The folder is not made for it: a process that is refused at once leaves nothing.

        Args:
            run_dir: The run folder.
            stage: Which stage.
            tick: Seconds between heartbeats; a killed process is short of no more than that.
            record: Of the attempt; if it is there its time is kept fresh, too.
        """
        self._record = record
        self._run_dir, self._stage, self._tick = run_dir, stage, tick
        self._path = run_dir / FOLDER / f"{stage}.{secrets.token_hex(6)}.json"
        self._began = time.time()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The process is about to end."""
        self._done.set()
        self._thread.join()
        self._mark()

    def forget(self) -> None:
        """The process did no work here: as if it had never been."""
        self._done.set()
        self._thread.join()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._done.wait(self._tick):
            self._mark()

    def _mark(self) -> None:
        try:
            if not self._path.exists():
                if not self._run_dir.is_dir():
                    return
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text(json.dumps({"began": self._began}))
            now = time.time()
            os.utime(self._path, (now, now))  # by this machine's clock, not the file server's
            if self._record is not None and self._record.exists():
                os.utime(self._record, (now, now))
        except OSError as error:  # the disk may be full; time is not worth a run
            _log.warning("%s: %s", self._path, error)


def time_spent(run_dir: Path, stage: str) -> tuple[float, int]:
    """Seconds that processes of a stage have spent in a run folder, and how many they were."""
    seconds, count = 0.0, 0
    for path in (run_dir / FOLDER).glob(f"{stage}.*.json"):
        try:
            seconds += max(path.stat().st_mtime - json.loads(read_regular(path))["began"], 0.0)
            count += 1
        except (OSError, DataError, ValueError, KeyError, TypeError):
            continue  # torn by the kill it was to survive
    return seconds, count
