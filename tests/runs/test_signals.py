"""The first signal asks, the second one stops, and afterwards all is as before."""

import os
import signal
import threading

import pytest

from qkd_jax.runs.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_stops(number):
    told, before = [], [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), StopRequest(lambda: told.append("stopping")) as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and told == ["stopping"]
        os.kill(os.getpid(), number)
    assert told == ["stopping"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_the_main_thread_signals_stay_as_they_are():
    seen, before = [], signal.getsignal(signal.SIGINT)

    def work():
        with StopRequest(lambda: None) as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
