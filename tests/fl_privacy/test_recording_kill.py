"""A writer killed at any moment never loses a listed update."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

KILLS = 50

# Forks a warm process, because importing torch 50 times would take minutes. The child
# acknowledges each reply on a pipe after `extend` has returned; odd attempts write whole
# rounds, as the strategy does, even ones single replies. It is killed a random moment after a
# random number of replies, so that a busy machine makes no difference.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from fl_privacy.recording import Manifest, Recording, RecordingWriter, Reply

GROUP = 4
location, kills = Path(sys.argv[1]), int(sys.argv[2])
manifest = Manifest(created="2025-01-01T00:00:00Z")

def arrays_of(value):
    return {"w": np.full((64, 16), value, dtype=np.float32), "b": np.zeros((), dtype=np.float32)}

def work(pipe):
    with RecordingWriter.open(location, manifest, resume=True) as writer:
        for round in range(1, 10_000):
            _, sent = writer.put_global(arrays_of(round))
            numbers = range(GROUP * (round - 1), GROUP * round)
            replies = [Reply(round, str(i), arrays_of(i), i, sent) for i in numbers]
            if writer.attempt % 2:
                writer.extend(replies)
                os.write(pipe, writer.attempt.to_bytes(4, "big") * GROUP)
            else:
                for reply in replies:
                    writer.extend([reply])
                    os.write(pipe, writer.attempt.to_bytes(4, "big"))

rng = random.Random(11)
listed, acknowledged = 0, {}
for kill in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        work(write)
        os._exit(0)
    os.close(write)
    acks, wanted = b"", 4 * rng.randrange(12)
    while len(acks) < wanted:
        acks += os.read(read, wanted - len(acks)) or sys.exit("the writer ended by itself")
    time.sleep(rng.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        acks += pipe.read()
    if acks:
        attempt = int.from_bytes(acks[:4], "big")
        acknowledged[attempt] = len(acks) // 4
    if not (location / "manifest.json").exists():
        assert not acks
        continue
    recording = Recording(location)
    assert recording.verify() == [], recording.verify()
    entries = list(recording.entries(status=None))
    assert len(entries) >= listed, (len(entries), listed)
    listed = len(entries)
    for attempt, n in acknowledged.items():
        mine = [e for e in entries if e.attempt == attempt]
        assert n <= len(mine) <= n + GROUP, (attempt, n, len(mine))

with RecordingWriter.open(location, manifest, resume=True) as writer:
    pass
recording = Recording(location)
for entry in recording.entries(status=None):
    returned, sent = recording.returned(entry), recording.sent(entry)
    i = entry.num_examples
    assert (returned["w"] == i).all() and (sent["w"] == entry.round).all() and entry.n == i
stored = {str(p.relative_to(location)) for p in location.glob("updates/*/*/*")}
assert stored == {e.file for e in recording.entries()}, "an intact update was not adopted"
print(listed, len(acknowledged))
"""


def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, str(driver), str(tmp_path / "recording"), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    listed, attempts = map(int, done.stdout.split())
    assert listed > KILLS
    assert attempts > KILLS / 4
