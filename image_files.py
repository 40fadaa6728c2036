"""Images in files (ImageNet): held in memory or read when needed, decoded and transformed by worker processes.

A batch is (images (batch, 3, 224, 224) float in channels-last layout, labels (batch,) int64).
"""

import copy
import io
import itertools
import math
import multiprocessing
import os
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

import flags
from class_folders import UNREADABLE, find_images
from datasets import batch_bounds, channels_last, normalise, share_of, training_bounds
from flags import UserError

IMAGENET_MEAN, IMAGENET_STD = (.485, .456, .406), (.229, .224, .225)
IMAGE_SIZE = 224  # pixels of a side, after the transforms
BROKEN_LIMIT = 0.01  # the share of a set's images that may be unreadable

TRAIN_TRANSFORM = transforms.Compose([
    transforms.RandomResizedCrop(IMAGE_SIZE), transforms.RandomHorizontalFlip(), transforms.ColorJitter(.4, .4, .4, .2),
    transforms.PILToTensor()])
EVAL_TRANSFORM = transforms.Compose([
    transforms.Resize(256), transforms.CenterCrop(IMAGE_SIZE), transforms.PILToTensor()])


def add_flags(parser: flags.Parser) -> None:
    """The flags of reading images from files."""
    group = parser.add_argument_group('image files')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    flags.add(group, 'zip_file', 'read train.zip and valid.zip instead of folders', False, action='store_true')
    flags.add(group, 'lazy_load', 'read images when they are needed, not into memory first', False, action='store_true')
    flags.add(group, 'workers', 'processes that decode images; by default the cores, which the processes of a machine share',
              max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))), type=flags.COUNT)


def available_memory() -> float:
    """The bytes of memory that can still be taken, a container's limit being one; infinite where the system does not tell."""
    try:
        free = next(int(line.split()[1]) * 1024 for line in Path('/proc/meminfo').read_text().splitlines()
                    if line.startswith('MemAvailable'))
        limit = Path('/sys/fs/cgroup/memory.max')
        return min(free, int(limit.read_text())) if limit.exists() and limit.read_text() != 'max\n' else free
    except (OSError, StopIteration, ValueError):
        return math.inf


class ImageFiles(torch.utils.data.Dataset):
    """Images of class folders or of a zip, read when asked for, or held in memory as one buffer of encoded files.

    An item is asked for by (epoch, index) and is (image (3, 224, 224) uint8, label), or the image's name if it cannot be
    decoded. Random transforms follow from (seed, epoch, index) alone: not from who reads the image, or when.
    """

    def __init__(self, place: Path, images: list[tuple[str, str]], classes: list[str], transform: Callable, seed: int):
        index_of = {name: index for index, name in enumerate(classes)}
        unknown = sorted({name for _, name in images} - index_of.keys())
        if unknown:
            raise UserError(f'{place}: the class {unknown[0]} is not among those of the training images'
                            + (f', nor are {len(unknown) - 1} more' if unknown[1:] else ''))
        self.place, self.names = place, [name for name, _ in images]
        self.labels = [index_of[name] for _, name in images]
        self.transform, self.seed = transform, seed
        self.buffer, self.offsets = None, None
        self.archives: dict[int, zipfile.ZipFile] = {}  # process and thread -> its own open zip

    def __len__(self) -> int:
        return len(self.names)

    def evaluated(self) -> 'ImageFiles':
        """The same images (and the same memory) with the transform of evaluation."""
        other = copy.copy(self)
        other.transform, other.archives = EVAL_TRANSFORM, {}
        return other

    def __getstate__(self) -> dict:
        return self.__dict__ | {'archives': {}}  # open files do not go to spawned workers

    def read(self, index: int) -> bytes:
        """The encoded file."""
        if self.buffer is not None:
            return self.buffer[self.offsets[index]:self.offsets[index + 1]].numpy().tobytes()
        if self.place.suffix != '.zip':
            return (self.place / self.names[index]).read_bytes()
        reader = hash((os.getpid(), threading.get_ident()))
        if reader not in self.archives:
            self.archives[reader] = zipfile.ZipFile(self.place)
        return self.archives[reader].read(self.names[index])

    def sizes(self) -> list[int]:
        """The bytes of each encoded file."""
        if self.place.suffix != '.zip':
            paths = (self.place / name for name in self.names)
            return [path.stat().st_size if path.exists() else 0 for path in paths]  # 0: a link to nothing
        with zipfile.ZipFile(self.place) as archive:
            return [archive.getinfo(name).file_size for name in self.names]

    def hold(self, processes: int, show: bool) -> None:
        """Read all files into one buffer, in parallel; if it does not fit into the memory, say so and stay lazy.

        processes: how many on this machine hold it; show: whether to print a progress bar.
        """
        offsets = torch.tensor([0, *self.sizes()]).cumsum(0)
        needed, free = int(offsets[-1]), available_memory() / processes
        if needed > 0.9 * free:
            if show:
                print(f'{self.place}: {needed / 2**30:.1f} GiB do not fit into the {free / 2**30:.1f} GiB of memory that are '
                      'free; reading lazily', file=sys.stderr, flush=True)
            return
        buffer = torch.empty(needed, dtype=torch.uint8)
        if multiprocessing.get_start_method() != 'fork':
            buffer.share_memory_()  # forked workers share it anyway
        done, beginning = itertools.count(1), '\r' if sys.stderr.isatty() else ''  # of a line that grows, or of the last one

        def fill(index: int) -> None:
            place = buffer.numpy()[int(offsets[index]):int(offsets[index + 1])]
            try:
                place[:] = np.frombuffer(self.read(index), dtype=np.uint8)
            except UNREADABLE:
                place[:] = 0  # which is no image: it counts as broken when its turn comes
            count = next(done)
            if show and (count == len(self) or (beginning and count % 1000 == 0)):
                print(f'{beginning}{self.place}: {count}/{len(self)} files in memory',
                      end='\n' if count == len(self) else '', file=sys.stderr, flush=True)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(fill, range(len(self))))
        self.archives.clear()
        self.buffer, self.offsets = buffer, offsets.tolist()

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = key
        try:
            image = Image.open(io.BytesIO(self.read(index))).convert('RGB')
        except UNREADABLE:
            return f'{self.place / self.names[index]}'
        if self.transform is EVAL_TRANSFORM:
            return self.transform(image), self.labels[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f'{self.seed} {epoch} {index}'.encode()))  # no GPU's
            return self.transform(image), self.labels[index]


