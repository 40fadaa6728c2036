"""Small images in, batches out.

CIFAR-10, CIFAR-100, the embedded digits and folders of small images live whole, as one tensor of packed pixels, on the
training device; crop, flip, normalise and cutout are batched tensor operations there. A batch is (images (batch, 3, h, w)
float, labels (batch,) int64).
"""

import argparse
import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import flags
from class_folders import UNREADABLE, Broken, Files, available_memory, decode, find_images, for_each, label, resize
from flags import UserError

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
    classes: Sequence[str] = ()  # their names

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Height and width of an image, without the padding."""
        return self.pixels.shape[-1] - 2 * CROP_PADDING

    @property
    def info(self) -> dict[str, Any]:
        """What test images must have in common with these, in plain values for a checkpoint; see `load`."""
        return {'classes': list(self.classes), 'size': self.size, 'mean': self.mean.flatten().tolist(),
                'std': self.std.flatten().tolist()}

    def select(self, indices: 'range | Tensor') -> 'ImageSet':
        """The images with these indices; a range of them without copying them."""
        chosen = slice(indices.start, indices.stop) if isinstance(indices, range) else indices.to(self.labels.device)
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])


def draw_balanced(labels: 'Tensor | list[int]', count: int, seed: int) -> Tensor:
    """Indices (count,) of images drawn by the seed: one of each class, a second of each, and so on while there are any.

    In ascending order. Raises UserError if there are fewer.
    """
    labels = torch.as_tensor(labels).cpu()
    if count > len(labels):
        raise UserError(f'{count} images cannot be drawn from {len(labels)}')
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = labels[order].argsort(stable=True)
    sizes = labels.bincount()
    turn = torch.empty_like(order)  # how many of its class come before an image
    turn[by_class] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return order[turn.argsort(stable=True)[:count]].sort().values


def shuffled_split(count: int, first: int, seed: int) -> tuple[Tensor, Tensor]:
    """The indices 0..count-1, shuffled by the seed: the first `first` of them, and the others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:first], order[first:]


class Folder(NamedTuple):
    """How a folder of images is read."""

    zipped: bool = False  # train.zip and the like instead of folders
    size: int = 32  # pixels of a side of the squares that images are resized to
    classes: list[str] | None = None  # those of the training images
    show: bool = False  # whether to print warnings and progress


class Raw(NamedTuple):
    """A data set as it is read."""

    images: np.ndarray  # (count, 3, h, w) uint8
    labels: Sequence[int]
    classes: list[str]


def _load_cifar(dataset: type[torchvision.datasets.CIFAR10]) -> Callable[[Path, bool, Folder], Raw]:
    def load(root: Path, train: bool, _: Folder) -> Raw:
        missing = [folder for folder in (root / dataset.base_folder, root, *root.parents) if not folder.exists()]
        try:
            with contextlib.suppress(RuntimeError):  # torchvision's word for missing or damaged files
                return read(dataset(str(root), train=train))
            return read(dataset(str(root), train=train, download=True))  # again, if an earlier one was cut off
        except (OSError, RuntimeError, EOFError) as error:
            raise UserError(f'--data={root}: no intact {dataset.__name__} there and it cannot be downloaded ({error}); '
                            f'unpack {dataset.filename} to {root / dataset.base_folder}, or use --dataset=digits, which '
                            'needs no download') from None
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):  # it holds something now, or was never made
                    folder.rmdir()

    def read(data: torchvision.datasets.CIFAR10) -> Raw:
        return Raw(data.data.transpose(0, 3, 1, 2), data.targets, data.classes)
    return load


def _load_digits(root: Path, train: bool, _: Folder) -> Raw:
    """Every fifth image tests (360), the others train (1,437); 8×8 pixels of 0-16 become 3×32×32 of 0-255."""
    with np.load(DIGITS_FILE) as file:
        images, labels = file['images'], file['labels']
    chosen = (np.arange(len(labels)) % 5 != 0) == train
    small = torch.from_numpy(images[chosen]).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(small, scale_factor=4, mode='bilinear').round().to(torch.uint8)
    return Raw(large.expand(-1, 3, -1, -1).numpy(), labels[chosen].tolist(), [str(digit) for digit in range(10)])


