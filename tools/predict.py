"""Say what is on images: the five most likely classes of each, by a trained network.

    python tools/predict.py --checkpoint exp/NAONet_A_36_cifar10/checkpoint_best.pt cat.png dog.jpg
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import runs
import torch
from torch import Tensor
from torchvision import transforms

import checkpoint
import class_folders
import datasets
import flags
import hubconf
import image_files
import utils

SMALL_TRANSFORM = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])
CLASS_NAMES = {
    'cifar10': ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'],
    'digits': [str(digit) for digit in range(10)],
}


def read_image(path: Path, imagenet: bool, dataset: str, images: dict[str, Any] | None) -> Tensor:
    """An image file as a batch (1, 3, size, size), scaled, cropped and normalised as in testing. Raises UserError.

    images: what the checkpoint says of the images that it was trained on, see datasets.ImageSet.info.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError('a pipe or the like')
        image = class_folders.decode(path.read_bytes())
    except class_folders.UNREADABLE as error:
        reason = getattr(error, 'strerror', None) or 'not an image'
        raise flags.UserError(f'{path}: cannot be read ({reason})') from None
    if imagenet:
        transform, statistics = image_files.middle, (image_files.IMAGENET_MEAN, image_files.IMAGENET_STD)
    elif datasets.SOURCES[dataset].mean is None:  # measured on the training images
        transform = partial(class_folders.resize, height=images['size'], width=images['size'])
        statistics = (images['mean'], images['std'])
    else:
        transform, source = SMALL_TRANSFORM, datasets.SOURCES[dataset]
        statistics = (source.mean, source.std)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in statistics)
    return datasets.normalise(transform(image).unsqueeze(0), mean, std)


def class_names(state: dict[str, Any], dataset: str, count: int) -> list[str]:
    """The names of a checkpoint's classes, or 'class 0', 'class 1', … where they are not known."""
    names = state.get('classes') or CLASS_NAMES.get(dataset, [])
    return names if len(names) == count else [f'class {index}' for index in range(count)]


def parse_args() -> argparse.Namespace:
    """The program's flags."""
    parser = flags.Parser('The five most likely classes of images.', 'IMAGE ...')
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=Path, help='image files')
    parser.add_argument('--checkpoint', metavar='PATH', required=True, help='checkpoint of a trained network')
    parser.add_argument('--arch', metavar='ARCH', help='its architecture, for a checkpoint that does not name it')
    parser.add_argument('--device', metavar='NAME', default='cpu', help='cpu, cuda, cuda:N or mps')
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Print the classes of each image, most likely first."""
    args = parse_args()
    network = hubconf.naonet(args.arch, args.checkpoint).eval().to(utils.choose_device(args.device))
    state = checkpoint.load(args.checkpoint)
    imagenet = hasattr(network, 'stem0')
    dataset = 'imagenet' if imagenet else state['args'].get('dataset') or 'cifar10'
    if not imagenet and datasets.SOURCES[dataset].mean is None and not isinstance(state.get('images'), dict):
        raise flags.UserError(f'{args.checkpoint}: has no "images", which says how the images it was trained on were scaled')
    names = class_names(state, dataset, network.classes)

    def show(path: Path) -> None:
        logits, _ = network(read_image(path, imagenet, dataset, state.get('images')).to(args.device))
        likely = logits.softmax(1)[0].topk(min(5, network.classes))
        print(path)
        for probability, index in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
            print(f'  {100 * probability:6.2f} %  {names[index]}')
    mistakes: list[str] = []
    for path in args.images:
        runs.succeeds(mistakes, partial(show, path))
    runs.name_mistakes(mistakes)


if __name__ == '__main__':
    runs.run_tool(main)
