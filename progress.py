"""How a run shows where it is, beside its log: a live line on a terminal, and event files for TensorBoard."""

import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flags import UserError

LIVE_EVERY = 2  # seconds between two looks at a running loss, which wait for the device; only on a terminal


class LiveLine:
    """A line of progress under the log, on a terminal; in a file or a pipe it shows nothing and costs nothing."""

    def __init__(self, shown: bool):
        self.stream = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None) if shown else None
        self.next = time.monotonic() + LIVE_EVERY

    @property
    def due(self) -> bool:
        """Whether it is time to call `show` again."""
        return self.stream is not None and time.monotonic() >= self.next

    def show(self, text: str) -> None:
        """Replace the line's text, cut to the terminal's width."""
        self.stream.write(f'\r{text[:shutil.get_terminal_size().columns - 1]}\x1b[K')
        self.stream.flush()
        self.next = time.monotonic() + LIVE_EVERY

    def clear(self) -> None:
        """Make room for a log line."""
        if self.stream is not None:
            self.stream.write('\r\x1b[K')
            self.stream.flush()


class EventFile:
    """metrics.jsonl's records as an event file for TensorBoard; a resumed run's replace those that it does again."""

    def __init__(self, directory: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError('--tensorboard needs the package tensorboard: pip install tensorboard, or drop the flag') from None
        self.writer, self.open_writer = None, partial(SummaryWriter, directory)

    def write(self, values: dict[str, Any]) -> None:
        """Mirror a record: numbers as curves (one for each key of a dict), lists as histograms, text as text."""
        if values['kind'] == 'start':
            return
        step = values.get('search_epoch', values.get('epoch', values.get('index')))
        if self.writer is None:
            self.writer = self.open_writer(purge_step=step if values['kind'] == 'epoch' else None)

        def add(name: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, inner in value.items():
                    add(f'{name}/{key}', inner)
            elif isinstance(value, list):
                self.writer.add_histogram(name, torch.tensor(value), step)
            else:
                (self.writer.add_text if isinstance(value, str) else self.writer.add_scalar)(name, value, step)
        add(values['kind'], {key: value for key, value in values.items() if key != 'kind'})
        self.writer.flush()
