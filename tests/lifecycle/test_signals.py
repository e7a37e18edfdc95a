"""Signals are notes; only a person who presses Ctrl-C again and again ends the process at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, time
from pathfm.lifecycle.signals import noted, seconds_since_noted, take_notes
take_notes()
print("ready", flush=True)
try:
    while True:
        time.sleep(0.01)
        if noted() and seconds_since_noted() > {patience}:
            print(noted(), flush=True)
            sys.exit(75)
except KeyboardInterrupt:
    print("insisted", flush=True)
    sys.exit(130)
"""


def ended(patience: float, signals: list[signal.Signals], pause: float) -> tuple[int, str]:
    words = [sys.executable, "-c", PROGRAM.format(patience=patience)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        os.kill(process.pid, number)
        time.sleep(pause)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said.strip()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_the_first_signal_is_noted_and_others_that_follow_change_nothing(first):
    assert ended(0.5, [first, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], 0.02) == (75, first.name)


def test_a_press_that_arrives_several_times_is_one_press():
    assert ended(0.5, [signal.SIGINT] * 5, 0.02) == (75, "SIGINT")


def test_the_third_press_means_it():
    assert ended(60, [signal.SIGINT] * 3, 0.7) == (130, "insisted")