def _load_folder(root: Path, train: bool, folder: Folder) -> Raw:
    """Images of class folders or a zip, each resized to a square; what cannot be decoded is named and left out."""
    if not train and not folder.classes:
        raise ValueError("a folder's test images are read with the `info` of its training images")
    place, found = find_images(root, ('train',) if train else ('valid', 'val', 'test'), folder.zipped, folder.show)
    classes = folder.classes or sorted({name for _, name in found})
    labels, files, broken = label(place, found, classes, folder.show), Files(place), {}
    needed = len(found) * (7 * folder.size ** 2 + 4 * (folder.size + 2 * CROP_PADDING) ** 2)
    free = available_memory() / int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # each process has its own copy
    if needed > free:
        raise UserError(f'{place}: {len(found)} images of {folder.size}×{folder.size} pixels need {needed / 2**30:.1f} GiB of '
                        f'memory, of which {free / 2**30:.1f} are free; a smaller --image_size may do')
    images = np.empty((len(found), 3, folder.size, folder.size), dtype=np.uint8)

    def fill(index: int) -> None:
        try:
            images[index] = resize(decode(files.read(found[index][0])), folder.size, folder.size).numpy()
        except UNREADABLE:
            broken[index] = found[index][0]
    for_each(len(found), fill, os.cpu_count(), str(place), folder.show)
    if broken:
        Broken(place, len(found), folder.show).add([broken[index] for index in sorted(broken)])
        kept = [index for index in range(len(found)) if index not in broken]
        images, labels = images[kept], [labels[index] for index in kept]
    return Raw(images, labels, classes)


class Source(NamedTuple):
    """Where a data set comes from, and what its images are like."""

    load: Callable[[Path, bool, Folder], Raw]  # (root, train, how to read a folder)
    flip: bool = True
    mean: Sequence[float] | None = None  # None: measured
    std: Sequence[float] | None = None


CIFAR_MEAN, CIFAR_STD = (.49139968, .48215827, .44653124), (.24703233, .24348505, .26158768)

SOURCES: dict[str, Source] = {
    'cifar10': Source(_load_cifar(torchvision.datasets.CIFAR10), True, CIFAR_MEAN, CIFAR_STD),
    'cifar100': Source(_load_cifar(torchvision.datasets.CIFAR100), True, CIFAR_MEAN, CIFAR_STD),
    'digits': Source(_load_digits, False, (.305, .305, .305), (.324, .324, .324)),
    'folder': Source(_load_folder),
}


