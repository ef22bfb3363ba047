import os
import signal
import time

import pytest

from tokscale.train.signals import Requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_only_sets_a_flag(tmp_path, number):
    with Requests(tmp_path) as requests:
        assert not any(requests.flags().values())
        os.kill(os.getpid(), number)
        assert requests.flags() == {"stop": True, "save": False, "again": number != signal.SIGINT}
        assert requests.reason() == number.name


def test_the_handlers_from_before_come_back(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with Requests(tmp_path):
        assert signal.getsignal(signal.SIGUSR1) is not before
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_ctrl_c_interrupts(tmp_path):
    with pytest.raises(KeyboardInterrupt), Requests(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_files_ask_once(tmp_path):
    with Requests(tmp_path) as requests:
        (tmp_path / "SAVE").touch()
        (tmp_path / "STOP").touch()
        assert requests.flags() == {"stop": True, "save": True, "again": False} and requests.reason() == "file STOP"
        requests.answered("save")
        requests.answered("stop")
        assert not any(requests.flags().values()) and not list(tmp_path.iterdir())


def test_only_the_main_rank_polls_files(tmp_path):
    (tmp_path / "STOP").touch()
    with Requests(tmp_path, is_main=False) as requests:
        assert not requests.flags()["stop"] and requests.reason() == ""
        requests.answered("stop")
    assert (tmp_path / "STOP").exists()


def test_a_deadline_stops(tmp_path):
    with Requests(tmp_path, deadline=time.monotonic() + 3600) as requests:
        assert not requests.flags()["stop"]
    with Requests(tmp_path, deadline=time.monotonic() - 1) as requests:
        assert requests.flags()["stop"] and requests.reason() == "time limit"


def test_the_end_of_an_allocation_stops_and_asks_to_come_again(tmp_path):
    with Requests(tmp_path, ending=lambda: True) as requests:
        assert requests.flags() == {"stop": True, "save": False, "again": True}
        assert requests.reason() == "the allocation ends"
    with Requests(tmp_path, is_main=False, ending=lambda: True) as requests:  # one rank asks for all
        assert not any(requests.flags().values()) and requests.reason() == ""
