"""Images and batches: augmentation against torchvision's own transforms, order, shares, the data sets' files."""

import functools
import hashlib
import http.server
import itertools
import math
import pickle
import socket
import tarfile
import threading
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from helpers import files, write_images, zip_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

import datasets
from datasets import CROP_PADDING, EvalBatches, ImageSet, TrainBatches, batch_bounds, share_of, training_bounds
from flags import UserError

CPU = torch.device('cpu')


def image_set(count=7, size=4, flip=True, seed=0):
    """Images of random pixels, the label of image i is i."""
    pixels = torch.randint(1, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    padded = torch.nn.functional.pad(datasets.pack(pixels), [CROP_PADDING] * 4)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (datasets.CIFAR_MEAN, datasets.CIFAR_STD))
    return ImageSet(padded, torch.arange(count), mean, std, flip), pixels


def images_of(pixels):
    """Packed pixels as uint8 images (count, 3, h, w)."""
    return datasets.unpack(pixels).to(torch.uint8)


def literal_normalise(pixels):
    """torchvision's own: ToTensor and Normalize, image by image."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(datasets.CIFAR_MEAN, datasets.CIFAR_STD)])
    return torch.stack([transform(image.permute(1, 2, 0).numpy()) for image in pixels])


def crop_and_flip(data, chosen, generator):
    draws = datasets.draw_augmentation(len(chosen), data.size, generator, CPU)
    return images_of(datasets.crop_and_flip(data.pixels, chosen, data.size, draws, data.flip))


def draw_holes(count, height, width, generator):
    draws = datasets.draw_augmentation(count, height, generator, CPU)
    return draws._replace(hole_x=datasets.draw_augmentation(count, width, generator, CPU).hole_x)


# ---------------------------------------------------------------------------------------------------------- augmentation

@pytest.mark.parametrize('flip', [True, False])
def test_crop_and_flip_are_distributed_as_torchvisions(flip, generator):
    """All 9·9 windows (and their mirror images) come equally often from both, and nothing else does."""
    draws = 81 * 2 * 60
    data, pixels = image_set(1, 8, flip)
    theirs = transforms.Compose([transforms.RandomCrop(8, padding=4), *[transforms.RandomHorizontalFlip()] * flip])
    padded = images_of(data.pixels)[0]
    possible = {}
    for top, left, mirrored in itertools.product(range(9), range(9), (False, True)[:1 + flip]):
        window = padded[:, top:top + 8, left:left + 8]
        possible[(window.flip(2) if mirrored else window).numpy().tobytes()] = (top, left, mirrored)
    assert len(possible) == 81 * (1 + flip)

    torch.manual_seed(0)
    mine = crop_and_flip(data, torch.zeros(draws, dtype=torch.long), generator)
    assert mine.dtype == torch.uint8 and mine.shape == (draws, 3, 8, 8)
    expected = draws / len(possible)
    for images in (mine, [theirs(pixels[0]) for _ in range(draws)]):
        seen = Counter(possible[image.numpy().tobytes()] for image in images)  # a KeyError: an impossible image
        assert len(seen) == len(possible)
        chi_square = sum((times - expected) ** 2 / expected for times in seen.values())
        freedom = len(possible) - 1
        assert abs(chi_square - freedom) < 6 * math.sqrt(2 * freedom)


def test_every_image_of_a_batch_is_cropped_and_flipped_for_itself(generator):
    data, _ = image_set(2, 8)
    images = crop_and_flip(data, torch.zeros(64, dtype=torch.long), generator)
    assert len({image.numpy().tobytes() for image in images}) > 30


def test_crop_takes_the_chosen_images(generator):
    data, pixels = image_set(5, 4)
    chosen = torch.tensor([4, 0, 4, 2])
    for image, index in zip(crop_and_flip(data, chosen, generator), chosen, strict=True):
        nonzero = image[image > 0]
        assert set(nonzero.tolist()) <= set(pixels[index].flatten().tolist())


def test_normalise_is_to_tensor_and_normalize():
    data, _ = image_set(1)
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1)
    kept = every.clone()
    mine = datasets.normalise(every, data.mean, data.std)
    assert (mine - literal_normalise(every)).abs().max() < 1e-6
    assert torch.equal(every, kept)


def literal_cutout(images, size, centres):
    images = images.clone()
    for image, (row, column) in zip(images, centres, strict=True):
        top, left = row - size // 2, column - size // 2
        image[:, max(0, top):max(0, row + size // 2), max(0, left):max(0, column + size // 2)] = 0
    return images


@pytest.mark.parametrize('size', [1, 2, 3, 4, 6, 16])
def test_cutout_zeroes_a_square_around_a_uniform_pixel(size, generator):
    height, width, draws = 6, 5, 3000
    images = torch.rand((draws, 3, height, width), generator=generator) + 1
    kept = images.clone()
    mine = datasets.cutout(images, size, draw_holes(draws, height, width, generator))
    assert torch.equal(images, kept)
    outcomes = {}
    for centre in itertools.product(range(height), range(width)):
        outcomes.setdefault((literal_cutout(images[:1], size, [centre])[0, 0] == 0).numpy().tobytes(), []).append(centre)
    seen = Counter()
    for before, after in zip(images, mine, strict=True):
        holes = after == 0
        assert torch.equal(after, before.masked_fill(holes, 0)) and (holes == holes[:1]).all()
        seen[holes[0].numpy().tobytes()] += 1
    assert set(seen) == set(outcomes)
    for hole, centres in outcomes.items():
        expected = draws * len(centres) / (height * width)
        assert abs(seen[hole] - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize('size', [1, 3, 5])
def test_a_cutout_of_odd_size_is_as_the_references(size, generator):
    """From centre - size // 2 to centre + size // 2, exclusive."""
    holes = datasets.cutout(torch.ones(200, 1, 20, 20), size, draw_holes(200, 20, 20, generator)) == 0
    sides = torch.stack([holes.any(3).sum(2), holes.any(2).sum(2)])
    assert int(sides.max()) == 2 * (size // 2)
    assert torch.equal(holes.sum((1, 2, 3)), sides.prod(0).flatten())


def test_training_batches_are_cropped_flipped_normalised_and_cut_in_this_order(generator):
    data, _ = image_set(40, 8)
    (images, _labels, _weight), = TrainBatches(data, 40, generator, cutout_size=4)
    holes = (images == 0).all(1)  # zeros of the normalised image; a black pixel of the padding is not zero there
    assert holes.any((1, 2)).all()
    assert int(holes.sum((1, 2)).max()) == 16
    black = -data.mean / data.std
    assert ((images - black).abs() < 1e-5).all(1).any()


# --------------------------------------------------------------------------------------------------------------- batches

@given(st.integers(8, 300), st.integers(8, 40), st.integers(1, 8))
def test_batches_cover_all_images_once_and_none_is_too_small(count, batch_size, least):
    bounds = batch_bounds(count, batch_size, least)
    assert [index for start, stop in bounds for index in range(start, stop)] == list(range(count))
    assert all(stop > start for start, stop in bounds)
    assert all(stop - start == batch_size for start, stop in bounds[:-1])
    assert least <= bounds[-1][1] - bounds[-1][0] < batch_size + least


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 4))
def test_training_gives_every_process_two_images_of_every_batch_or_says_why_not(count, batch_size, world):
    if min(count, batch_size) < 2 * world:
        words = f'a batch of {min(count, batch_size)} images .* for {world} process.* at least {2 * world}'
        with pytest.raises(UserError, match=words):
            training_bounds(count, batch_size, world)
        return
    for start, stop in training_bounds(count, batch_size, world):
        shares = [share_of(start, stop, rank, world) for rank in range(world)]
        assert all(last - first >= 2 for first, last in shares)


