"""How a command line ends: a user's mistake is one clear line and exit code 2, never a traceback."""

import atexit
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SaveError(OSError):
    """Something could not be written; the message says what, why, and what is still whole."""


USER_ERRORS = (
    ValueError, ImportError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError,
    SaveError,
)  # fmt: skip


def _end(code: int) -> NoReturn:
    """Exit; one of several launched processes without taking the interpreter down.

    The threads of a process group that are still there when the interpreter goes may end the process with SIGABRT: a
    command that has done all its work would fail, now and then. To leave the group is not enough, because a sharded
    model holds on to it.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # launchers set it
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave_processes() -> None:
    """Take leave of the other processes of a launched command, if there are any."""
    distributed = sys.modules.get("torch.distributed")  # a command without torch stays without it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def cli(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` as a program and exit.

    Functions of genssm raise :data:`USER_ERRORS` for what a user can mend (what was given, what was expected, what to
    do); these are printed as one ``error:`` line with exit code 2. Everything else is a fault of ours and keeps its
    traceback. ``GENSSM_DEBUG=1`` shows the traceback in every case.

    Args:
        main: the program; returns an exit code or None for success.
    """
    try:
        code = main() or 0
        _leave_processes()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except USER_ERRORS as error:
        if os.environ.get("GENSSM_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        if error.errno not in _NO_ROOM or os.environ.get("GENSSM_DEBUG") == "1":
            raise
        print(f"error: {error}: make room and run the same command again", file=sys.stderr)
        code = 2
    _end(code)
