import subprocess
import sys
import uuid

from fl_privacy.processes import end, marked

# Starts a child in a session of its own, whose environment lost the mark, and ignores SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import time; print('up', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True, env={})
time.sleep(600)
"""


def test_marked_processes_and_their_children_end_even_if_they_ignore_sigterm() -> None:
    mark = f"FL_PRIVACY_TEST={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    parent = subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        env={name: value},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    assert parent.pid in marked(mark)
    assert len(marked(mark)) == 2
    assert end(mark, patience=0.3) == set()
    assert marked(mark) == set()
    assert parent.wait(timeout=10) != 0
    parent.stdout.close()


def test_nothing_marked_is_nothing_to_end() -> None:
    assert end(f"FL_PRIVACY_TEST={uuid.uuid4().hex}") == set()
