"""Starts programs quickly: imports PyTorch once, then forks a process per program. Spoken to by helpers.py.

Reads one JSON request a line: {"start": {argv, cwd, env, output, errors, preamble}} is answered by the new process's id,
{"wait": id, "timeout": seconds} by its exit status (negative: the signal that ended it) or null when the time is over.
A process runs as `python argv[0] ...` does, in a session of its own; `preamble` is Python that runs before the program.
"""

import atexit
import json
import os
import runpy
import signal
import sys
import time
import traceback

import numpy  # noqa: F401  the imports are what makes the programs start quickly
import torch  # noqa: F401
import torchvision  # noqa: F401
from torch.distributed.launcher import api  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode  # noqa: F401


def program(request: dict) -> None:
    """Become the program; never returns."""
    os.setsid()
    os.chdir(request['cwd'])
    os.environ.update(request['env'])
    for target, mode, path in ((0, os.O_RDONLY, os.devnull), (1, os.O_WRONLY | os.O_CREAT | os.O_APPEND, request['output']),
                               (2, os.O_WRONLY | os.O_CREAT | os.O_APPEND, request['errors'])):
        os.dup2(os.open(path, mode, 0o644), target)
    sys.argv = request['argv']
    sys.path[0] = os.path.dirname(sys.argv[0])
    status = 0
    try:
        exec(request['preamble'], {})
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # as a process of its own would
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(pid: int, timeout: float) -> int | None:
    """The exit status of a process, None if it still runs after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.01)


def main() -> None:
    """Answer requests until there are no more; end what still runs."""
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if 'start' in request:
            pid = os.fork()
            if not pid:
                program(request['start'])
            running.add(pid)
            answer = pid
        else:
            answer = wait(request['wait'], request['timeout'])
            if answer is not None:
                running.discard(request['wait'])
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == '__main__':
    main()
