"""What is on the disk: files written whole or not at all, lines that are appended and read back, one run to a directory."""

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import IO, Any

from flags import UserError


def need_file(path: str | Path) -> None:
    """Raise UserError for a pipe or a device where a file is expected: whoever opened it might wait without end."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f'{path}: is a pipe or a device; a file is needed here')


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file. Raises OSError, UnicodeDecodeError; UserError for a pipe or a device."""
    need_file(path)
    return Path(path).read_text().splitlines()


def write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let `write` fill a new file beside `path`, flush it to the disk and put it in the place of what is there.

    A reader sees the old file or the new one; where anything fails the old one stays, and nothing else. A link of the
    temporary file's name is replaced, not followed.
    """
    temporary = path.with_name(path.name + '.tmp')
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        with open(temporary, 'xb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_lines(path: Path, lines: list[Any]) -> None:
    """Write a text file of these lines, whole."""
    write_whole(path, lambda file: file.write(''.join(f'{line}\n' for line in lines).encode()))


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and see it to the disk; it stays apart from a last line that was cut off."""
    need_file(path)
    with open(path, 'ab+') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        cut_off = file.read() not in (b'', b'\n')
        file.write(('\n' * cut_off + line + '\n').encode())
        file.flush()
        os.fsync(file.fileno())


@cache
def warn_of_damage(path: Path, lines: str) -> None:
    """Warn, once, that lines of a file are no records."""
    print(f'warning: {path}, {lines}: no record of a run (damaged?); counts as not there', file=sys.stderr, flush=True)


def read_records(path: Path, needed: dict[str, dict[str, type | tuple[type, ...]]]) -> list[dict[str, Any]]:
    """The records of a file: JSON objects, one a line, with the name of a kind as 'kind'.

    needed: the fields, and their types, that records of a kind must have; of a kind that it lacks none. Lines that are no such
    records are named in one warning and count as not there; a last one without a line break, which may be being written,
    counts as not there in silence. Raises OSError, UserError.
    """
    need_file(path)
    records, damaged = [], []
    lines = Path(path).read_bytes().split(b'\n')
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            fields = {'kind': str} | needed.get(record['kind'], {})
            if not all(isinstance(record[name], kind) for name, kind in fields.items()):
                raise TypeError
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            if line and number < len(lines):
                damaged.append(str(number))
    if damaged:
        warn_of_damage(path, f'line{"s" * (len(damaged) > 1)} {", ".join(damaged)}')
    return records


class LoggedStream:
    """A stream whose text also goes to a log file, so that every run has its log."""

    def __init__(self, stream: IO[str], log: IO[bytes]):
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        """Write to both."""
        with contextlib.suppress(OSError):  # of a full disk the next checkpoint will tell, and must be able to
            self.log.write(text.encode(errors='backslashreplace'))
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def log_to(path: Path, early: str) -> None:
    """Append what this process prints to a log file from now on, and what it printed early before."""
    need_file(path)
    log = open(path, 'ab', buffering=0)  # noqa: SIM115 - as long as we run
    log.write(early.encode(errors='backslashreplace'))
    sys.stdout, sys.stderr = LoggedStream(sys.stdout, log), LoggedStream(sys.stderr, log)


class Lock:
    """One run to an output directory: a file `.lock` there, locked as long as the process lives, however it ends.

    Raises UserError, which says who holds it. Where a file system has no locks there is a warning.
    """

    BEGIN = 'process '  # of what it writes into the file

    def __init__(self, directory: Path):
        self.path, self.file = directory / '.lock', None
        while self.file is None or not self.is_current():
            self.file = open(self.path, 'a+', encoding='utf-8', errors='replace')  # noqa: SIM115 - as long as we run
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which forked processes do not inherit
            except (BlockingIOError, PermissionError):
                self.file.seek(0)
                raise UserError(f'--output_dir={directory} is in use by {self.file.read().strip() or "another run"}; wait for '
                                'its end, or name another one') from None
            except OSError as error:
                print(f'warning: {directory}: cannot be locked ({error.strerror}); see to it that no other run writes there',
                      file=sys.stderr, flush=True)
                return
        self.file.seek(0)
        if self.file.read(len(self.BEGIN)) not in ('', self.BEGIN):
            raise UserError(f'{self.path} is the file of another program; move it away, or name another --output_dir')
        self.file.truncate(0)
        self.file.write(f'{self.BEGIN}{os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n')
        self.file.flush()

    def is_current(self) -> bool:
        """Whether the locked file is still the one that others see: its holder before may just have ended."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let other runs in. The file goes first, while nobody else can hold it."""
        self.path.unlink(missing_ok=True)
        self.file.close()
