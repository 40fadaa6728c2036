"""Images in class folders, or in a zip of them: which there are, of which class each is, and its pixels."""

import contextlib
import io
import itertools
import math
import os
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor

from flags import UserError

BROKEN_LIMIT = 0.01  # the share of a set's images that may be unreadable
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile,
              Image.DecompressionBombError)  # what Pillow, torchvision and zipfile raise for broken files


def _walk(folder: str, prefix: str = '', above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """The files below a folder, by their names in it; not those behind links that lead back up, nor pipes and the like."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f'{prefix}{entry.name}/', (*above, here))
            elif entry.is_file() or not os.path.exists(entry.path):  # a link to nothing counts as a broken image
                yield prefix + entry.name


def _in_zip(place: Path) -> list[str]:
    """The names in a zip. Raises UserError."""
    try:
        if not place.is_file():
            raise OSError('not a file')
        with zipfile.ZipFile(place) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f'{place}: is not a readable zip file ({error}); copy it anew, or drop --zip_file for folders'
                        ) from None


def find_images(root: Path, parts: Sequence[str], zipped: bool, show: bool = True) -> tuple[Path, list[tuple[str, str]]]:
    """The first folder (or NAME.zip) of `parts` that is there, and its images as sorted (name in it, class) pairs.

    An image's class is the first folder that it lies in, as torchvision's ImageFolder has it; in a zip the first below the
    folders that all its images share. What is left out gets a warning, if `show`. Raises UserError.
    """
    places = [root / (f'{part}.zip' if zipped else part) for part in parts]
    place = next((place for place in places if os.path.exists(place)), None)
    if place is None:
        if not os.path.isdir(root):
            raise UserError(f'--data={root}: there is no such folder; give the one that has {places[0].name}')
        kind = 'a zip' if zipped else 'a folder'
        other = not zipped and any((root / f'{part}.zip').exists() for part in parts)
        raise UserError(f'--data={root}: there is no {" or ".join(place.name for place in places)}; {kind} of images in '
                        'class folders is needed there' + ('; for the zips in it give --zip_file' if other else ''))
    try:
        names = _in_zip(place) if zipped else list(_walk(str(place)))
    except OSError as error:
        raise UserError(f'{error.filename or place}: cannot be read ({error.strerror})') from None
    names = [name for name in names if not name.endswith('/')
             and not any(part.startswith(('.', '__MACOSX')) for part in name.split('/'))]  # what systems add
    endings = torchvision.datasets.folder.IMG_EXTENSIONS
    found = [(name, name.split('/')[:-1]) for name in names if name.lower().endswith(endings)]
    levels = zip(*(folders for _, folders in found if folders), strict=False) if zipped else ()
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    if all(len(folders) <= shared for _, folders in found):  # all of one class
        shared = max(0, shared - 1)
    images = sorted((name, folders[shared]) for name, folders in found if len(folders) > shared)
    if not images:
        raise UserError(f'{place}: has no images in class folders, such as n01440764/name.JPEG')
    if show:
        warn_of_others(place, sorted(set(names) - {name for name, _ in images}), {name for name, _ in found})
    return place, images


def warn_of_others(place: Path, others: list[str], images: set[str]) -> None:
    """Warn of files that are no images, such as those of a class in a format that cannot be read, or that have no class."""
    for what, names in (('in a format that is not read', [name for name in others if name not in images and '/' in name]),
                        ('in no class folder', [name for name in others if name in images])):
        if names:
            print(f'warning: {place}: {len(names)} file{"s" * (len(names) > 1)} {what}, such as {names[0]}; left out',
                  file=sys.stderr, flush=True)


def label(place: Path, images: list[tuple[str, str]], classes: list[str], show: bool) -> list[int]:
    """The labels of `find_images`' images: what places their classes have among the training images' `classes`.

    Raises UserError for a class that is not among them; one of them that has no image gets a warning, if `show`.
    """
    index_of = {name: index for index, name in enumerate(classes)}
    there = {name for _, name in images}
    unknown, absent = sorted(there - index_of.keys()), sorted(index_of.keys() - there)
    if unknown:
        raise UserError(f'{place}: the class {unknown[0]} is not among those of the training images'
                        + (f', nor are {len(unknown) - 1} more' if unknown[1:] else ''))
    if absent and show:
        print(f'warning: {place}: has no image of the class {absent[0]}'
              + (f', nor of {len(absent) - 1} more' if absent[1:] else ''), file=sys.stderr, flush=True)
    return [index_of[name] for _, name in images]


def decode(data: bytes) -> Tensor:
    """The pixels of an encoded image, (3, h, w) uint8: as Pillow has them in RGB. Raises one of UNREADABLE."""
    image = Image.open(io.BytesIO(data))
    if image.format == 'JPEG' and image.mode in ('RGB', 'L'):
        with contextlib.suppress(RuntimeError, AttributeError):  # a torchvision without it, or broken: Pillow will say
            pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return torchvision.io.decode_jpeg(pixels, torchvision.io.ImageReadMode.RGB)  # as Pillow, but faster
    if image.mode.startswith('I'):  # grey of 16 bits, which Pillow would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """An image (3, h, w) uint8 of another size: bilinear, each pixel a mean of all those that it stands for, as Pillow's."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image.unsqueeze(0), (height, width), mode='bilinear', antialias=True)[0]


class Files:
    """The encoded files of a folder or of a zip, by their names in it; any process and thread may read."""

    def __init__(self, place: Path):
        self.place = place
        self.archives: dict[int, zipfile.ZipFile] = {}  # process and thread -> its own open zip

    def __getstate__(self) -> dict:
        return {'place': self.place, 'archives': {}}  # open files do not go to spawned workers

    def read(self, name: str) -> bytes:
        """A file's content. Raises one of UNREADABLE."""
        if self.place.suffix != '.zip':
            return (self.place / name).read_bytes()
        reader = hash((os.getpid(), threading.get_ident()))
        if reader not in self.archives:
            self.archives[reader] = zipfile.ZipFile(self.place)
        return self.archives[reader].read(name)

    @property
    def readers(self) -> int:
        """How many threads read at a time: each opens a zip of its own, whose directory may take a gigabyte."""
        return 4 if self.place.suffix == '.zip' else 16

    def sizes(self, names: list[str]) -> list[int]:
        """The bytes of each file."""
        if self.place.suffix != '.zip':
            paths = (self.place / name for name in names)
            return [path.stat().st_size if path.exists() else 0 for path in paths]  # 0: a link to nothing
        with zipfile.ZipFile(self.place) as archive:
            return [archive.getinfo(name).file_size for name in names]


def for_each(count: int, work: Callable[[int], None], threads: int, title: str, show: bool) -> None:
    """Do work(index) for all indices, in threads; with a line of progress on stderr if `show`."""
    done, beginning = itertools.count(1), '\r' if sys.stderr.isatty() else ''  # of a line that grows, or of the last one

    def step(index: int) -> None:
        work(index)
        number = next(done)
        if show and (number == count or (beginning and number % 1000 == 0)):
            print(f'{beginning}{title}: {number}/{count} files in memory', end='\n' if number == count else '', file=sys.stderr,
                  flush=True)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(step, range(count)):  # which raises what a step raised
            pass


def available_memory() -> float:
    """The bytes of memory that can still be taken, a container's limit being one; infinite where the system does not tell."""
    try:
        free = next(int(line.split()[1]) * 1024 for line in Path('/proc/meminfo').read_text().splitlines()
                    if line.startswith('MemAvailable'))
        limit = Path('/sys/fs/cgroup/memory.max')
        if not limit.exists() or limit.read_text() == 'max\n':
            return free
        taken = dict(line.split() for line in limit.with_name('memory.stat').read_text().splitlines())
        held = int(taken['anon']) + int(taken.get('shmem', 0))  # the latter: images that are held already
        return min(free, int(limit.read_text()) - held)
    except (OSError, StopIteration, KeyError, ValueError):
        return math.inf


class Broken:
    """Keeps count of a set's images that cannot be decoded: each gets one warning (if `show`), too many are an error."""

    def __init__(self, place: Path, count: int, show: bool = True):
        self.place, self.count, self.show, self.names = place, count, show, set()

    def add(self, names: list[str]) -> None:
        """Warn of images that are broken. Raises UserError when more than 1 % are."""
        for name in names:
            if name not in self.names:
                self.names.add(name)
                if self.show:
                    print(f'warning: {self.place / name}: is broken or cut off; left out', file=sys.stderr, flush=True)
        if len(self.names) > BROKEN_LIMIT * self.count:
            raise UserError(f'{self.place}: {len(self.names)} of {self.count} images cannot be decoded, more than '
                            f'{BROKEN_LIMIT:.0%}; copy the data anew, or remove them')
