"""Images in, batches out.

CIFAR-10, CIFAR-100 and the embedded digits live whole, as one tensor of packed pixels, on the training device; crop,
flip, normalise and cutout are batched tensor operations there. Images of class folders or zips (ImageNet) are decoded and
transformed by worker processes. A batch is (images (batch, 3, h, w) float in channels-last layout, labels (batch,) int64).
"""

import contextlib
import copy
import io
import itertools
import math
import multiprocessing
import os
import shutil
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torchvision import transforms

from flags import COUNT, Parser, UserError, add

CROP_PADDING = 4  # pixels of zeros around an image before a random crop
DIGITS_FILE = Path(__file__).resolve().parent / 'data' / 'digits' / 'digits.npz'


@dataclass(frozen=True)
class ImageSet:
    """Images, packed (see `pack`) and padded by CROP_PADDING on every side, and their labels."""

    pixels: Tensor  # (count, h, w) int32
    labels: Tensor  # (count,) int64
    mean: Tensor  # (3, 1, 1), of pixels scaled to 0-1
    std: Tensor
    flip: bool  # whether an image's mirror image shows the same thing

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Height and width of an image, without the padding."""
        return self.pixels.shape[-1] - 2 * CROP_PADDING

    def select(self, indices: range) -> 'ImageSet':
        """The images with these consecutive indices, without copying them."""
        chosen = slice(indices.start, indices.stop)
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])


class Source(NamedTuple):
    """Where a data set comes from and what its images are like."""

    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    load: Callable[[Path, bool], tuple[np.ndarray, np.ndarray]]  # (root, train) -> uint8 (count, 3, h, w), labels


@contextlib.contextmanager
def _nothing_left_on_failure(root: Path) -> Iterator[None]:
    """Remove what was created at and below `root` (its parents too) if the body fails, and nothing else."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    before = set(root.rglob('*'))
    try:
        yield
    except BaseException:
        for path in (missing[-1:] or sorted(set(root.rglob('*')) - before, reverse=True)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _load_cifar(dataset: type[torchvision.datasets.CIFAR10]) -> Callable[[Path, bool], tuple[np.ndarray, np.ndarray]]:
    def load(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
        try:
            data = dataset(str(root), train=train)
        except RuntimeError:  # torchvision's word for missing or damaged files
            data = None
        try:
            if data is None:
                with _nothing_left_on_failure(root):
                    data = dataset(str(root), train=train, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise UserError(f'--data={root}: no intact {dataset.__name__} there and it cannot be downloaded ({error}); '
                            f'unpack {dataset.filename} to {root / dataset.base_folder}, or use --dataset=digits, which '
                            'needs no download') from None
        return data.data.transpose(0, 3, 1, 2), np.asarray(data.targets)
    return load


def _load_digits(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Every fifth image tests (360), the others train (1,437); 8×8 pixels of 0-16 become 3×32×32 of 0-255."""
    with np.load(DIGITS_FILE) as file:
        images, labels = file['images'], file['labels']
    chosen = (np.arange(len(labels)) % 5 != 0) == train
    small = torch.from_numpy(images[chosen]).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(small, scale_factor=4, mode='bilinear').round().to(torch.uint8)
    return large.expand(-1, 3, -1, -1).numpy(), labels[chosen]


CIFAR_MEAN, CIFAR_STD = (.49139968, .48215827, .44653124), (.24703233, .24348505, .26158768)

SOURCES: dict[str, Source] = {
    'cifar10': Source(10, CIFAR_MEAN, CIFAR_STD, True, _load_cifar(torchvision.datasets.CIFAR10)),
    'cifar100': Source(100, CIFAR_MEAN, CIFAR_STD, True, _load_cifar(torchvision.datasets.CIFAR100)),
    'digits': Source(10, (.305, .305, .305), (.324, .324, .324), False, _load_digits),
}


def load(dataset: str, root: str | Path, train: bool, device: torch.device) -> ImageSet:
    """Read the training or the test images of 'cifar10', 'cifar100' or 'digits' onto the device.

    Missing files are downloaded to `root`. Raises UserError when they are missing or damaged and no download is possible.
    """
    source = SOURCES[dataset]
    images, labels = source.load(Path(root), train)
    pixels = F.pad(pack(torch.from_numpy(images)), [CROP_PADDING] * 4)

    def channels(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=device).reshape(3, 1, 1)
    return ImageSet(pixels.to(device), torch.from_numpy(labels).long().to(device), channels(source.mean),
                    channels(source.std), source.flip)


def pack(images: Tensor) -> Tensor:
    """uint8 images (count, 3, h, w) -> (count, h, w) int32, red + 256·green + 65536·blue: a pixel is moved as one number."""
    red, green, blue = images.unbind(1)
    return blue.to(torch.int32).mul_(256).add_(green).mul_(256).add_(red)


def unpack(pixels: Tensor) -> Tensor:
    """Packed images (batch, h, w) -> (batch, 3, h, w) int32 of 0-255."""
    return (pixels.unsqueeze(1) >> torch.arange(0, 24, 8, dtype=torch.int32, device=pixels.device).reshape(3, 1, 1)) & 255


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (batch, 3, h, w) of integers 0-255 -> float, (pixel / 255 - mean) / std per channel."""
    return images.to(mean.dtype).mul_(1 / (255 * std)).sub_(mean / std)


def channels_last(images: Tensor) -> Tensor:
    """The same images in the layout in which convolutions are fast."""
    return images.contiguous(memory_format=torch.channels_last)


class Draws(NamedTuple):
    """The random numbers of a batch's augmentation, each (batch,): window, mirroring and centre of the hole."""

    top: Tensor
    left: Tensor
    mirrored: Tensor
    hole_y: Tensor
    hole_x: Tensor

    def part(self, first: int, last: int) -> 'Draws':
        """The draws of the images first..last-1."""
        return Draws(*(draw[first:last] for draw in self))


def draw_augmentation(batch: int, size: int, generator: torch.Generator) -> Draws:
    """Draw for `batch` images of size×size pixels: uniform windows and holes, mirrored with probability 1/2."""
    places = 2 * CROP_PADDING + 1
    draws = torch.rand((5, batch), generator=generator, device=generator.device)
    return Draws(*((row * limit).long() for row, limit in zip(draws, (places, places, 2, size, size), strict=True)))


def crop_and_flip(padded: Tensor, chosen: Tensor, size: int, draws: Draws, flip: bool) -> Tensor:
    """A size×size window of each chosen image, mirrored where drawn if `flip`: packed, (batch, size, size).

    padded: packed, (count, h, w); chosen: (batch,) indices. As torchvision's RandomCrop with padding and
    RandomHorizontalFlip.
    """
    images = padded.unfold(1, size, 1).unfold(2, size, 1)[chosen, draws.top, draws.left]
    return torch.where(draws.mirrored.bool()[:, None, None], images.flip(2), images) if flip else images


def cutout(images: Tensor, size: int, draws: Draws) -> Tensor:
    """Zero a size×size square around the drawn pixel of each image, clipped at the border (arXiv:1708.04552)."""
    def inside(length: int, centre: Tensor) -> Tensor:
        pixels = torch.arange(length, device=images.device) - centre.unsqueeze(1)
        return (pixels >= -(size // 2)) & (pixels < size - size // 2)
    rows, columns = inside(images.shape[2], draws.hole_y), inside(images.shape[3], draws.hole_x)
    kept = 1 - rows[:, None, :, None].to(images.dtype) * columns[:, None, None, :].to(images.dtype)
    return images * kept  # faster than to fill it where a mask says so


def batch_bounds(count: int, batch_size: int, least: int = 2) -> list[tuple[int, int]]:
    """(start, stop) of the batches that `count` images make; a last one of fewer than `least` shares with its neighbour,
    or joins it where two of `least` cannot be made.

    Batch-norm cannot train on a single image, and every process needs some.
    """
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] < least:
        images = count - starts[-2]
        starts[-1:] = [starts[-2] + (images + 1) // 2] if images >= 2 * least else []
    return list(zip(starts, [*starts[1:], count], strict=True))


def check_batch_size(batch_size: int, world: int) -> None:
    """Raise UserError if a batch cannot give each of `world` processes two images."""
    if batch_size < 2 * world:
        raise UserError(f'a batch of {batch_size} images is too small for {world} process{"es" if world > 1 else ""}: it needs '
                        f'at least {2 * world}')


def share_of(start: int, stop: int, rank: int, world: int) -> tuple[int, int]:
    """The part of a batch that process `rank` of `world` takes."""
    return start + (stop - start) * rank // world, start + (stop - start) * (rank + 1) // world


class TrainBatches:
    """An epoch of shuffled, augmented batches at each iteration; `len` is its number of steps.

    Yields (images, labels, weight); weight is what the batch's mean loss counts, 1.0 with one process. `batch_size` is
    that of all processes together; order and augmentation come from `generator`, equal on all of them.
    """

    def __init__(self, data: ImageSet, batch_size: int, generator: torch.Generator, cutout_size: int = 0, rank: int = 0,
                 world: int = 1):
        self.data, self.generator, self.cutout_size = data, generator, cutout_size
        self.rank, self.world = rank, world
        check_batch_size(batch_size, world)
        self.bounds = batch_bounds(len(data), batch_size, 2 * world)

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        data = self.data
        order = torch.randperm(len(data), generator=self.generator, device=data.labels.device)
        epoch = draw_augmentation(len(data), data.size, self.generator)
        for start, stop in self.bounds:
            first, last = share_of(start, stop, self.rank, self.world)
            chosen, draws = order[first:last], epoch.part(first, last)
            pixels = crop_and_flip(data.pixels, chosen, data.size, draws, data.flip)
            images = normalise(unpack(pixels), data.mean, data.std)
            if self.cutout_size:
                images = cutout(images, self.cutout_size, draws)
            yield channels_last(images), data.labels[chosen], (last - first) * self.world / (stop - start)


class EvalBatches:
    """The images once, in order and as they are: yields (images, labels), each process its share."""

    def __init__(self, data: ImageSet, batch_size: int, rank: int = 0, world: int = 1):
        self.data, self.rank, self.world = data, rank, world
        self.count, self.size = len(data), data.size
        self.bounds = batch_bounds(self.count, batch_size, least=1)

    def __len__(self) -> int:
        return len(self.bounds)

    def batch(self, chosen: 'slice | Tensor') -> tuple[Tensor, Tensor]:
        """The images and labels at a slice or tensor of indices."""
        inner = slice(CROP_PADDING, -CROP_PADDING)
        images = unpack(self.data.pixels[chosen][:, inner, inner])
        return channels_last(normalise(images, self.data.mean, self.data.std)), self.data.labels[chosen]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop in self.bounds:
            mine = slice(*share_of(start, stop, self.rank, self.world))
            if mine.stop > mine.start:
                yield self.batch(mine)


# ------------------------------------------------------------------------------------------- images in files (ImageNet)

IMAGENET_MEAN, IMAGENET_STD = (.485, .456, .406), (.229, .224, .225)
IMAGE_SIZE = 224  # pixels of a side, after the transforms
BROKEN_LIMIT = 0.01  # the share of a set's images that may be unreadable
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile,
              Image.DecompressionBombError)  # what Pillow and zipfile raise for broken files

TRAIN_TRANSFORM = transforms.Compose([
    transforms.RandomResizedCrop(IMAGE_SIZE), transforms.RandomHorizontalFlip(), transforms.ColorJitter(.4, .4, .4, .2),
    transforms.PILToTensor()])
EVAL_TRANSFORM = transforms.Compose([
    transforms.Resize(256), transforms.CenterCrop(IMAGE_SIZE), transforms.PILToTensor()])


def find_images(root: Path, part: str, zipped: bool) -> tuple[Path, list[tuple[str, str]]]:
    """The folder or zip of 'train' or 'valid' (also named val), and its images as sorted (name in it, class) pairs.

    An image's class is the folder that it lies in. Raises UserError.
    """
    names = ('valid', 'val') if part == 'valid' else (part,)
    places = [root / (f'{name}.zip' if zipped else name) for name in names]
    place = next((place for place in places if os.path.exists(place)), None)
    if place is None:
        kind = 'a zip' if zipped else 'a folder'
        raise UserError(f'--data={root}: there is no {" or ".join(place.name for place in places)}; {kind} of images in '
                        'class folders is needed there')
    if zipped:
        try:
            with zipfile.ZipFile(place) as archive:
                files = archive.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f'{place}: is not a readable zip file ({error}); copy it anew, or drop --zip_file for folders'
                            ) from None
    else:
        files = [os.path.relpath(os.path.join(folder, name), place)
                 for folder, _, found in os.walk(place, followlinks=True) for name in found]
    images = sorted((name, Path(name).parent.name) for name in files
                    if name.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS) and Path(name).parent.name
                    and not any(folder.startswith(('.', '__MACOSX')) for folder in Path(name).parts))  # what systems add
    if not images:
        raise UserError(f'{place}: has no images in class folders, such as n01440764/name.JPEG')
    return place, images


def available_memory() -> float:
    """The bytes of memory that a process can still take; infinite where the system does not tell."""
    try:
        free = next(int(line.split()[1]) * 1024 for line in Path('/proc/meminfo').read_text().splitlines()
                    if line.startswith('MemAvailable'))
        limit, used = (Path('/sys/fs/cgroup') / name for name in ('memory.max', 'memory.current'))
        if limit.exists() and limit.read_text().strip() != 'max':
            statistics = dict(line.split() for line in limit.with_name('memory.stat').read_text().splitlines())
            cached = int(statistics['inactive_file'])  # files read before; the system gives their memory back
            free = min(free, int(limit.read_text()) - int(used.read_text()) + cached)
        return free
    except (OSError, StopIteration, ValueError, KeyError):
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


def collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    """Images (batch, 3, h, w) uint8 and labels (batch,) of what could be decoded, and the names of the rest."""
    broken = [item for item in items if isinstance(item, str)]
    good = [item for item in items if not isinstance(item, str)]
    if not good:
        return torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8), torch.empty(0, dtype=torch.long), broken
    return torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good]), broken


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
        if generator:
            check_batch_size(batch_size, world)
        self.bounds = batch_bounds(self.count, batch_size, 2 * world if generator else 1)
        self.keys: list[list[tuple[int, int]]] = []  # what the loader reads in this epoch, batch by batch
        self.loader = torch.utils.data.DataLoader(
            files, batch_sampler=self.keys, num_workers=workers, collate_fn=collate, pin_memory=device.type == 'cuda',
            persistent_workers=workers > 0, generator=torch.Generator())  # of its own: it would draw from dropout's
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
            return self.to_device(*collate(list(pool.map(self.files.__getitem__, keys))))

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
            good = len(labels)
            if self.generator:
                if good < 2:  # batch-norm cannot train on less: a lone image counts once, none counts nothing
                    images = images.repeat(2, 1, 1, 1) if good else images.new_zeros(2, *images.shape[1:])
                    labels = labels.repeat(2) if good else labels.new_zeros(2)
                yield images, labels, good * self.world / (stop - start)
            elif good:
                yield images, labels


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


def add_file_flags(parser: Parser, processes: int) -> None:
    """The flags of reading images from files; `processes`: how many of the run share this machine."""
    group = parser.add_argument_group('image files')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    add(group, 'zip_file', 'read train.zip and valid.zip instead of folders', False, action='store_true')
    add(group, 'lazy_load', 'read images when they are needed, not into memory first', False, action='store_true')
    add(group, 'workers', 'processes that decode images; by default the cores, which the processes of a machine share',
        max(1, cores // processes), type=COUNT)