@given(st.integers(0, 50), st.integers(0, 100), st.integers(1, 9))
def test_shares_of_the_processes_partition_a_batch_evenly(start, length, world):
    shares = [share_of(start, start + length, rank, world) for rank in range(world)]
    assert [index for first, last in shares for index in range(first, last)] == list(range(start, start + length))
    sizes = [last - first for first, last in shares]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=20)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(0, 2 ** 31))
def test_an_epoch_shows_every_image_once_in_a_new_order(count, batch_size, seed):
    data, _ = image_set(count)
    batches = TrainBatches(data, batch_size, torch.Generator().manual_seed(seed))
    epochs = []
    for _ in range(2):
        epoch = list(batches)
        assert len(epoch) == len(batches)
        for images, labels, weight in epoch:
            assert len(images) == len(labels) >= 2 and weight == 1
        epochs.append(torch.cat([labels for _, labels, _ in epoch]).tolist())
        assert sorted(epochs[-1]) == list(range(count))
    if count > 20:
        assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_batches_are_repeatable_for_a_generators_state(generator):
    data, _ = image_set(30)
    batches = TrainBatches(data, 8, generator, cutout_size=2)
    state = generator.get_state()
    one = list(batches)
    generator.set_state(state)
    for (images, labels, _), (same_images, same_labels, _) in zip(one, batches, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


@pytest.mark.parametrize('world', [1, 2, 3])
def test_the_processes_together_train_on_what_one_would(world):
    data, _ = image_set(30)

    def batches(rank, world):
        return list(TrainBatches(data, 12, torch.Generator().manual_seed(3), 2, rank, world))
    shares = [batches(rank, world) for rank in range(world)]
    for parts, (images, labels, _) in zip(zip(*shares, strict=True), batches(0, 1), strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
        for part in parts:  # with these weights the mean of the processes' gradients is that of the whole batch's mean loss
            assert len(part[1]) >= 2 and part[2] == pytest.approx(len(part[1]) * world / len(labels))


@given(st.integers(1, 40), st.integers(1, 15), st.integers(1, 3))
@settings(max_examples=20)
def test_evaluation_shows_the_images_in_order_as_they_are(count, batch_size, world):
    data, pixels = image_set(count)
    expected = literal_normalise(pixels)
    seen = []
    for rank in range(world):
        for images, labels in EvalBatches(data, batch_size, rank, world):
            assert len(labels) <= batch_size
            torch.testing.assert_close(images, expected[labels], rtol=0, atol=1e-6)
            seen += labels.tolist()
    assert sorted(seen) == list(range(count))
    if world == 1:
        assert seen == sorted(seen)


def test_a_selection_holds_the_chosen_images():
    data, pixels = image_set(10)
    part = data.select(range(4, 7))
    assert len(part) == 3 and part.labels.tolist() == [4, 5, 6] and part.size == 4
    (images, _), = EvalBatches(part, 10)
    torch.testing.assert_close(images, literal_normalise(pixels[4:7]), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ subsets and splits

@given(st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any), st.data(), st.integers(0, 2 ** 31))
def test_a_subset_is_balanced_over_the_classes_as_far_as_it_goes(sizes, data, seed):
    labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    count = data.draw(st.integers(1, len(labels)))
    chosen = datasets.draw_balanced(labels, count, seed)
    assert torch.equal(chosen, datasets.draw_balanced(labels.tolist(), count, seed))
    assert len(set(chosen.tolist())) == count
    drawn = torch.bincount(labels[chosen], minlength=len(sizes)).tolist()
    for size, number in zip(sizes, drawn, strict=True):
        assert number == size or max(drawn) - number <= 1


def test_a_subset_is_the_seeds_own():
    data, pixels = image_set(50)
    one, same, other = (data.select(datasets.draw_balanced(data.labels, 20, seed)) for seed in (1, 1, 2))
    assert torch.equal(one.labels, same.labels) and not torch.equal(one.labels, other.labels)
    assert torch.equal(images_of(one.pixels)[:, :, 4:-4, 4:-4], pixels[one.labels]) and one.size == data.size
    with pytest.raises(UserError, match='51 images cannot be drawn from 50'):
        datasets.draw_balanced(data.labels, 51, 0)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 2 ** 31))
