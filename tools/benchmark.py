"""Measure what the programs cost: one table of seconds, rates, machine-normalised cost and peak memory.

    python tools/benchmark.py                                  # all rows
    python tools/benchmark.py --only score --json now.json     # one row, kept in a file
    python tools/benchmark.py --compare before.json            # with ratios to an earlier file
    python tools/benchmark.py --growth                         # how costs grow with pool, architectures and channels
    python tools/benchmark.py --device cuda                    # networks on a GPU, in both layouts and three precisions
    python tools/benchmark.py --launches                       # what a step sends to a GPU, counted without one

The normalised cost is seconds × the GFLOP/s of a 2048×2048 float32 matrix product measured right before and after, so that
numbers from noisy or different machines can be compared. Each row runs in a process of its own.
"""

import argparse
import io
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

import architecture
import controller
import datasets
import flags
import image_files
import kernels
import operations
import training
import utils
from model import NASNetworkCIFAR, NASNetworkImageNet
from model_search import NASWSNetworkCIFAR
from train_search import score_pool

VOCABULARY = architecture.vocabulary(5, 'small')
GLIBC_TUNABLES = 'glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184'
SAMPLED = 12  # random architectures that a supernet's row is the mean of
PRECISIONS = {'float32': {'tf32': False}, 'tf32': {'tf32': True}, 'bf16': {'amp': 'bf16'}}  # name -> flags


def measure_gflops() -> float:
    """GFLOP/s of a 2048×2048 float32 matrix product on all threads, the best of several."""
    a, b = torch.randn(2, 2048, 2048)
    torch.mm(a, b)

    def once() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        return 2 * 2048 ** 3 / (time.perf_counter() - start) / 1e9
    return max(once() for _ in range(5))


def seconds_of(function: Callable[[], None], repeats: int) -> float:
    """Median seconds of a call that waits for its results, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_run(**flags: object) -> utils.Run:
    """A run, on the CPU unless flags say otherwise, that writes nothing."""
    defaults = {'device': 'cpu', 'output_dir': '.', 'seed': 0, 'amp': 'off', 'tf32': None, 'layout': 'auto', 'compile': False}
    return utils.Run(SimpleNamespace(**defaults | flags))


def make_images(count: int, size: int = 32) -> datasets.ImageSet:
    """Random images, of CIFAR's size if no other is asked for."""
    generator = torch.Generator().manual_seed(0)
    size += 2 * datasets.CROP_PADDING
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (datasets.CIFAR_MEAN, datasets.CIFAR_STD))
    return datasets.ImageSet(torch.randint(0, 1 << 24, (count, size, size), dtype=torch.int32, generator=generator),
                             torch.randint(0, 10, (count,), generator=generator), mean, std, flip=True)


def training_step(run: utils.Run, model: torch.nn.Module, batch: int, size: int = 32) -> Callable[..., None]:
    """A function (further arguments of the model, how many) that makes steps of the training loop with random images."""
    draws = torch.Generator().manual_seed(0)
    images, labels, _ = next(iter(datasets.TrainBatches(make_images(batch, size), batch, draws, cutout_size=16)))
    images, labels = images.to(run.device), labels.to(run.device)
    optimizer = training.sgd(run, model, 3e-4)
    model.train()

    def steps(*extras: object, count: int = 1) -> None:
        training.train_epoch(run, lambda images, step: model(images, *extras, step), optimizer, [(images, labels, 1.0)] * count,
                             title='', lr=0.025, step=100, clock=training.Clock(0, 1), grad_bound=5.0)
    return steps


def naonet_step(name: str) -> Callable[[int], tuple[float, float]]:
    """The row of a found architecture's training step: 36 channels, batch 32."""
    def row(repeats: int) -> tuple[float, float]:
        run = make_run()
        seconds = seconds_of(training_step(run, make_naonet(run, name), 32), repeats)
        return seconds, 32 / seconds
    return row


def make_naonet(run: utils.Run, name: str) -> NASNetworkCIFAR:
    """A found architecture's network of the published size for CIFAR."""
    return run.place(NASNetworkCIFAR(10, 6, 5, 36, 0.6, 0.8, True, 1000, architecture.PUBLISHED[name]))


def make_imagenet(run: utils.Run) -> NASNetworkImageNet:
    """NAONet-A of the published size for ImageNet."""
    return run.place(NASNetworkImageNet(1000, 4, 5, 42, 1.0, 1.0, True, 1000, architecture.PUBLISHED['NAONet_A']))