def collate(items: list[tuple[Tensor, int] | str], full: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Images (batch, 3, h, w) uint8 and labels (batch,) of what could be decoded, and the names of the rest.

    full: good images of the batch take the places of broken ones, so that training's batches keep their size.
    """
    good = [item for item in items if not isinstance(item, str)]
    broken = [item for item in items if isinstance(item, str)]
    if full:
        good = (good * len(items))[:len(items)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return images, torch.tensor([label for _, label in good]), broken


class FileBatches:
    """Batches of an ImageFiles, decoded and transformed by worker processes, normalised on the device.

    Shuffled when it has a generator (then it yields (images, labels, weight) as TrainBatches does), else in order (then
    (images, labels)). An image that cannot be decoded is named in one warning and left out; UserError if more than 1 % are.
    """

    size = IMAGE_SIZE

    def __init__(self, files: ImageFiles, batch_size: int, device: torch.device, workers: int,
                 indices: Sequence[int] | None = None, generator: torch.Generator | None = None, rank: int = 0, world: int = 1):
        self.files, self.device, self.generator, self.rank, self.world = files, device, generator, rank, world
        self.indices, self.broken = torch.arange(len(files)) if indices is None else torch.as_tensor(indices), set()
        self.count = len(self.indices)
        self.bounds = training_bounds(self.count, batch_size, world) if generator else batch_bounds(self.count, batch_size)
        self.keys: list[list[tuple[int, int]]] = []  # what the loader reads in this epoch, batch by batch
        self.loader = torch.utils.data.DataLoader(
            files, batch_sampler=self.keys, num_workers=workers, collate_fn=partial(collate, full=generator is not None),
            pin_memory=device.type == 'cuda', persistent_workers=workers > 0,
            generator=torch.Generator())  # of its own: it would draw from dropout's
        self.mean, self.std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.bounds)

    def to_device(self, images: Tensor, labels: Tensor, broken: list[str]) -> tuple[Tensor, Tensor]:
        """Normalised images and labels on the device; warns of images that are broken."""
        for name in broken:
            if name not in self.broken:
                self.broken.add(name)
                print(f'warning: {name}: is broken or cut off; left out', file=sys.stderr, flush=True)
        if len(self.broken) > BROKEN_LIMIT * self.count:
            raise UserError(f'{self.files.place}: {len(self.broken)} of {self.count} images cannot be decoded, more than '
                            f'{BROKEN_LIMIT:.0%}; copy the data anew, or remove them')
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
        return channels_last(normalise(images, self.mean, self.std)), labels

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels at the positions `chosen` (batch,), in that order."""
        keys = [(0, index) for index in self.indices[chosen.cpu()].tolist()]
        with ThreadPoolExecutor() as pool:
            return self.to_device(*collate(list(pool.map(self.files.__getitem__, keys)), full=False))

    def __iter__(self) -> Iterator[tuple]:
        epoch, order = 0, self.indices
        if self.generator:
            epoch = int(torch.randint(2 ** 31, (), generator=self.generator, device=self.generator.device))
            order = order[torch.randperm(self.count, generator=self.generator, device=self.generator.device).cpu()]
        shares = [share_of(start, stop, self.rank, self.world) for start, stop in self.bounds]
        if not self.generator:
            shares = [(first, last) for first, last in shares if last > first]
        self.keys[:] = [[(epoch, index) for index in order[first:last].tolist()] for first, last in shares]
        for (start, stop), read in zip(self.bounds, self.loader, strict=False):
            images, labels = self.to_device(*read)
            if not self.generator:
                if len(labels):
                    yield images, labels
            elif len(labels):
                yield images, labels, len(labels) * self.world / (stop - start)
            else:
                raise UserError(f'{self.files.place}: all images of a batch are broken; copy the data anew, or remove them')


def open_files(root: str | Path, zipped: bool, lazy: bool, seed: int, processes: int = 1, show: bool = True,
               validates: bool = True) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """The training and the validation images below `root`, and the names of the classes. Raises UserError.

    zipped: read train.zip and valid.zip; lazy: do not hold the files in memory; processes: how many on this machine do;
    validates: False takes the training images for the validation too, and looks for no others.
    """
    train = find_images(Path(root), 'train', zipped)
    classes = sorted({name for _, name in train[1]})
    sets = [ImageFiles(*train, classes, TRAIN_TRANSFORM, seed)]
    if validates:
        sets.append(ImageFiles(*find_images(Path(root), 'valid', zipped), classes, EVAL_TRANSFORM, seed))
    for files in sets:
        if not lazy:
            files.hold(processes, show)
    return sets[0], sets[1] if validates else sets[0].evaluated(), classes
