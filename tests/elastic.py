"""torchrun whose processes are forked, so that PyTorch is imported once: the same launcher and environment otherwise.

python elastic.py COUNT PREAMBLE PROGRAM FLAG... is torchrun --standalone --nproc_per_node=COUNT PROGRAM FLAG...; PREAMBLE is
Python that each process runs before the program. Where there is a GPU it is torchrun itself: a fork cannot use one.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parent.parent


def worker(preamble: str, program: str, *flags: str) -> None:
    """Be one of the processes."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the launcher's
    sys.argv, sys.path[:0] = [program, *flags], [str((ROOT / program).parent), str(ROOT), str(ROOT / 'tests')]
    exec(preamble, {})
    runpy.run_path(str(ROOT / program), run_name='__main__')


if __name__ == '__main__':
    count, *arguments = sys.argv[1:]
    if count == 'worker':
        worker(*arguments)
    elif torch.cuda.is_available():
        os.execv(sys.executable, [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}',
                                  __file__, 'worker', *arguments])
    else:
        config = LaunchConfig(1, 1, int(count), rdzv_backend='c10d', rdzv_endpoint='localhost:0', max_restarts=0,
                              start_method='fork')
        elastic_launch(config, worker)(*arguments)
