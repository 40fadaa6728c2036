"""Images in files (ImageNet): held in memory or read when needed, decoded and transformed by worker processes.

A batch is (images (batch, 3, 224, 224) float, labels (batch,) int64).
"""

import contextlib
import copy
import math
import os
import platform
import signal
import sys
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flags
import work_queue
from augment import PhotoDraws, colour_jitter, draw, mirror, send
from class_folders import UNREADABLE, Broken, Files, available_memory, decode, find_images, for_each, label, resize
from datasets import batch_bounds, normalise, share_of, training_bounds
from flags import UserError

IMAGENET_MEAN, IMAGENET_STD = (.485, .456, .406), (.229, .224, .225)
IMAGE_SIZE = 224  # pixels of a side of what a network sees; in evaluation the middle of a short side of 256
TRAIN, VALID = ('train',), ('valid', 'val')  # what the folders are called
SEEN = 4  # a long side of more short sides than this is cut before anything is computed
LOOKED_AT = 8  # images of a set that are decoded at its opening: one of them must be one


def add_flags(parser: flags.Parser) -> None:
    """The flags of reading images from files."""
    group = parser.add_argument_group('image files')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    flags.add(group, 'zip_file', 'read train.zip and valid.zip instead of folders', False, action='store_true')
    flags.add(group, 'lazy_load', 'read images when they are needed, not into memory first', False, action='store_true')
    flags.add(group, 'workers', 'processes that decode images; by default the cores, which the processes of a machine share',
              max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))), type=flags.COUNT)


def centre(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of an image (3, h, w), as torchvision's CenterCrop."""
    top, left = (round((whole - part) / 2) for whole, part in zip(image.shape[1:], (height, width), strict=True))
    return image[:, top:top + height, left:left + width]


def middle(image: Tensor) -> Tensor:
    """What is seen of an image (3, h, w) uint8 in evaluation: its short side resized to 256, the middle 224×224 pixels."""
    short = min(image.shape[1:])
    height, width = (min(side, SEEN * short) for side in image.shape[1:])
    large = 8 * IMAGE_SIZE // 7
    resized = resize(centre(image, height, width), large * height // short, large * width // short)
    return centre(resized, IMAGE_SIZE, IMAGE_SIZE)


class ImageFiles(torch.utils.data.Dataset):
    """Images of class folders or of a zip, read when asked for, or held in memory as one buffer of encoded files.

    An item is asked for by (epoch, index) and is (image (3, 224, 224) uint8, label, draws of its augmentation or None), or
    the image's name if it cannot be decoded. The draws follow from (seed, epoch, index) alone: not from who reads the
    image, or when.
    """

    def __init__(self, place: Path, images: list[tuple[str, str]], classes: list[str], seed: int, trains: bool,
                 show: bool = False):
        self.place, self.names, self.classes = place, [name for name, _ in images], classes
        self.files = Files(place)
        self.labels = label(place, images, classes, show)
        self.seed, self.trains = seed, trains
        self.memory: Tensor | None = None  # once held: where each file begins, and the last ends; then the files
        self.path = ''  # by which other processes find it

    def __len__(self) -> int:
        return len(self.names)

    def evaluated(self) -> 'ImageFiles':
        """The same images (and the same memory) as evaluation sees them."""
        other = copy.copy(self)
        other.trains = False
        return other

    def __getstate__(self) -> dict:
        return self.__dict__ | ({'memory': None} if self.path else {})  # for spawned workers, which attach to it

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        if self.path:
            self.attach()

    def read(self, index: int) -> bytes:
        """The encoded file."""
        if self.memory is None:
            return self.files.read(self.names[index])
        first, last = self.memory[8 * index:8 * index + 16].view(torch.int64).tolist()
        return self.memory[first:last].numpy().tobytes()

    def attach(self) -> None:
        """Map the memory that another process holds; where it cannot be reached, stay lazy."""
        with contextlib.suppress(OSError, RuntimeError):  # in another container
            self.memory = torch.from_file(self.path, shared=True, size=os.stat(self.path).st_size, dtype=torch.uint8)

    def hold(self, show: bool, store: torch.distributed.Store | None = None) -> None:
        """Read all files into memory, in parallel; if they do not fit, say so and stay lazy.

        show: whether to print what happens. store: that of the run's processes; with it the first of each machine reads,
        and the others wait and share its memory, which goes when the last of them ends. Without, each has its own.
        """
        if not hasattr(os, 'memfd_create'):  # not Linux
            store = None
        key = f'{platform.node()} {os.environ.get("GROUP_RANK", 0)} {self.place}'
        if store is not None and os.environ.get('LOCAL_RANK', '0') != '0':
            while not store.check([key]):  # to wait in the store would stop this process's signs of life
                time.sleep(0.2)
            self.path = store.get(key).decode()
            if self.path:
                self.attach()
            return
        offsets = torch.tensor([8 * (len(self) + 1), *self.files.sizes(self.names)]).cumsum(0)
        needed, copies = int(offsets[-1]), 1 if store is not None else int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        free = available_memory() / copies
        if needed > 0.9 * free:
            if show:
                print(f'{self.place}: {needed / 2**30:.1f} GiB do not fit into the {free / 2**30:.1f} GiB of memory that are '
                      'free; reading lazily', file=sys.stderr, flush=True)
        else:
            self.fill(offsets, show)
        if store is not None:
            store.set(key, self.path)

    def fill(self, offsets: Tensor, show: bool) -> None:
        """Read the files into new memory, each where `offsets` (count + 1,) int64 say."""
        if hasattr(os, 'memfd_create'):
            descriptor = os.memfd_create('images')  # in memory only; its name leads there as long as it is open
            os.truncate(descriptor, int(offsets[-1]))
            path = f'/proc/{os.getpid()}/fd/{descriptor}'
            memory = torch.from_file(path, shared=True, size=int(offsets[-1]), dtype=torch.uint8)
            weakref.finalize(memory, os.close, descriptor)
        else:
            path, memory = '', torch.empty(int(offsets[-1]), dtype=torch.uint8).share_memory_()
        memory[:8 * len(offsets)].view(torch.int64).copy_(offsets)
        places = offsets.tolist()

        def fill(index: int) -> None:
            place = memory.numpy()[places[index]:places[index + 1]]
            try:
                place[:] = np.frombuffer(self.files.read(self.names[index]), dtype=np.uint8)
            except UNREADABLE:
                place[:] = 0  # which is no image: it counts as broken when its turn comes
        for_each(len(self), fill, self.files.readers, str(self.place), show)
        self.files.archives.clear()
        self.memory, self.path = memory, path

    def check(self) -> None:
        """Raise UserError if there is nothing that can be decoded among some of the images."""
        looked_at = range(0, len(self), math.ceil(len(self) / LOOKED_AT))
        if not any(isinstance(self.evaluated()[0, index], tuple) for index in looked_at):
            raise UserError(f'{self.place}: images cannot be decoded, {self.names[0]} for one; copy the data anew')

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, PhotoDraws | None] | str:
        epoch, index = key
        try:
            image = decode(self.read(index))
        except UNREADABLE:
            return self.names[index]
        if not self.trains:
            return middle(image), self.labels[index], None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f'{self.seed} {epoch} {index}'.encode()))  # no GPU's
            draws = draw(image)
        top, left, height, width = draws.box
        return resize(image[:, top:top + height, left:left + width], IMAGE_SIZE, IMAGE_SIZE), self.labels[index], draws