def test_a_split_is_shuffled_by_the_seed(first, rest, seed):
    parts = datasets.shuffled_split(first + rest, first, seed)
    assert [len(part) for part in parts] == [first, rest]
    assert sorted(torch.cat(parts).tolist()) == list(range(first + rest))
    assert all(map(torch.equal, parts, datasets.shuffled_split(first + rest, first, seed)))
    assert first + rest < 12 or torch.cat(parts).tolist() != list(range(first + rest))


# ------------------------------------------------------------------------------------------------ folders of small images

@pytest.fixture(scope='module')
def small_images(tmp_path_factory):
    """Images of several sizes in class folders, and in zips."""
    root = tmp_path_factory.mktemp('small')
    write_images(root / 'train', {'cat': 6, 'ant': 4, 'bee': 5}, size=20)
    write_images(root / 'test', {'bee': 2, 'ant': 3}, size=30, seed=1)
    for part in ('train', 'test'):
        zip_images(root / part, root / f'{part}.zip', part)
    return root


def load_folder(root, train=True, info=None, **options):
    return datasets.load('folder', root, train, CPU, datasets.Folder(**options), info=info)


@pytest.mark.parametrize('zipped', [False, True])
def test_a_folder_of_small_images_is_one_packed_tensor(zipped, small_images):
    train = load_folder(small_images, size=16, zipped=zipped)
    test = load_folder(small_images, False, train.info, zipped=zipped)
    assert train.classes == test.classes == ['ant', 'bee', 'cat'] and train.flip
    assert train.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 6 and test.labels.tolist() == [0] * 3 + [1] * 2
    assert train.size == test.size == 16 and train.pixels.shape == (15, 24, 24) and train.pixels.dtype == torch.int32
    resize = transforms.Compose([transforms.Resize((16, 16)), transforms.PILToTensor()])
    for data, part in ((train, 'train'), (test, 'test')):
        paths = sorted((small_images / part).rglob('*.JPEG'))
        wanted = torch.stack([resize(Image.open(path)) for path in paths])
        assert (images_of(data.pixels)[:, :, 4:-4, 4:-4].int() - wanted.int()).abs().max() <= 1
    assert torch.equal(train.mean, test.mean) and torch.equal(train.std, test.std)
    (images, _), = EvalBatches(train, 100)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)


