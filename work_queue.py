"""What processes do together, however long it takes: work after which all wait for all, a queue of tasks."""

import contextlib
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from flags import Stopped

LIFE_EVERY = 10  # seconds between two signs of life of a process that shares a queue with others
LIFE_LIMIT = 600  # seconds without one after which it is given up, as collective operations do


@contextlib.contextmanager
def together(store: dist.Store, rank: int, world: int, name: str) -> Iterator[None]:
    """After the body wait until all processes have done theirs, which may take hours: a collective operation would give up.

    Raises flags.Stopped when one shows no life any more.
    """
    with signs_of_life(store, rank, name):
        yield
        store.add(f'{name} finished', 1)
        wait_for_all(store, world, name)


def share(store: dist.Store, rank: int, world: int, name: str, count: int) -> Iterator[int]:
    """Yield the next of 0..count-1 that no process has taken, until there is none and all of `world` have finished."""
    with together(store, rank, world, name):
        while (index := store.add(f'{name} taken', 1) - 1) < count:
            yield index


@contextlib.contextmanager
def signs_of_life(store: dist.Store, rank: int, name: str) -> Iterator[None]:
    """While the body runs, count up in the store, so that others see that this process is there."""
    over = threading.Event()

    def count_up() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: the main thread will hear of it
            while not over.wait(LIFE_EVERY):
                store.add(f'{name} life {rank}', 1)
    thread = threading.Thread(target=count_up, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_for_all(store: dist.Store, world: int, name: str) -> None:
    """Wait until all processes have finished what has this name.

    Raises flags.Stopped when one shows no life any more: its machine vanished, or it hangs.
    """
    counts, changed, look, pause = [-1] * world, [0.0] * world, 0.0, 0.01
    while store.add(f'{name} finished', 0) < world:
        now = time.monotonic()
        if now >= look:
            look = now + LIFE_EVERY
            for rank in range(world):
                count = store.add(f'{name} life {rank}', 0)
                if count != counts[rank]:
                    counts[rank], changed[rank] = count, now
                elif now - changed[rank] > LIFE_LIMIT:
                    raise Stopped(f'process {rank} has not answered for {LIFE_LIMIT} s; the same command goes on with what is '
                                  'done')
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
