import os
import signal
import time

import pytest

from tokscale.train.signals import StopRequests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_only_sets_a_flag(tmp_path, number):
    with StopRequests(tmp_path) as requests:
        assert not any(requests.flags().values())
        os.kill(os.getpid(), number)
        assert requests.flags() == {"stop": True, "save": False, "requeue": number != signal.SIGINT}
        assert requests.reason() == number.name


def test_the_handlers_from_before_come_back(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequests(tmp_path):
        assert signal.getsignal(signal.SIGUSR1) is not before
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_ctrl_c_interrupts(tmp_path):
    with pytest.raises(KeyboardInterrupt), StopRequests(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_files_ask_once(tmp_path):
    with StopRequests(tmp_path) as requests:
        (tmp_path / "SAVE").touch()
        (tmp_path / "STOP").touch()
        assert requests.flags() == {"stop": True, "save": True, "requeue": False} and requests.reason() == "file STOP"
        requests.acknowledge("save")
        requests.acknowledge("stop")
        assert not any(requests.flags().values()) and not list(tmp_path.iterdir())


def test_only_the_main_rank_polls_files(tmp_path):
    (tmp_path / "STOP").touch()
    with StopRequests(tmp_path, is_main=False) as requests:
        assert not requests.flags()["stop"] and requests.reason() == ""
        requests.acknowledge("stop")
    assert (tmp_path / "STOP").exists()


def test_a_deadline_stops(tmp_path):
    with StopRequests(tmp_path, deadline=time.monotonic() + 3600) as requests:
        assert not requests.flags()["stop"]
    with StopRequests(tmp_path, deadline=time.monotonic() - 1) as requests:
        assert requests.flags()["stop"] and requests.reason() == "time limit"


def test_the_end_of_an_allocation_stops_and_asks_to_come_again(tmp_path):
    with StopRequests(tmp_path, ending=lambda: True) as requests:
        assert requests.flags() == {"stop": True, "save": False, "requeue": True}
        assert requests.reason() == "Slurm time limit"
    with StopRequests(tmp_path, is_main=False, ending=lambda: True) as requests:  # one rank asks for all
        assert not any(requests.flags().values()) and requests.reason() == ""
