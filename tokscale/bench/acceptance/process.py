"""Sections run in a process of their own, which is ended and begun anew after a failure or past its time.

An error of a kernel leaves a process without its device, and a hang would take the rest along. While all goes well one
process runs them all, since starting it costs seconds. It is told sections on standard input, a line each, and answers
with rows on what was standard output; what it prints goes to standard error.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
"""For the interpreter and its libraries, beside the time of the first section."""


class SectionProcess:
    """Runs sections one after another."""

    def __init__(self, setting: Mapping[str, str], log: Path):
        """Nothing is started yet.

        Args:
            setting: Of `Setting`, as text.
            log: What the process says beside rows is added to it.
        """
        self._setting, self._log = dict(setting), log
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def rows(self, section: str, seconds: float) -> Iterator[dict[str, Any]]:
        """The rows of a section, as they come.

        Raises:
            TimeoutError: When it took longer.
            RuntimeError: When it failed, with its traceback, or its process ended.
        """
        if self._process is None:
            self._start()
            seconds += START_SECONDS
        assert self._process is not None and self._process.stdin is not None
        deadline = time.monotonic() + seconds
        try:
            print(json.dumps({"section": section, **self._setting}), file=self._process.stdin, flush=True)
            while True:
                line = self._answers.get(timeout=max(deadline - time.monotonic(), 0.01))
                answer: Any = json.loads(line) if line else {"error": f"ended with code {self._process.wait()}"}
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                if "done" in answer:
                    return
                yield answer["row"]
        except queue.Empty:
            self.close()
            raise TimeoutError(f"took longer than its {seconds:.0f} s and was ended") from None
        except (RuntimeError, BrokenPipeError):
            self.close()
            raise

    def close(self) -> None:
        """End the process and whatever it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self._answers = queue.Queue()
        environ = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
        if self._setting["device"] == "cpu":
            environ["DS_ACCELERATOR"] = "cpu"
        with open(self._log, "a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environ,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=_listen, args=(self._process, self._answers), daemon=True).start()


def _listen(process: "subprocess.Popen[str]", answers: "queue.Queue[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


def main() -> None:
    """Run the sections that are asked for, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            _run(asked.pop("section"), asked, answers)
            answer: dict[str, Any] = {"done": True}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _run(section: str, asked: dict[str, Any], answers: Any) -> None:
    import torch

    from tokscale.bench.acceptance.sections import SECTIONS  # in this process alone: they bring everything along
    from tokscale.bench.acceptance.setting import Setting
    from tokscale.bench.stepping import no_leftovers

    device = torch.device(asked["device"])
    setting = Setting(device, asked["sizes"], Path(asked["folder"]), Path(asked["scratch"]))
    with no_leftovers(device):
        for entry in SECTIONS[section].rows(setting):
            print(json.dumps({"row": entry}), file=answers, flush=True)


if __name__ == "__main__":
    main()