def measure(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of images (count, 3, h, w) uint8, scaled to 0-1."""
    counts = sum(np.stack([np.bincount(channel.ravel(), minlength=256) for channel in part.swapaxes(0, 1)])
                 for part in np.array_split(images, len(images) // 1000 + 1))
    shares, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    variance = shares @ values ** 2 - mean ** 2
    return mean.tolist(), np.sqrt(variance.clip(1e-6)).tolist()  # not 0, by which nothing can be divided


def fingerprint(labels: Tensor | Sequence[int], classes: Sequence[str]) -> int:
    """A number that images of another number or of other classes do not have: a split of them would be another."""
    return zlib.crc32(torch.as_tensor(labels).long().cpu().numpy().tobytes() + repr(list(classes)).encode())


def load(dataset: str, root: str | Path, train: bool, device: torch.device, folder: Folder | None = None,
         flip: bool = True, info: dict[str, Any] | None = None) -> ImageSet:
    """Read the training or the test images of one of SOURCES onto the device.

    CIFAR's missing files are downloaded to `root`; 'folder' is read as `folder` says. flip: False never mirrors. info: the
    training images' `ImageSet.info`, for the test images of a folder: its classes, size, mean and deviation are theirs.
    Raises UserError when files are missing or damaged.
    """
    source, folder = SOURCES[dataset], folder or Folder()
    if info:
        folder = folder._replace(classes=info['classes'], size=info['size'])
    images, labels, classes = source.load(Path(root), train, folder)
    statistics = (source.mean, source.std) if source.mean else (info['mean'], info['std']) if info else measure(images)
    mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in statistics)
    pixels = F.pad(pack(torch.from_numpy(images)), [CROP_PADDING] * 4)
    return ImageSet(pixels.to(device), torch.as_tensor(labels).to(device), mean, std, flip and source.flip, classes)


def add_flags(parser: flags.Parser, others: Sequence[str] = ()) -> None:
    """The flags of small images. others: data sets that a program has besides SOURCES."""
    group = parser.add_argument_group('images')
    flags.add(group, 'dataset', 'which images; folder: small ones in class folders, see --data'
              + '; imagenet: any size, read from files as they are needed' * ('imagenet' in others), 'cifar10',
              choices=[*SOURCES, *others])
    flags.add(group, 'image_size', 'folder: side of the squares that images are resized to', 32, type=flags.POSITIVE_INT)
    flags.add(group, 'flip', 'mirror half of the training images, unless they are digits', True,
              action=argparse.BooleanOptionalAction)


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


def draw_augmentation(batch: int, size: int, generator: torch.Generator, device: torch.device) -> Draws:
    """Draw for `batch` images of size×size pixels: uniform windows and holes, mirrored with probability 1/2.

    Drawn on the CPU, as all machines and devices draw alike there, and sent to the device at once.
    """
    places = 2 * CROP_PADDING + 1
    draws = torch.rand((5, batch), generator=generator).to(device)
    return Draws(*((row * limit).long() for row, limit in zip(draws, (places, places, 2, size, size), strict=True)))


def crop_and_flip(padded: Tensor, chosen: Tensor, size: int, draws: Draws, flip: bool) -> Tensor:
    """A size×size window of each chosen image, mirrored where drawn if `flip`: packed, (batch, size, size).

    padded: packed, (count, h, w); chosen: (batch,) indices. As torchvision's RandomCrop with padding and
    RandomHorizontalFlip.
    """
    images = padded.unfold(1, size, 1).unfold(2, size, 1)[chosen, draws.top, draws.left]
    return torch.where(draws.mirrored.bool()[:, None, None], images.flip(2), images) if flip else images


def cutout(images: Tensor, size: int, draws: Draws) -> Tensor:
    """Zero the square from size // 2 pixels before the drawn one to size // 2 after it, exclusive, clipped at the border.

    arXiv:1708.04552; an odd size zeroes as much as the even one below it, as in the reference.
    """
    def inside(length: int, centre: Tensor) -> Tensor:
        pixels = torch.arange(length, device=images.device) - centre.unsqueeze(1)
        return (pixels >= -(size // 2)) & (pixels < size // 2)
    rows, columns = inside(images.shape[2], draws.hole_y), inside(images.shape[3], draws.hole_x)
    kept = 1 - rows[:, None, :, None].to(images.dtype) * columns[:, None, None, :].to(images.dtype)
    return images * kept  # faster than to fill it where a mask says so


def batch_bounds(count: int, batch_size: int, least: int = 1) -> list[tuple[int, int]]:
    """(start, stop) of the batches that `count` images make; a rest of fewer than `least` joins the last one."""
    starts = range(0, count - least + 1, batch_size)
    return list(zip(starts, [*starts[1:], count], strict=True))


def training_bounds(count: int, batch_size: int, world: int) -> list[tuple[int, int]]:
    """The `batch_bounds` of training, where every one of `world` processes needs two images: batch-norm takes no fewer.

    Raises UserError where a batch has not so many.
    """
    batch_size, least = min(count, batch_size), 2 * world
    if batch_size < least:
        raise UserError(f'a batch of {batch_size} images is too small for {world} process{"es" if world > 1 else ""}: it needs '
                        f'at least {least}')
    return batch_bounds(count, batch_size, least)


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
        self.count, self.size, self.classes = len(data), data.size, data.classes
        self.bounds = training_bounds(self.count, batch_size, world)

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        data = self.data
        order = torch.randperm(len(data), generator=self.generator).to(data.labels.device)
        epoch = draw_augmentation(len(data), data.size, self.generator, data.labels.device)
        for start, stop in self.bounds:
            first, last = share_of(start, stop, self.rank, self.world)
            chosen, draws = order[first:last], epoch.part(first, last)
            pixels = crop_and_flip(data.pixels, chosen, data.size, draws, data.flip)
            images = normalise(unpack(pixels), data.mean, data.std)
            if self.cutout_size:
                images = cutout(images, self.cutout_size, draws)
            yield images, data.labels[chosen], (last - first) * self.world / (stop - start)


class EvalBatches:
    """The images once, in order and as they are: yields (images, labels), each process its share."""

    def __init__(self, data: ImageSet, batch_size: int, rank: int = 0, world: int = 1):
        self.data, self.rank, self.world = data, rank, world
        self.count, self.size, self.classes = len(data), data.size, data.classes
        self.bounds = batch_bounds(self.count, batch_size)

    def __len__(self) -> int:
        return len(self.bounds)

    def batch(self, chosen: 'slice | Tensor') -> tuple[Tensor, Tensor]:
        """The images and labels at a slice or tensor of indices."""
        inner = slice(CROP_PADDING, -CROP_PADDING)
        images = unpack(self.data.pixels[chosen][:, inner, inner])
        return normalise(images, self.data.mean, self.data.std), self.data.labels[chosen]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop in self.bounds:
            mine = slice(*share_of(start, stop, self.rank, self.world))
            if mine.stop > mine.start:
                yield self.batch(mine)