def test_a_folders_info_goes_through_a_checkpoint(small_images, tmp_path):
    info = load_folder(small_images, size=8).info
    torch.save(info, tmp_path / 'info.pt')
    kept = torch.load(tmp_path / 'info.pt', weights_only=True)
    assert kept == info and info['size'] == 8
    assert load_folder(small_images, False, kept).info == info
    with pytest.raises(ValueError, match='info'):
        load_folder(small_images, False)


def test_flip_may_be_off(small_images):
    assert not datasets.load('folder', small_images, True, CPU, flip=False).flip
    assert not datasets.load('digits', '', True, CPU, flip=True).flip


def test_what_cannot_be_decoded_of_a_folder_is_left_out_or_too_much(small_images, tmp_path, capsys, monkeypatch):
    write_images(tmp_path / 'train', {'a': 60, 'b': 60}, size=8)
    broken = tmp_path / 'train' / 'b' / 'b_1.JPEG'
    broken.write_bytes(broken.read_bytes()[:100])
    for show in (True, False):
        data = load_folder(tmp_path, size=8, show=show)
        assert len(data) == 119 and data.labels.bincount().tolist() == [60, 59]
        assert capsys.readouterr().err.splitlines() == [
            f'{tmp_path}/train: 120/120 files in memory', f'warning: {broken}: is broken or cut off; left out'] * show
    (tmp_path / 'train' / 'a' / 'a_1.JPEG').write_bytes(b'no image')
    with pytest.raises(UserError, match='2 of 120 images cannot be decoded, more than 1%'):
        load_folder(tmp_path, size=8)
    monkeypatch.setattr(datasets, 'available_memory', lambda: 1e6)
    with pytest.raises(UserError, match=r'120 images of 224×224 pixels need 0\.1 GiB'):
        load_folder(tmp_path, size=224)


def test_measured_statistics_never_divide_by_zero():
    mean, std = datasets.measure(np.full((3, 3, 4, 4), 51, dtype=np.uint8))
    assert mean == pytest.approx([.2] * 3) and min(std) > 0


# ---------------------------------------------------------------------------------------------------------------- digits

def test_digits_are_split_once_and_for_all_and_balanced(tmp_path):
    train, test = (datasets.load('digits', tmp_path / 'none', train, CPU) for train in (True, False))
    assert (len(train), len(test), train.size, test.size) == (1437, 360, 32, 32)
    for data, least in ((train, 130), (test, 25)):
        assert data.pixels.dtype == torch.int32 and data.pixels.shape[1:] == (40, 40)
        counts = torch.bincount(data.labels)
        assert len(counts) == 10 and int(counts.min()) >= least
        assert not data.flip  # a mirrored digit is another digit, or none
    assert not (tmp_path / 'none').exists()
    (images, _), = EvalBatches(train, 2000)
    assert images.mean((0, 2, 3)).abs().max() < 0.02 and (images.std((0, 2, 3)) - 1).abs().max() < 0.02