def collate(items: list[tuple[Tensor, int, PhotoDraws | None] | str], full: bool
            ) -> tuple[Tensor, Tensor, list[Tensor], list[str]]:
    """Images (batch, 3, h, w) uint8, labels (batch,) and draws (see `augment`) of what could be decoded; names of the rest.

    full: good images of the batch take the places of broken ones, so that training's batches keep their size.
    """
    good = [item for item in items if not isinstance(item, str)]
    broken = [item for item in items if isinstance(item, str)]
    if full:
        good = (good * len(items))[:len(items)]
    if not good:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.long), [], broken
    images, labels, draws = zip(*good, strict=True)
    stacked = [] if draws[0] is None else [torch.stack(values) for values in list(zip(*draws, strict=True))[1:]]
    return torch.stack(images), torch.tensor(labels), stacked, broken


def handed_over(batches: Iterator) -> Iterator:
    """The batches of a DataLoader; a worker killed while it hands one over is told of as PyTorch tells of the others.

    PyTorch asks whether the worker lives when the connection to it breaks, which can be before the system says that it died.
    """
    try:
        yield from batches
    except (EOFError, ConnectionError) as error:
        raise RuntimeError('DataLoader worker (pid unknown) was killed while it handed over a batch') from error


class FileBatches:
    """Batches of an ImageFiles, decoded, cropped and resized by worker processes, augmented and normalised on the device.

    Shuffled when it has a generator (then it yields (images, labels, weight) as TrainBatches does), else in order (then
    (images, labels)). An image that cannot be decoded is named in one warning and left out; UserError if more than 1 % are.
    """

    def __init__(self, files: ImageFiles, batch_size: int, device: torch.device, workers: int,
                 indices: Sequence[int] | None = None, generator: torch.Generator | None = None, rank: int = 0, world: int = 1):
        self.files, self.device, self.generator, self.rank, self.world = files, device, generator, rank, world
        self.indices = torch.arange(len(files)) if indices is None else torch.as_tensor(indices)
        self.count, self.size, self.classes = len(self.indices), IMAGE_SIZE, files.classes
        self.broken = Broken(files.place, self.count)
        self.bounds = training_bounds(self.count, batch_size, world) if generator else batch_bounds(self.count, batch_size)
        self.keys: list[list[tuple[int, int]]] = []  # what the loader reads in this epoch, batch by batch
        self.loader = torch.utils.data.DataLoader(
            files, batch_sampler=self.keys, num_workers=workers, collate_fn=partial(collate, full=generator is not None),
            pin_memory=device.type == 'cuda', persistent_workers=workers > 0,
            generator=torch.Generator())  # of its own: it would draw from dropout's
        self.mean, self.std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.bounds)

    def to_device(self, images: Tensor, labels: Tensor, draws: list[Tensor], broken: list[str]) -> tuple[Tensor, Tensor]:
        """Augmented and normalised images, and labels, on the device; warns of images that are broken."""
        self.broken.add(broken)
        images, labels = (send(tensor, self.device) for tensor in (images, labels))
        if draws:
            mirrored, factors, order = draws
            images = colour_jitter(mirror(images, mirrored).float().div_(255), factors, order).mul_(255)
        return normalise(images, self.mean, self.std), labels

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels at the positions `chosen` (batch,), in that order."""
        keys = [(0, index) for index in self.indices[chosen.cpu()].tolist()]
        with ThreadPoolExecutor(self.files.files.readers if self.files.memory is None else None) as pool:
            items = list(pool.map(self.files.__getitem__, keys))
        self.files.files.archives.clear()
        return self.to_device(*collate(items, full=False))

    def __iter__(self) -> Iterator[tuple]:
        epoch, order = 0, self.indices
        if self.generator:
            epoch = int(torch.randint(2 ** 31, (), generator=self.generator))
            order = order[torch.randperm(self.count, generator=self.generator)]
        shares = [share_of(start, stop, self.rank, self.world) for start, stop in self.bounds]
        if not self.generator:
            shares = [(first, last) for first, last in shares if last > first]
        self.keys[:] = [[(epoch, index) for index in order[first:last].tolist()] for first, last in shares]
        batches = iter(self.loader)
        # The loader's handler would raise wherever the program is when a worker is killed, and again when others end; without
        # it the next batch raises, within seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for (start, stop), read in zip(self.bounds, handed_over(batches), strict=False):
            images, labels = self.to_device(*read)
            if not self.generator:
                if len(labels):
                    yield images, labels
            elif len(labels):
                yield images, labels, len(labels) * self.world / (stop - start)
            else:
                raise UserError(f'{self.files.place}: all images of a batch are broken; copy the data anew, or remove them')


def open_files(root: str | Path, zipped: bool, lazy: bool, seed: int, store: torch.distributed.Store | None = None,
               show: bool = True, validates: bool = True) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """The training and the validation images below `root`, and the names of the classes. Raises UserError.

    zipped: read train.zip and valid.zip; lazy: do not hold the files in memory; store: that of several processes, to have
    one copy of them on each machine; show: whether to print warnings and progress; validates: False takes the training
    images for the validation too, and looks for no others.
    """
    train = find_images(Path(root), TRAIN, zipped, show)
    classes = sorted({name for _, name in train[1]})
    sets = [ImageFiles(*train, classes, seed, trains=True)]
    if validates:
        sets.append(ImageFiles(*find_images(Path(root), VALID, zipped, show), classes, seed, trains=False, show=show))
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    with contextlib.nullcontext() if store is None else work_queue.together(store, rank, world, f'images of {root}'):
        for files in sets:
            files.check()
            if not lazy:
                files.hold(show, store)
    return sets[0], sets[1] if validates else sets[0].evaluated(), classes


def open_tested(root: str | Path, zipped: bool, classes: list[str] | None, show: bool = True) -> ImageFiles:
    """The validation images below `root`, read when they are needed.

    Their classes are `classes`, or else those of the training images, or their own where there are none. Raises UserError.
    """
    place, images = find_images(Path(root), VALID, zipped, show)
    if not classes:
        there = any((Path(root) / (f'{part}.zip' if zipped else part)).exists() for part in TRAIN)
        classes = sorted({name for _, name in (find_images(Path(root), TRAIN, zipped, show)[1] if there else images)})
    files = ImageFiles(place, images, classes, seed=0, trains=False, show=show)
    files.check()
    return files
