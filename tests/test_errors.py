"""How a command ends."""

import os
import subprocess
import sys

import pytest
import torch.distributed as distributed

from genssm.errors import cli

ENDLESS = """
import atexit, sys, threading
from genssm.errors import cli

def main():
    threading.Thread(target=threading.Event().wait).start()  # such as those of a process group that something holds
    atexit.register(print, "left", end="")
    print("done", end=" ")
    if len(sys.argv) > 1:
        raise ValueError("a user's mistake")

cli(main)
"""


def test_a_finished_command_leaves_its_process_group() -> None:
    """Threads of the group that outlive the interpreter end the process with SIGABRT, now and then."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with pytest.raises(SystemExit) as end:
        cli(lambda: None)
    assert end.value.code == 0
    assert not distributed.is_initialized()


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["wrong"], 2)])
def test_a_launched_process_does_not_wait_for_threads(arguments: list[str], code: int) -> None:
    """Nor does it take the interpreter down under them; what was printed and what is to be done at the end is."""
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS, *arguments],
        env=os.environ | {"WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "done left"), done.stderr
    assert ("error: a user's mistake" in done.stderr) == bool(code)
