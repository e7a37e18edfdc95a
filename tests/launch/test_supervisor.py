"""The supervisor passes signals on, outlives them, and ends as the payload ends."""

import signal
import subprocess
import sys

import pytest

from pathfm.launch.supervisor import batch_step

SUPERVISE = "import sys; from pathfm.launch.supervisor import supervise; sys.exit(supervise(sys.argv[1:]))"

PAYLOAD = """
import signal, sys, time
def leave(number, frame):
    print(signal.Signals(number).name, flush=True)
    sys.exit(75)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, leave)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_reaches_the_payload_whose_status_is_the_supervisors(number: signal.Signals) -> None:
    command = [sys.executable, "-c", SUPERVISE, sys.executable, "-c", PAYLOAD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout
        assert supervisor.stdout.readline() == "ready\n"
        supervisor.send_signal(number)
        assert supervisor.stdout.readline().strip() == number.name
        assert supervisor.wait(timeout=30) == 75


def test_a_payload_that_fails_ends_the_batch_step_with_its_status() -> None:
    kept = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        assert batch_step(["true"]) == 0
        with pytest.raises(SystemExit) as caught:
            batch_step(["sh", "-c", "exit 9"])
        assert caught.value.code == 9
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
