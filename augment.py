"""Colour jitter and mirroring of photographs: a whole batch at once on its device, each image by its own parameters."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import transforms

SCALE, RATIO = (.08, 1.), (3 / 4, 4 / 3)  # of a random crop: its share of the image, its width by its height
STRENGTHS = ((.6, 1.4), (.6, 1.4), (.6, 1.4), (-.2, .2))  # of brightness, contrast, saturation and hue
CPU_IMAGES = 2  # that a CPU adjusts at once: its cache holds no more
GREY = (.2989, .587, .114)  # what red, green and blue add to a grey pixel


class PhotoDraws(NamedTuple):
    """The random numbers of an image's augmentation; with `jitter` and `mirrored` stacked, those of a batch."""

    box: tuple[int, int, int, int]  # of the crop: top, left, height, width
    mirrored: Tensor  # () bool
    factors: Tensor  # (4,) of brightness, contrast, saturation and hue
    order: Tensor  # (4,) which of them comes first, second, ...


def draw(image: Tensor) -> PhotoDraws:
    """Draw for an image (3, h, w) from PyTorch's default generator what torchvision's transforms of these names would."""
    box = transforms.RandomResizedCrop.get_params(image, SCALE, RATIO)
    mirrored = torch.rand(()) < 0.5
    order, *factors = transforms.ColorJitter.get_params(*STRENGTHS)
    return PhotoDraws(box, mirrored, torch.tensor(factors), order)


def grey(images: Tensor) -> Tensor:
    """(batch, 3, h, w) -> (batch, 1, h, w)."""
    red, green, blue = images.split(1, dim=1)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images nearer to black, or further from it."""
    return (images * factor).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Images nearer to their mean grey, or further from it."""
    return torch.lerp(grey(images).mean((1, 2, 3), keepdim=True), images, factor).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Images nearer to their grey selves, or further from them."""
    return torch.lerp(grey(images), images, factor).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Images whose colours go round the colour circle by `shift` of it, -1/2 to 1/2; 0 red, 1/3 green, 2/3 blue."""
    red, green, blue = images.split(1, dim=1)
    largest, smallest = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    spread, is_red, is_green = largest - smallest, red == largest, green == largest
    angle = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green)).div_(6 * spread.clamp(min=1e-12))
    angle.add_(torch.where(is_red, 0, torch.where(is_green, 1 / 3, 2 / 3))).add_(shift + 1).frac_().mul_(6)
    shares = torch.cat([(angle - 3).abs_().sub_(1), 2 - (angle - 2).abs_(), 2 - (angle - 4).abs_()], dim=1).clamp_(0, 1)
    return shares.mul_(spread).add_(smallest)


ADJUSTMENTS = (brightness, contrast, saturation, hue)  # as torchvision's ColorJitter numbers them


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; on CUDA without waiting for it, where what is freed meanwhile was copied first."""
    return tensor.to(device, non_blocking=device.type == 'cuda')


def colour_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Images (batch, 3, h, w) of 0-1, changed in place in the order that is drawn for each; as torchvision's ColorJitter.

    factors and order: (batch, 4), see PhotoDraws, on the CPU: which images come together must not be asked of a GPU.
    """
    for step in order.unbind(1):
        for number, adjust in enumerate(ADJUSTMENTS):
            for rows in (step == number).nonzero()[:, 0].split(CPU_IMAGES if images.device.type == 'cpu' else len(images)):
                strengths, rows = send(factors[rows, number].reshape(-1, 1, 1, 1), images.device), send(rows, images.device)
                images[rows] = adjust(images[rows], strengths)
    return images


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Images (batch, 3, h, w) with those mirrored for which `mirrored` (batch,) says so."""
    return torch.where(send(mirrored, images.device)[:, None, None, None], images.flip(3), images)