def test_digits_are_the_committed_images_enlarged():
    with np.load(datasets.DIGITS_FILE) as file:
        images, labels = file['images'], file['labels']
    test = datasets.load('digits', 'none', False, CPU)
    assert test.labels.tolist() == labels[::5].tolist()
    padded = images_of(test.pixels)
    inner = padded[:, :, 4:-4, 4:-4]
    assert (padded.sum((1, 2, 3)) == inner.sum((1, 2, 3))).all()
    averages = torch.nn.functional.avg_pool2d(inner.float(), 4)[:, 0] * 16 / 255
    assert (averages - torch.from_numpy(images[::5]).float()).abs().mean() < 1.5


# ----------------------------------------------------------------------------------------------------------------- CIFAR

class Cifar:
    """A data set in the published python-pickle format, with few images; torchvision's checksums are patched to match."""

    def __init__(self, name, root, monkeypatch):
        self.name, self.root, self.kind = name, root, {
            'cifar10': torchvision.datasets.CIFAR10, 'cifar100': torchvision.datasets.CIFAR100}[name]
        self.folder = root / self.kind.base_folder
        self.folder.mkdir(parents=True)
        random, per_file, key = np.random.RandomState(0), 6, self.kind.meta['key']
        classes = 10 if name == 'cifar10' else 100
        self.pixels, self.labels = {}, {}
        lists = {}
        for train, attribute in ((True, 'train_list'), (False, 'test_list')):
            pixels, labels, lists[attribute] = [], [], []
            for file, _ in getattr(self.kind, attribute):
                data = random.randint(0, 256, (per_file, 3072), dtype=np.uint8)
                target = random.randint(0, classes, per_file).tolist()
                lists[attribute].append([file, self.write(file, {
                    'data': data, 'labels' if classes == 10 else 'fine_labels': target, 'coarse_labels': [0] * per_file})])
                pixels.append(data.reshape(-1, 3, 32, 32))
                labels += target
            self.pixels[train], self.labels[train] = np.concatenate(pixels), labels
            monkeypatch.setattr(self.kind, attribute, lists[attribute])
        meta = self.kind.meta['filename']
        checksum = self.write(meta, {key: [str(i) for i in range(classes)]})
        monkeypatch.setattr(self.kind, 'meta', self.kind.meta | {'md5': checksum})

    def write(self, file, content):
        """Write one file; returns its checksum."""
        (self.folder / file).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((self.folder / file).read_bytes()).hexdigest()


