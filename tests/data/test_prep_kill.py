"""SIGKILL at random moments and before every step of the commit protocol: the store has the same bytes in the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import mimfast
from mimfast.data.verify import verify
from mimfast.testing.runs import write_images

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mimfast.__file__).parent.parent)}


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


SLOW = """
import sys, time
from mimfast.data import store_writer
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.sources import Folder

class Slow(Folder):
    def read(self, i):
        time.sleep(0.005)
        return super().read(i)

store_writer._COMMIT_SECONDS = 0.02
source = Slow(sys.argv[1])
print("begin", flush=True)
prep(source, sys.argv[2], PrepConfig(size=16), workers=2)
print("end", flush=True)
"""


def run(folder, out, kill_after=None):
    command = [sys.executable, "-c", SLOW, str(folder), str(out)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        began = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        process.stdout.readline()
        return time.monotonic() - began


def kill_and_continue(tmp_path, kills):
    folder = write_images(tmp_path / "images", 200, 2, side=20)
    whole = run(folder, tmp_path / "clean")
    rng = np.random.default_rng(0)
    unfinished = 0
    for _ in range(kills):
        run(folder, tmp_path / "s", kill_after=rng.uniform(0, 0.8 * whole))
        unfinished += not (tmp_path / "s" / "index.mim").exists()
    run(folder, tmp_path / "s")
    assert unfinished > 0
    assert content(tmp_path / "s") == content(tmp_path / "clean")
    assert verify(tmp_path / "s") == []


def test_kill_9(tmp_path):
    kill_and_continue(tmp_path, kills=4)


@pytest.mark.slow
def test_kill_9_many_times(tmp_path):
    for round in range(8):
        kill_and_continue(tmp_path / str(round), kills=round + 1)


EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from mimfast.data import store_writer as writer
from mimfast.data.arrays import Arrays
from mimfast.data.prep import PrepConfig, prep

writer._COMMIT_SECONDS = 0.0
source = Arrays(np.random.default_rng(0).integers(0, 256, (40, 6, 7, 3), np.uint8))
out, clean = Path(sys.argv[1]), Path(sys.argv[2])

def child(kill_at):
    \"""Write the store; end by SIGKILL before the step of that number, when there is one.\"""
    pid = os.fork()
    if pid == 0:
        steps = [0]
        def counted(call):
            def step(*args):
                steps[0] += 1
                if steps[0] == kill_at:
                    if call is real["write"]:
                        call(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)
            return step
        for name, call in real.items():
            setattr(os, name, counted(call))
        prep(source, out, PrepConfig(size=4, format="raw"), workers=1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

real = {name: getattr(os, name) for name in ("write", "fsync", "replace", "unlink", "ftruncate")}
def content():
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}
child(0)
wanted, steps = content(), 0
while True:
    shutil.rmtree(out)
    steps += 1
    if child(steps) == 0:
        break
    if steps % 2:  # once more while it is continued
        child(2)
    assert child(0) == 0, steps
    assert content() == wanted, (steps, sorted(content()))
print(steps - 1)
"""


def test_killed_before_every_single_step(tmp_path):
    command = [sys.executable, "-c", EVERY_STEP, str(tmp_path / "s"), str(tmp_path / "clean")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