def make_supernet(run: utils.Run, channels: int = 20) -> NASWSNetworkCIFAR:
    """The supernet of the search's sizes."""
    return run.place(NASWSNetworkCIFAR(10, 3, 5, channels, 1.0, 0.9, False, 1000))


def sample(count: int) -> list[architecture.Architecture]:
    """Random architectures of the small space, always the same."""
    return architecture.sample(count, 5, VOCABULARY.operations, torch.Generator().manual_seed(1))


def supernet_step(repeats: int, channels: int = 20) -> tuple[float, float]:
    """A training step of the supernet, batch 64, mean over random architectures."""
    run = make_run()
    step = training_step(run, make_supernet(run, channels), 64)
    seconds = statistics.mean(seconds_of(lambda arch=arch: step(arch), max(1, repeats // 3)) for arch in sample(SAMPLED))
    return seconds, 64 / seconds


def score(repeats: int, count: int = SAMPLED) -> tuple[float, float]:
    """Scoring one architecture on 500 images, mean over random architectures."""
    run = make_run()
    supernet, batches = make_supernet(run).eval(), datasets.EvalBatches(make_images(500), 500)
    images, labels = batches.batch(slice(0, 500))

    seconds = seconds_of(lambda: score_pool(run, supernet, sample(count), images, labels), max(1, repeats // 3)) / count
    return seconds, 1 / seconds


def make_sequences(count: int) -> torch.Tensor:
    """Random architectures as the controller's sequences."""
    return torch.tensor([VOCABULARY.encode(arch) for arch in sample(count)])


def controller_epoch(repeats: int, count: int = 600) -> tuple[float, float]:
    """One epoch of the controller's fit on 600 architectures, batch 100."""
    run, sequences = make_run(), make_sequences(count)
    nao = controller.NAO(VOCABULARY.allowed_tokens, VOCABULARY.size, 20)
    targets = controller.scale(torch.rand(count, generator=torch.Generator().manual_seed(2)).tolist())

    def fit(epochs: int) -> float:
        start = time.perf_counter()
        controller.fit(nao, sequences, targets, controller.Settings(epochs=epochs), run.generators['search'],
                       augment=architecture.swap_operands)
        return time.perf_counter() - start
    fit(1)
    epochs = 4 * repeats
    seconds = (fit(epochs + 1) - fit(1)) / epochs  # without the report at the end of a fit
    return seconds, count / seconds


def new_architectures(repeats: int) -> tuple[float, float]:
    """One λ of the ascent from 100 architectures."""
    nao = controller.NAO(VOCABULARY.allowed_tokens, VOCABULARY.size, 20)
    sequences = make_sequences(100)
    nao.eval()
    seconds = seconds_of(lambda: nao.generate_new_arch(sequences, 1.0), 4 * repeats)
    return seconds, 100 / seconds


def per_image_cutout(image: torch.Tensor) -> torch.Tensor:
    """Cutout of one image as the per-image transforms of other code do it."""
    y, x = np.random.randint(32, size=2)
    mask = np.ones((32, 32), np.float32)
    mask[max(0, y - 8):y + 8, max(0, x - 8):x + 8] = 0
    return image * torch.from_numpy(mask)


def cifar_batches(repeats: int) -> tuple[float, float, float]:
    """An epoch of 10,000 augmented images, batch 128; and the ratio of its rate to torchvision's per-image transforms."""
    run, data = make_run(), make_images(10_000)
    batches = datasets.TrainBatches(data, 128, run.generators['data'], cutout_size=16)

    def epoch() -> None:
        for _ in batches:
            pass
    seconds = seconds_of(epoch, repeats)
    transform = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(datasets.CIFAR_MEAN, datasets.CIFAR_STD), per_image_cutout])
    arrays = datasets.unpack(data.pixels[:1000, 4:-4, 4:-4]).permute(0, 2, 3, 1).to(torch.uint8).numpy()

    def per_image() -> None:
        for start in range(0, 1000, 128):
            torch.stack([transform(Image.fromarray(array)) for array in arrays[start:start + 128]])
    rate = len(data) / seconds
    return seconds, rate, rate * seconds_of(per_image, max(1, repeats // 3)) / 1000


def write_photos(folder: Path, count: int = 32) -> None:
    """Write JPEGs of ImageNet's usual size, 500×375 pixels in about 60-110 kB: soft colours under noise."""
    random = np.random.default_rng(0)
    for index in range(count):
        size = (500, 375) if index % 4 else (375, 500)
        soft = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noise = random.normal(0, 8 + 2 * (index % 4), (size[1], size[0], 3))
        pixels = (np.asarray(soft) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'{index}.JPEG', quality=90)


def image_batches(repeats: int, folder: str | None = None) -> tuple[float, float, float]:
    """What one worker process does for a batch of all images of a folder, or of ones made here, read from memory: decode,
    crop, resize. The ratio is that of its rate to the per-image transforms of other code, which also flip, change colours and
    normalise there; here the device does that for the whole batch. Both in turn, the ratio is the median of the rounds'.
    """
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            write_photos(Path(made))
        place = Path(folder or made)
        names = [path.name for path in sorted(place.iterdir()) if path.suffix.lower() in ('.jpg', '.jpeg')]
        if not names:
            raise flags.UserError(f'--images={folder}: has no JPEG files')
        files = image_files.ImageFiles(place, [(name, 'photo') for name in names], ['photo'], 0, trains=True)
        files.hold(show=False)
    transform = transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ColorJitter(.4, .4, .4, .2),
        transforms.ToTensor(), transforms.Normalize(image_files.IMAGENET_MEAN, image_files.IMAGENET_STD)])

    def worker(epoch: int) -> None:
        image_files.collate([files[epoch, index] for index in range(len(files))], full=True)

    def per_image(epoch: int) -> None:
        torch.stack([transform(Image.open(io.BytesIO(files.read(index))).convert('RGB')) for index in range(len(files))])
    rounds = []
    for epoch in range(max(3, repeats) + 1):
        times = [time.perf_counter()]
        for function in (worker, per_image):
            function(epoch)
            times.append(time.perf_counter())
        rounds.append((times[1] - times[0], times[2] - times[1]))
    seconds = statistics.median(mine for mine, _ in rounds[1:])  # the first warms up
    return seconds, len(files) / seconds, statistics.median(theirs / mine for mine, theirs in rounds[1:])


class Network(NamedTuple):
    """A network of the published size, whose training step is timed on a GPU, and whose launches are counted."""

    make: Callable[[utils.Run], torch.nn.Module]
    batch: int  # images of a step, as published
    size: int = 32  # of the images
    archs: int = 0  # random architectures of which a step takes one, if it is a supernet


NETWORKS = {
    'naonet_a_36_step': Network(lambda run: make_naonet(run, 'NAONet_A'), 128),
    'naonet_b_36_step': Network(lambda run: make_naonet(run, 'NAONet_B'), 128),
    'naonet_a_imagenet_step': Network(make_imagenet, 128, 224),
    'supernet_step': Network(make_supernet, 64, archs=SAMPLED),
}


def network_step(repeats: int, name: str, layout: str, precision: str, device: str = 'cuda', steps: int = 20
                 ) -> tuple[float, float]:
    """A training step of one of NETWORKS, mean of `steps` that follow on each other, and of a supernet's architectures."""
    network, run = NETWORKS[name], make_run(device=device, layout=layout, **PRECISIONS[precision])
    step = training_step(run, network.make(run), network.batch, network.size)
    extras = [(arch,) for arch in sample(network.archs)] or [()]
    seconds = statistics.mean(seconds_of(partial(step, *each, count=steps), repeats) for each in extras) / steps
    return seconds, network.batch / seconds


class Launches(TorchDispatchMode):
    """Counts operations that a GPU is sent: all but those that only reserve memory or look at it otherwise.

    A convolution's gradients are one for each; one for many tensors at once, such as the optimiser's, is one.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        looks = any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)
        if not looks and not re.search(r'aten::(new_)?empty|aten::detach|aten::_unsafe_view|aten::lift', function.name()):
            self.count += sum(args[-1]) if function.name() == 'aten::convolution_backward' else 1
        return function(*args, **kwargs or {})


def count_launches(name: str) -> list[int]:
    """How many operations a training step of one of NETWORKS sends to a GPU; of a supernet one number for each architecture.

    Counted on the CPU, on two images, with the operations of other devices.
    """
    network, run = NETWORKS[name], make_run(layout='contiguous')
    step = training_step(run, network.make(run), 2, network.size)

    def plain(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, weight, stride=stride)

    def count(steps: int, *extras: object) -> int:
        with (Launches() as launches, mock.patch.object(kernels, 'on_plain_cpu', lambda x: False),
              mock.patch.object(operations, 'pointwise_conv', plain)):
            step(*extras, count=steps)
        return launches.count
    return [count(2, *extras) - count(1, *extras)  # without what is read at an epoch's end
            for extras in [(arch,) for arch in sample(network.archs)] or [()]]


ROWS: dict[str, Callable[[int], tuple]] = {
    'naonet_a_36_step': naonet_step('NAONet_A'), 'naonet_b_36_step': naonet_step('NAONet_B'), 'supernet_step': supernet_step,
    'score': score, 'controller_epoch': controller_epoch, 'new_architectures': new_architectures,
    'cifar_batches': cifar_batches, 'image_batches': image_batches,
}

def score_whole_pool(count: int) -> tuple[float, float]:
    """Scoring a pool of architectures, of which every 50th is scored for real."""
    seconds, per_second = score(1, count // 50)
    return seconds * count, per_second


ON_GPU: dict[str, Callable[[int], tuple]] = {
    f'{name} {layout} {precision}': partial(network_step, name=name, layout=layout, precision=precision)
    for name in NETWORKS for layout in ('contiguous', 'channels_last') for precision in PRECISIONS}
POOLS = (100, 300, 600)
GROWTH: dict[str, Callable[[int], tuple]] = {
    **{f'scoring a pool of {count}': lambda repeats, count=count: score_whole_pool(count) for count in POOLS},
    **{f'controller epoch, {count} architectures': lambda repeats, count=count: controller_epoch(repeats, count)
       for count in POOLS},
    **{f'supernet step, {channels} channels': lambda repeats, channels=channels: supernet_step(1, channels)
       for channels in (10, 20, 40, 80)},
}


def print_searches(rows: list[dict]) -> None:
    """Print what a whole search on CIFAR-10 with train_search.py's defaults costs for each size of the pool.

    150 epochs of 704 steps, 5 scorings, 4 fits of 1000 epochs, and 5 trainings from scratch of 10 epochs, whose steps are
    taken to cost what the supernet's do. Writing the new architectures takes no time beside them.
    """
    seconds = {row['name']: row['seconds'] for row in rows}
    for count in POOLS:
        total = ((150 + 5 * 10) * math.ceil(45_000 / 64) * seconds['supernet step, 20 channels']
                 + 5 * seconds[f'scoring a pool of {count}'] + 4 * 1000 * seconds[f'controller epoch, {count} architectures'])
        print(f'a whole search with a pool of {count}: {total / 3600:.1f} hours')


def run_row(name: str, repeats: int) -> dict[str, float | str]:
    """Measure one row in this process."""
    if name in ON_GPU:
        seconds, per_second = ON_GPU[name](repeats)
        return {'name': name, 'seconds': seconds, 'per_second': per_second,
                'peak_mb': torch.cuda.max_memory_allocated() / 2 ** 20}
    before = measure_gflops()
    seconds, per_second, *ratio = (ROWS | GROWTH)[name](repeats)
    gflops = (before + measure_gflops()) / 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != 'darwin' else 1024 ** 2)
    row = {'name': name, 'seconds': seconds, 'per_second': per_second, 'normalised': seconds * gflops, 'peak_mb': peak,
           'gflops': gflops}
    return row | ({'ratio': ratio[0]} if ratio else {})


def run_in_own_process(name: str, repeats: int, images: str | None) -> dict[str, float | str]:
    """Measure one row in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, '--row', name, '--repeats', str(repeats), *([f'--images={images}'] if images else [])]
    environment = {'GLIBC_TUNABLES': GLIBC_TUNABLES} | os.environ  # as the scripts do
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def measure_on_cpu(names: list[str], args: argparse.Namespace, old: dict[str, dict]) -> dict:
    """Measure rows, print a line for each, and return what --json keeps."""
    print(f'{"row":34}{"seconds":>10}{"per second":>12}{"normalised":>12}{"peak MB":>9}  ')
    rows = []
    for name in names:
        row = run_in_own_process(name, args.repeats, args.images)
        rows.append(row)
        ratio = f'{row["ratio"]:.1f}x per-image transforms' if 'ratio' in row else ''
        if name in old:
            ratio += f'  {row["normalised"] / old[name]["normalised"]:.2f} of {args.compare}'
        print(f'{name:34}{row["seconds"]:10.4f}{row["per_second"]:12.1f}{row["normalised"]:12.2f}{row["peak_mb"]:9.0f}  '
              f'{ratio}', flush=True)
    gflops = statistics.mean(row.pop('gflops') for row in rows)
    if args.growth:
        print_searches(rows)
    print(f'matrix product: {gflops:.0f} GFLOP/s on {torch.get_num_threads()} threads')
    return {'gflops': gflops, 'rows': rows}


def measure_on_gpu(names: list[str], args: argparse.Namespace, old: dict[str, dict]) -> dict:
    """As measure_on_cpu, for rows of ON_GPU, whose seconds are compared as they are."""
    print(f'{torch.cuda.get_device_name()}, PyTorch {torch.__version__}')
    print(f'{"row":46}{"seconds":>10}{"images/s":>12}{"peak MB":>9}  ')
    rows = []
    for name in names:
        row = run_in_own_process(name, args.repeats, None)
        rows.append(row)
        ratio = f'{row["seconds"] / old[name]["seconds"]:.2f} of {args.compare}' if name in old else ''
        print(f'{name:46}{row["seconds"]:10.4f}{row["per_second"]:12.1f}{row["peak_mb"]:9.0f}  {ratio}', flush=True)
    return {'device': torch.cuda.get_device_name(), 'rows': rows}


def print_launches() -> None:
    """Print how many operations a training step of each of NETWORKS sends to a GPU."""
    print(f'{"a training step of":34}{"launches":>10}')
    for name in NETWORKS:
        counts = count_launches(name)
        spread = f'  ({min(counts)}-{max(counts)}, {len(counts)} architectures)' if len(counts) > 1 else ''
        print(f'{name.removesuffix("_step"):34}{statistics.mean(counts):10.0f}{spread}', flush=True)


def main() -> None:
    """Run the rows and print the table."""
    parser = flags.Parser('Measure what the programs cost.')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--only', metavar='NAME', help=f'the rows that begin so: {" ".join(ROWS)}')
    which.add_argument('--launches', action='store_true', help='count what a training step sends to a GPU, on the CPU')
    which.add_argument('--growth', action='store_true', help='how costs grow with pool, architectures and channels')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='cuda: networks in both layouts and in '
                        'float32, TF32 and bf16')
    parser.add_argument('--json', metavar='FILE', help='also write the results there')
    parser.add_argument('--compare', metavar='FILE', help='print ratios to the results in this file')
    parser.add_argument('--repeats', type=flags.POSITIVE_INT, default=5, help='measurements of a row; the median counts')
    parser.add_argument('--images', metavar='DIR', help='a folder of JPEGs for image_batches (default: made ones)')
    parser.add_argument('--row', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.launches:
        print_launches()
        return
    if args.growth and args.device == 'cuda':
        raise flags.UserError('--growth is measured on the CPU only')
    names = [name for name in (GROWTH if args.growth else ON_GPU if args.device == 'cuda' else ROWS)
             if name.startswith(args.only or '')]
    if not names:
        raise flags.UserError(f'--only={args.only}: is the beginning of no row; there are {", ".join(ROWS)}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise flags.UserError('--device=cuda: there is no GPU; --launches counts what one would be sent')
    if args.images and not Path(args.images).is_dir():
        raise flags.UserError(f'--images={args.images}: is not a folder')
    if args.images:
        ROWS['image_batches'] = partial(image_batches, folder=args.images)
    if args.row:
        print(json.dumps(run_row(args.row, args.repeats)))
        return
    if args.json and (Path(args.json).is_dir() or not os.access(Path(args.json).absolute().parent, os.W_OK)):
        raise flags.UserError(f'--json={args.json}: cannot be written; name a file in a directory that you may write to')
    try:
        old = {row['name']: row for row in json.loads(Path(args.compare).read_text())['rows']} if args.compare else {}
    except (OSError, ValueError, KeyError, TypeError):
        raise flags.UserError(f'--compare={args.compare}: is not a file that --json wrote') from None
    result = measure_on_gpu(names, args, old) if args.device == 'cuda' else measure_on_cpu(names, args, old)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    flags.run_program(main, goes_on=False)
