"""What ends the processes of a run when one of them is lost, hangs or fails; without torch."""

import signal
import socket
import subprocess
import sys

import pytest

from tests.processes import ends

# A rank: tells or is told on its first line where rank 0 listens, then does as its body says.
PREPARE = """
import sys, time
from aam.learning import watch as module
from aam.learning.watch import Watch
module.BEAT_SECONDS, module.SILENCE_SECONDS, module.GRACE_SECONDS = 0.1, {silence}, 0.3
rank, size = int(sys.argv[1]), int(sys.argv[2])
watch = Watch(rank, size, lambda lost: f"rank {{lost}} is gone")
if rank:
    address, port, token = sys.stdin.readline().split()
    watch.connect(address, int(port), token)
else:
    print(*watch.listen("127.0.0.1"), flush=True)
watch.start()
watch.wait_for_all()
print("ready", flush=True)
{body}
"""
HANG = "time.sleep(60)"


def start(count: int, body: str, silence: float = 45.0) -> tuple[list[subprocess.Popen], str]:
    """Processes that watch each other and run a body, and what they connect with."""
    script = PREPARE.format(body=body, silence=silence)
    processes, place = [], ""
    for rank in range(count):
        words = [sys.executable, "-c", script, str(rank), str(count)]
        pipe = subprocess.PIPE
        one = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        if rank:
            one.stdin.write(place)
            one.stdin.flush()
        else:
            place = one.stdout.readline()
        processes.append(one)
    for one in processes:
        assert one.stdout.readline() == "ready\n", one.stderr.read()
    return processes, place


@pytest.mark.parametrize("count", [2, 3])
def test_a_killed_rank_is_named_by_rank_0_alone(count):
    processes, _ = start(count, HANG)
    processes[1].kill()
    others = [(1, "")] * (count - 2)
    assert ends(processes) == [(1, "error: rank 1 is gone\n"), (-signal.SIGKILL, ""), *others]


def test_where_rank_0_is_killed_each_of_the_others_says_so():
    processes, _ = start(3, HANG)
    processes[0].kill()
    said = [(1, f"error: rank {rank}: rank 0 is gone\n") for rank in (1, 2)]
    assert ends(processes) == [(-signal.SIGKILL, ""), *said]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_no_longer_beats_is_gone_though_its_connection_stands(stopped):
    processes, _ = start(2, HANG, silence=1.0)
    processes[stopped].send_signal(signal.SIGSTOP)
    watching = processes[1 - stopped]
    said = watching.communicate(timeout=20)[1]
    assert watching.returncode == 1 and f"rank {stopped} is gone" in said
    processes[stopped].kill()
    ends([processes[stopped]])


def test_a_rank_that_is_busy_is_not_gone():
    """Much longer than the silence that is allowed, in Python and in C."""
    busy = "end = time.monotonic() + 2\nwhile time.monotonic() < end: sum(range(1000))\n"
    processes, _ = start(2, f"{busy}sorted(range(10**6, 0, -1))\nwatch.finish()", silence=1.0)
    assert ends(processes) == [(0, ""), (0, "")]


FAIL = """
time.sleep(2.5)  # all are ready by then, on a busy machine too
if rank in {where}:
    sys.stderr.write("error: no such file\\n" if not rank else "")
    watch.fail("no such file", 2)
    sys.exit(2)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ((1,), "error: rank 1: no such file\n"),
        ((0,), "error: no such file\n"),
        ((0, 1), "error: no such file\n"),
        ((1, 2), "error: rank .: no such file\n"),
    ],
)
def test_what_ends_any_rank_ends_all_with_one_line(where, expected):
    first, *others = ends(start(3, FAIL.format(where=where))[0])
    assert first[0] == 2 and first[1][:12] == expected.replace(".", first[1][12:13])[:12]
    assert first[1].replace("rank 2", "rank 1") == expected.replace("rank .", "rank 1")
    assert others == [(2, "")] * 2


def test_ranks_that_are_done_may_leave_in_any_order():
    body = "time.sleep([0.6, 0, 0.3][rank])\nwatch.finish()"
    assert ends(start(3, body)[0]) == [(0, "")] * 3


def test_strangers_are_sent_away():
    processes, place = start(2, "time.sleep(1.5)\nwatch.finish()")
    address, port, _ = place.split()
    for message in (b"GET / HTTP/1.1\r\n\r\n", b"hello guess 1\n", b""):
        with socket.create_connection((address, int(port)), timeout=5) as stranger:
            stranger.sendall(message)
            if message:
                assert stranger.recv(10) == b""
    assert ends(processes) == [(0, "")] * 2