@pytest.fixture(params=['cifar10', 'cifar100'])
def cifar(request, tmp_path, monkeypatch):
    return Cifar(request.param, tmp_path / 'data', monkeypatch)


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: its folder and its address."""
    folder = tmp_path / 'server'
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{running.server_port}'
        running.shutdown()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError('Network is unreachable')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.mark.parametrize('train', [True, False])
def test_cifar_files_load_pixel_by_pixel(cifar, train, no_network):
    before = files(cifar.root)
    data = datasets.load(cifar.name, cifar.root, train, CPU)
    assert torch.equal(images_of(data.pixels)[:, :, 4:-4, 4:-4], torch.from_numpy(cifar.pixels[train]))
    assert data.labels.tolist() == cifar.labels[train] and data.labels.dtype == torch.int64
    assert data.flip and data.size == 32
    torch.testing.assert_close(data.mean.flatten(), torch.tensor([.49139968, .48215827, .44653124]))
    torch.testing.assert_close(data.std.flatten(), torch.tensor([.24703233, .24348505, .26158768]))
    assert files(cifar.root) == before


@pytest.mark.parametrize('damage', ['missing file', 'changed file', 'cut file', 'no meta file'])
def test_damaged_files_without_network_are_reported_and_left_as_they_are(cifar, damage, no_network):
    victim = cifar.folder / (cifar.kind.meta['filename'] if damage == 'no meta file' else cifar.kind.train_list[0][0])
    if damage in ('missing file', 'no meta file'):
        victim.unlink()
    else:
        content = victim.read_bytes()
        victim.write_bytes(content[:-100] if damage == 'cut file' else content[:-1] + b'?')
    (cifar.root / 'mine.txt').write_text('keep me')
    before = {name: (cifar.root / name).read_bytes() for name in files(cifar.root) if (cifar.root / name).is_file()}
    # torchvision does not fetch a missing meta file anew, so the network is not what that line is about
    assert_data_error(cifar.name, cifar.root, cifar.folder, 'meta' if damage == 'no meta file' else 'Network is unreachable')
    assert {name: (cifar.root / name).read_bytes() for name in files(cifar.root) if (cifar.root / name).is_file()} == before


@pytest.mark.parametrize('name, folder', [('cifar10', 'cifar-10-batches-py'), ('cifar100', 'cifar-100-python')])
@pytest.mark.parametrize('existing', ['.', 'a', 'a/b/c'])
def test_missing_data_without_network_leave_nothing_behind(name, folder, existing, tmp_path, no_network):
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    root = tmp_path / 'a' / 'b' / 'c'
    before = files(tmp_path)
    assert_data_error(name, root, root / folder, 'Network is unreachable')
    assert files(tmp_path) == before


def assert_data_error(name, root, folder, reason):
    with pytest.raises(UserError) as error:
        datasets.load(name, root, True, CPU)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for word in (f'--data={root}', str(folder), '--dataset=digits', reason):
        assert word in message


def test_a_data_folder_that_is_a_file_is_reported(tmp_path, no_network):
    (tmp_path / 'file').write_text('keep me')
    with pytest.raises(UserError, match='--data='):
        datasets.load('cifar10', tmp_path / 'file', True, CPU)
    assert (tmp_path / 'file').read_text() == 'keep me'


def test_a_download_is_unpacked_and_used(cifar, monkeypatch, tmp_path, server):
    archive = server[0] / cifar.kind.filename
    with tarfile.open(archive, 'w:gz') as file:
        file.add(cifar.folder, cifar.kind.base_folder)
    monkeypatch.setattr(cifar.kind, 'url', f'{server[1]}/{archive.name}')
    monkeypatch.setattr(cifar.kind, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    root = tmp_path / 'new' / 'folder'
    data = datasets.load(cifar.name, root, True, CPU)
    assert torch.equal(images_of(data.pixels)[:, :, 4:-4, 4:-4], torch.from_numpy(cifar.pixels[True]))
    assert (root / cifar.kind.base_folder).is_dir()


def test_a_damaged_download_is_reported_and_loaded_again(cifar, monkeypatch, tmp_path, server):
    archive = server[0] / cifar.kind.filename
    archive.write_bytes(b'half of an archive')
    monkeypatch.setattr(cifar.kind, 'url', f'{server[1]}/{archive.name}')
    root = tmp_path / 'new' / 'folder'
    with pytest.raises(UserError):
        datasets.load(cifar.name, root, True, CPU)
    with tarfile.open(archive, 'w:gz') as file:
        file.add(cifar.folder, cifar.kind.base_folder)
    monkeypatch.setattr(cifar.kind, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(datasets.load(cifar.name, root, True, CPU)) == len(cifar.labels[True])


@pytest.mark.parametrize('failure', [OSError('the line is dead'), RuntimeError('not found or corrupted'), KeyboardInterrupt()])
@pytest.mark.parametrize('existing', [True, False])
def test_a_failed_download_deletes_nothing_that_appeared_meanwhile(failure, existing, tmp_path, monkeypatch):
    """Files put there by hand, another run's checkpoint with --data=. : none of it is the download's."""
    root = tmp_path / 'new' / 'data'
    folder = root / 'cifar-10-batches-py'
    if existing:
        folder.mkdir(parents=True)
        (folder / 'data_batch_1').write_text('by hand')

    def download(*args, **kwargs):
        (folder / 'deep').mkdir(parents=True)
        (folder / 'data_batch_2').write_text('by hand')
        (root / 'exp').mkdir()
        (root / 'exp' / 'checkpoint.pt').write_text('of another run')
        raise failure
    monkeypatch.setattr(torchvision.datasets.cifar, 'download_and_extract_archive', download)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError):
        datasets.load('cifar10', root, True, CPU)
    assert (root / 'exp' / 'checkpoint.pt').read_text() == 'of another run'
    assert (folder / 'data_batch_2').exists() and (folder / 'deep').is_dir()
    assert not existing or (folder / 'data_batch_1').read_text() == 'by hand'


def test_an_interrupted_download_leaves_no_empty_folders(tmp_path, monkeypatch):
    def download(*args, **kwargs):
        (tmp_path / 'new' / 'data' / 'cifar-10-batches-py').mkdir(parents=True)
        raise KeyboardInterrupt
    monkeypatch.setattr(torchvision.datasets.cifar, 'download_and_extract_archive', download)
    with pytest.raises(KeyboardInterrupt):
        datasets.load('cifar10', tmp_path / 'new' / 'data', True, CPU)
    assert files(tmp_path) == []
