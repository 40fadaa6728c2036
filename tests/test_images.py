"""Images in class folders and zips: the same batches however they are read, broken files, memory, shares of processes."""

import io
import math
import multiprocessing
import os
import pickle
import random
import signal
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from helpers import write_images, zip_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

import augment
import class_folders
import datasets
import flags
import image_files
from class_folders import decode, find_images
from flags import UserError
from image_files import FileBatches, ImageFiles

CPU = torch.device('cpu')
TRAIN, VALID = {'b': 5, 'a': 4, 'c': 4}, {'a': 3, 'c': 2}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """The same images in folders and, below zips/NAME, in zips."""
    root = tmp_path_factory.mktemp('images')
    write_images(root / 'train', TRAIN)
    write_images(root / 'valid', VALID, seed=1)
    for name, leading in (('plain', ''), ('leading', 'some/folder')):
        for part in ('train', 'valid'):
            zip_images(root / part, root / 'zips' / name / f'{part}.zip', leading)
    return root


def jpeg(size=(30, 30), seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, 'JPEG')
    return buffer.getvalue()


def small(monkeypatch):
    """Images of 8×8 pixels, which take no time."""
    monkeypatch.setattr(image_files, 'IMAGE_SIZE', 8)


def smooth_images(folder, count):
    """Colourful images without noise, in which a pixel's neighbours tell what it should be."""
    folder.mkdir(parents=True)
    for index in range(count):
        noise = np.random.RandomState(index).randint(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f'{index}.JPEG', quality=95)


def many(folder, count=100, broken=()):
    """`count` images of one class, `broken` of them cut off."""
    (folder / 'one').mkdir(parents=True)
    for index in range(count):
        data = jpeg(seed=index)
        (folder / 'one' / f'{index:03}.JPEG').write_bytes(data[:len(data) // 2] if index in broken else data)


def numbered(count, monkeypatch):
    """An ImageFiles of `count` images, of which each is 8×8 pixels of its own number."""
    small(monkeypatch)
    files = ImageFiles(Path('nowhere'), [(f'a/{index}', 'a') for index in range(count)], ['a'], 0, trains=False)

    def read(index):
        buffer = io.BytesIO()
        Image.new('RGB', (8, 8), (index, index, index)).save(buffer, 'PNG')
        return buffer.getvalue()
    files.read = read
    return files


def numbers(images):
    """The number of each image of `numbered`."""
    pixels = images[:, 0, 0, 0] * image_files.IMAGENET_STD[0] + image_files.IMAGENET_MEAN[0]
    return (pixels * 255).round().int().tolist()


def epochs(root, zipped=False, lazy=True, workers=0, seed=5, count=2, batch_size=4):
    """The batches of `count` epochs of training, and of evaluation."""
    train, valid, _ = image_files.open_files(root, zipped, lazy, seed, show=False)
    train_batches = FileBatches(train, batch_size, CPU, workers, generator=torch.Generator().manual_seed(seed))
    valid_batches = FileBatches(valid, batch_size, CPU, workers)
    return [list(train_batches) for _ in range(count)], list(valid_batches)


def assert_equal_batches(one, other):
    for batch, same in zip(one, other, strict=True):
        assert all(torch.equal(*pair) if torch.is_tensor(pair[0]) else pair[0] == pair[1]
                   for pair in zip(batch, same, strict=True))


@pytest.fixture(scope='module')
def expected(root):
    return epochs(root)


# --------------------------------------------------------------------------------------------------- the same batches

@pytest.mark.parametrize('zips', [None, 'plain', 'leading'])
@pytest.mark.parametrize('lazy, workers', [(True, 0), (True, 2), (False, 0), (False, 2)])
def test_all_ways_to_read_give_the_same_batches(zips, lazy, workers, root, expected):
    place = root / 'zips' / zips if zips else root
    train, valid = epochs(place, zips is not None, lazy, workers)
    for epoch, same in zip(train, expected[0], strict=True):
        assert_equal_batches(epoch, same)
    assert_equal_batches(valid, expected[1])


@pytest.mark.parametrize('world', [2, 3])
def test_the_processes_together_train_on_the_images_of_one(world, root):
    """Bit for bit: an image's colours do not depend on those it comes with."""
    train, *_ = image_files.open_files(root, False, True, 5, show=False)
    whole = FileBatches(train, 6, CPU, 0, generator=torch.Generator().manual_seed(5))
    ranks = [FileBatches(train, 6, CPU, 0, generator=torch.Generator().manual_seed(5), rank=rank, world=world)
             for rank in range(world)]
    for (images, labels, _), *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_another_epoch_and_another_seed_give_other_batches(root, expected):
    (first, second), valid = expected
    (other, _), same_valid = epochs(root, seed=6)
    for one, two in ((first, second), (first, other)):
        assert not any(torch.equal(batch[0], same[0]) for batch, same in zip(one, two, strict=True))
        assert [batch[1].tolist() for batch in one] != [batch[1].tolist() for batch in two]
    assert_equal_batches(valid, same_valid)


def test_an_image_is_transformed_by_seed_and_epoch_alone_whoever_else_is_in_the_batch(root):
    train, *_ = image_files.open_files(root, False, True, 5, show=False)
    other, *_ = image_files.open_files(root, False, True, 6, show=False)
    image, label, draws = train[3, 7]
    torch.rand(5)
    again = train[3, 7]
    assert torch.equal(again[0], image) and label == train[9, 7][1] == train.labels[7]
    assert again[2].box == draws.box and all(map(torch.equal, again[2][1:], draws[1:]))
    for different in (train[4, 7], other[3, 7]):
        assert not torch.equal(different[0], image) and not torch.equal(different[2].factors, draws.factors)


def test_an_epoch_left_early_does_not_disturb_the_next(root, expected):
    """As training from scratch on ImageNet does after 500 steps."""
    for workers in (0, 2):
        train, *_ = image_files.open_files(root, False, True, 5, show=False)
        generator = torch.Generator()
        batches = FileBatches(train, 4, CPU, workers, generator=generator)
        next(iter(batches))
        generator.manual_seed(5)
        assert_equal_batches(list(batches), expected[0][0])


def test_a_killed_worker_is_told_of_by_the_next_batch_and_nowhere_else(root):
    """The loader's own handler of SIGCHLD would raise wherever the program is, also in what it says about its end."""
    train, *_ = image_files.open_files(root, False, True, 5, show=False)
    batches, others = FileBatches(train, 4, CPU, 1, generator=torch.Generator()), multiprocessing.active_children()
    batch = iter(batches)
    next(batch)
    worker, = set(multiprocessing.active_children()) - set(others)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(.5)
    with pytest.raises(RuntimeError, match='DataLoader worker'):
        list(batch)
        list(batches)


@pytest.mark.parametrize('error', [EOFError, ConnectionResetError, ConnectionRefusedError])
def test_a_worker_killed_while_it_hands_a_batch_over_is_told_of_too(root, error):
    """The connection can break before the worker counts as dead: then PyTorch passes the connection's error on."""
    def loader():
        yield from real
        raise error
    train, *_ = image_files.open_files(root, False, True, 5, show=False)
    batches = FileBatches(train, 4, CPU, 0, generator=torch.Generator())
    real = [batches.loader.collate_fn([train[0, index] for index in range(4)])] * 2
    batches.loader = loader()
    with pytest.raises(RuntimeError) as raised:
        list(batches)
    assert 'was killed' in flags.known_end(raised.value)


def test_the_end_of_the_pinning_thread_by_a_killed_worker_is_told_of_too():
    """With a GPU that thread, not the main one, asks the workers, and dies where their connection breaks."""
    assert 'was killed' in flags.known_end(RuntimeError('Pin memory thread exited unexpectedly'))


def test_reading_draws_from_no_generator_but_its_own(root, monkeypatch):
    """Dropout draws from the default ones: reading must not shift them, nor depend on the workers or on a resumed run."""
    def refuse(*args):
        raise AssertionError("a GPU's generator would be seeded anew for each image")
    before = torch.get_rng_state()
    python, numpy = random.getstate(), np.random.get_state()
    epochs(root, workers=2)
    monkeypatch.setattr(torch, 'manual_seed', refuse)
    epochs(root, workers=0)
    assert torch.equal(before, torch.get_rng_state())
    assert random.getstate() == python and str(np.random.get_state()) == str(numpy)


def test_batches_are_normalised_images_with_labels_by_sorted_class_names(root):
    train, valid, classes = image_files.open_files(root, False, True, 0, show=False)
    assert classes == ['a', 'b', 'c']
    assert len(train) == 13 and len(valid) == 5
    assert valid.labels == [0, 0, 0, 2, 2] and train.labels == [0] * 4 + [1] * 5 + [2] * 4
    (images, labels), = FileBatches(valid, 8, CPU, 0)
    assert labels.tolist() == valid.labels and labels.dtype == torch.int64
    assert images.shape == (5, 3, 224, 224) and images.dtype == torch.float32
    to_tensor = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
                                    transforms.Normalize(image_files.IMAGENET_MEAN, image_files.IMAGENET_STD)])
    for image, name in zip(images, valid.names, strict=True):
        wanted = to_tensor(Image.open(root / 'valid' / name).convert('RGB'))
        assert (image - wanted).abs().max() < 1.01 / 255 / min(image_files.IMAGENET_STD)  # Pillow rounds otherwise


def test_training_transforms_are_torchvisions_for_the_same_random_state(tmp_path):
    """Up to Pillow's rounding to whole numbers after each adjustment, and its hue of 256 steps."""
    smooth_images(tmp_path / 'train' / 'a', 4)
    train, *_ = image_files.open_files(tmp_path, False, True, 5, show=False, validates=False)
    transform = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
                                    transforms.ColorJitter(.4, .4, .4, .2), transforms.ToTensor()])
    batches = FileBatches(train, 4, CPU, 0)
    for epoch in range(4):
        keys = [(epoch, index) for index in range(4)]
        images, _ = batches.to_device(*image_files.collate([train[key] for key in keys], full=True))
        for (_, index), image in zip(keys, images * batches.std + batches.mean, strict=True):
            torch.manual_seed(zlib.crc32(f'5 {epoch} {index}'.encode()))
            wanted = transform(Image.open(tmp_path / 'train' / train.names[index]).convert('RGB'))
            assert (image - wanted).abs().mean() < 0.01 and (image - wanted).abs().max() < 0.1


def test_grey_palette_transparent_and_cmyk_images_become_rgb(tmp_path, root):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    picture = Image.open(next((root / 'train' / 'a').iterdir()))
    for mode, suffix in (('L', 'JPEG'), ('CMYK', 'jpg'), ('P', 'png'), ('RGBA', 'PNG'), ('LA', 'webp'), ('1', 'bmp')):
        image = picture.convert(mode) if mode not in ('LA',) else picture.convert('RGBA')
        image.save(tmp_path / 'train' / 'a' / f'{mode}.{suffix}')
    (tmp_path / 'val').symlink_to(tmp_path / 'train')
    train, valid, _ = image_files.open_files(tmp_path, False, False, 0, show=False)
    assert len(train) == 6
    assert all(files[0, index][0].shape == (3, 224, 224) for files in (train, valid) for index in range(6))


def test_validation_may_be_called_val_and_valid_comes_first(root, tmp_path):
    write_images(tmp_path / 'train', {'a': 2})
    write_images(tmp_path / 'val', {'a': 1})
    zip_images(tmp_path / 'train', tmp_path / 'train.zip')
    zip_images(tmp_path / 'val', tmp_path / 'val.zip')
    for zipped in (False, True):
        assert len(image_files.open_files(tmp_path, zipped, True, 0, show=False)[1]) == 1
    write_images(tmp_path / 'valid', {'a': 3})
    assert len(image_files.open_files(tmp_path, False, True, 0, show=False)[1]) == 3


def test_what_is_no_image_is_left_alone(root, tmp_path):
    """Lists and licences, hidden files, and what a Mac adds to a zip."""
    write_images(tmp_path / 'train', {'a': 2, '.ipynb_checkpoints': 1})
    (tmp_path / 'train' / '__MACOSX' / 'a').mkdir(parents=True)
    (tmp_path / 'train' / '__MACOSX' / 'a' / '._a_0.JPEG').write_bytes(b'resource fork')
    (tmp_path / 'train' / 'a' / 'README.txt').touch()
    (tmp_path / 'train' / 'a' / '._a_0.JPEG').write_bytes(b'resource fork')
    (tmp_path / 'train' / 'list.jpg').touch()  # in no class folder
    (tmp_path / 'valid').symlink_to(tmp_path / 'train')
    for part in ('train', 'valid'):
        zip_images(tmp_path / 'train', tmp_path / f'{part}.zip')
    for zipped in (False, True):
        train, _, classes = image_files.open_files(tmp_path, zipped, False, 0, show=False)
        assert classes == ['a'] and train.names == ['a/a_0.JPEG', 'a/a_1.JPEG']


def test_images_that_were_read_can_be_sent_to_spawned_workers(root):
    files, *_ = image_files.open_files(root / 'zips' / 'plain', True, True, 0, show=False)
    FileBatches(files, 4, CPU, 0).batch(torch.arange(4))  # opens the zip in several threads, whose directories may be large
    assert files.files.archives == {}
    assert files.read(0) and files.files.archives
    copy = pickle.loads(pickle.dumps(files))
    assert copy.files.archives == {} and copy.read(3) == files.read(3)


# ------------------------------------------------------------------------------------------- classes, links, shapes, modes

@pytest.mark.parametrize('leading', [None, '', 'train', 'some/train'])
def test_a_class_is_the_first_folder(leading, tmp_path):
    """Tiny-ImageNet has train/n01/images/x.JPEG. In a zip the folders that all images share are none of theirs."""
    folder = tmp_path / 'train'
    for place, names in (('n01', {'images': 2}), ('n02', {'images': 1}), ('n02/images', {'more': 1}), ('', {'n03': 1})):
        write_images(folder / place, names)
    (folder / 'list.jpg').touch()  # in no class folder
    if leading is not None:
        zip_images(folder, tmp_path / 'train.zip', leading)
    _, images = find_images(tmp_path, ['train'], leading is not None)
    assert [name for _, name in images] == ['n01'] * 2 + ['n02'] * 2 + ['n03']


def test_a_zip_of_one_class_has_one_class(tmp_path):
    write_images(tmp_path / 'train', {'cats': 2})
    for leading in ('', 'some/train'):
        zip_images(tmp_path / 'train', tmp_path / 'train.zip', leading)
        assert [name for _, name in find_images(tmp_path, ['train'], True)[1]] == ['cats', 'cats']


@pytest.mark.parametrize('zipped', [False, True])
def test_what_is_left_out_is_named(zipped, tmp_path, capsys):
    """A class of photographs in a format that is not read must not vanish without a word."""
    write_images(tmp_path / 'train', {'cat': 2, 'dog': 1})
    (tmp_path / 'train' / 'heron').mkdir()
    for name in ('heron/1.heic', 'heron/2.heic', 'preview.png', 'classes.txt'):
        (tmp_path / 'train' / name).touch()
    zip_images(tmp_path / 'train', tmp_path / 'train.zip', 'train')
    for show in (True, False):
        place, images = find_images(tmp_path, ['train'], zipped, show)
        assert {name for _, name in images} == {'cat', 'dog'}
        leading = 'train/' if zipped else ''
        assert capsys.readouterr().err.splitlines() == [
            f'warning: {place}: {3 if zipped else 2} files in a format that is not read, such as '
            f'{leading}{"classes.txt" if zipped else "heron/1.heic"}; left out',
            f'warning: {place}: 1 file in no class folder, such as {leading}preview.png; left out'] * show


def test_links_that_lead_back_up_are_not_followed_and_others_are(tmp_path):
    write_images(tmp_path / 'train', {'a': 2})
    write_images(tmp_path / 'elsewhere', {'b': 1})
    for link, target in (('a/up', '..'), ('a/self', '.'), ('a/further', tmp_path), ('b', tmp_path / 'elsewhere' / 'b')):
        (tmp_path / 'train' / link).symlink_to(target)
    assert [name for name, _ in find_images(tmp_path, ['train'], False)[1]] == [
        'a/a_0.JPEG', 'a/a_1.JPEG', 'a/further/elsewhere/b/b_0.JPEG', 'b/b_0.JPEG']


def test_a_pipe_is_no_image_and_no_zip(tmp_path):
    write_images(tmp_path / 'train', {'a': 2})
    os.mkfifo(tmp_path / 'train' / 'a' / 'pipe.jpg')
    (tmp_path / 'train' / 'a' / 'link.jpg').symlink_to('pipe.jpg')
    assert [name for name, _ in find_images(tmp_path, ['train'], False)[1]] == ['a/a_0.JPEG', 'a/a_1.JPEG']
    os.mkfifo(tmp_path / 'train.zip')
    with pytest.raises(UserError, match=r'train\.zip: is not a readable zip file \(not a file\)'):
        find_images(tmp_path, ['train'], True)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    write_images(tmp_path / 'train', {'a': 1})
    (tmp_path / 'train' / 'b').mkdir(mode=0)
    with pytest.raises(UserError, match='b: cannot be read'):
        find_images(tmp_path, ['train'], False)


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / 'train').touch()
    with pytest.raises(UserError, match='train: cannot be read'):
        find_images(tmp_path, ['train'], False)


def test_a_class_that_validation_lacks_gets_one_warning(tmp_path, capsys):
    write_images(tmp_path / 'train', {'a': 1, 'b': 1, 'c': 1})
    write_images(tmp_path / 'valid', {'b': 1})
    for show in (True, False):
        image_files.open_files(tmp_path, False, True, 0, show=show)
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f'warning: {tmp_path}/valid: has no image of the class a, nor of 1 more'] * show


def test_data_that_cannot_be_decoded_are_found_out_at_opening(tmp_path):
    """Before there is an output directory. A few broken ones among others are for training to meet."""
    many(tmp_path / 'train', 20, broken=range(20))
    with pytest.raises(UserError, match=r'train: images cannot be decoded, one/000\.JPEG for one'):
        image_files.open_files(tmp_path, False, True, 0, show=False, validates=False)
    (tmp_path / 'train' / 'one' / '003.JPEG').write_bytes(jpeg())
    (tmp_path / 'train' / 'one' / '015.JPEG').write_bytes(jpeg())
    image_files.open_files(tmp_path, False, True, 0, show=False, validates=False)


def encoded(pixels, kind='PNG', **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'PPM'])
def test_grey_of_16_bits_is_scaled(kind):
    deep = np.array([[0, 128, 257], [25700, 40000, 65535]], dtype=np.uint16)
    pixels = decode(encoded(deep, kind))
    assert pixels.shape == (3, 2, 3) and pixels.dtype == torch.uint8
    assert pixels[0].tolist() == pixels[2].tolist() == [[0, 0, 1], [100, 156, 255]]


@pytest.mark.parametrize('mode, options', [('RGB', {}), ('L', {}), ('CMYK', {}), ('RGB', {'progressive': True}),
                                           ('RGB', {'subsampling': 0}), ('RGB', {'quality': 30})])
def test_jpegs_are_decoded_to_the_pixels_that_pillow_finds(mode, options, tmp_path):
    smooth_images(tmp_path / 'a', 1)
    data = encoded(Image.open(tmp_path / 'a' / '0.JPEG').convert(mode), 'JPEG', **options)
    wanted = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert('RGB'))).permute(2, 0, 1)
    assert (decode(data).int() - wanted.int()).abs().max() <= 1


def test_without_torchvisions_decoder_pillow_decodes(monkeypatch):
    data = jpeg()
    wanted = decode(data)
    monkeypatch.delattr(torchvision.io, 'decode_jpeg')
    assert (decode(data).int() - wanted.int()).abs().max() <= 1


@given(st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=30)
def test_evaluation_sees_the_middle_as_torchvision_does(height, width):
    if max(height, width) > 4 * min(height, width):
        height = width
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    wanted = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])(
        Image.fromarray(pixels))
    mine = image_files.middle(torch.from_numpy(pixels).permute(2, 0, 1))
    difference = (mine.int() - wanted.int()).abs()  # both round rows and columns, one after the other
    assert mine.shape == wanted.shape and difference.max() <= 2 and (difference > 1).float().mean() < 1e-4


@pytest.mark.parametrize('trains', [True, False])
@pytest.mark.parametrize('shape', [(1, 40_000), (40_000, 1), (3, 65_000), (1, 1)])
def test_extreme_shapes_take_neither_time_nor_memory(shape, trains, tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'train' / 'a' / '0.png').write_bytes(encoded(np.full((*shape, 3), 200, dtype=np.uint8)))
    files, *_ = image_files.open_files(tmp_path, False, True, 0, show=False, validates=False)
    files.trains = trains
    with torch.profiler.profile(profile_memory=True) as profile:
        image, *_ = files[0, 0]
    assert image.shape == (3, 224, 224) and (image == 200).all()
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) < 20e6


# -------------------------------------------------------------------------------------------------------- colour jitter

ADJUSTMENTS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


@given(st.integers(1, 11), st.integers(0, 2 ** 31))
@settings(max_examples=20)
def test_colour_jitter_is_torchvisions_for_the_same_parameters(count, seed):
    torch.manual_seed(seed)
    images = torch.rand(count, 3, 9, 7)
    images[0] = images[0].round()  # black, white, pure colours; greys in a corner
    images[:, :, :3, :3] = images[:, :1, :3, :3]
    draws = [augment.draw(image) for image in images]
    factors, order = (torch.stack(values) for values in list(zip(*draws, strict=True))[2:])
    assert len({tuple(row) for row in order.tolist()}) > 1 or count < 4
    adjusted = augment.colour_jitter(images.clone(), factors, order)
    for image, same, strengths, row in zip(images, adjusted, factors.tolist(), order.tolist(), strict=True):
        for number in row:
            image = ADJUSTMENTS[number](image, strengths[number])
        torch.testing.assert_close(same, image, rtol=0, atol=1e-5)


@given(st.floats(-.5, .5))
def test_hue_goes_all_the_way_round(shift):
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment.hue(images, torch.tensor(shift)), TF.adjust_hue(images, shift), rtol=0, atol=1e-5)


def test_mirroring_is_each_images_own():
    images = torch.arange(24).reshape(2, 3, 2, 2)
    mirrored = augment.mirror(images, torch.tensor([True, False]))
    assert torch.equal(mirrored[0], TF.hflip(images[0])) and torch.equal(mirrored[1], images[1])


# ------------------------------------------------------------------------------------------------------------- bad data

@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize('part', ['train', 'valid'])
def test_missing_folders_and_zips_are_named(zipped, part, root, tmp_path):
    suffix = '.zip' if zipped else ''
    other = 'valid' if part == 'train' else 'train'
    (tmp_path / f'{other}{suffix}').symlink_to((root / 'zips' / 'plain' if zipped else root) / f'{other}{suffix}')
    with pytest.raises(UserError, match=f'there is no {part}{suffix}') as error:
        image_files.open_files(tmp_path, zipped, True, 0)
    assert f'--data={tmp_path}' in str(error.value) and '\n' not in str(error.value)


def test_zips_without_their_flag_are_named(root):
    with pytest.raises(UserError, match=r'there is no train; .* give --zip_file'):
        image_files.open_files(root / 'zips' / 'plain', False, True, 0)


@pytest.mark.parametrize('content', [b'', b'not a zip', b'PK\x03\x04' + bytes(100), 'cut', 'folder'])
def test_what_is_not_a_zip_is_named(content, root, tmp_path):
    file = tmp_path / 'train.zip'
    if content == 'folder':
        file.mkdir()
    else:
        file.write_bytes((root / 'zips' / 'plain' / 'train.zip').read_bytes()[:-100] if content == 'cut' else content)
    with pytest.raises(UserError, match=r'train\.zip: is not a readable zip file') as error:
        image_files.open_files(tmp_path, True, True, 0)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('zipped', [False, True])
def test_a_set_without_images_is_named(zipped, tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'train' / 'a' / 'text.txt').touch()
    zip_images(tmp_path / 'train', tmp_path / 'train.zip')
    with pytest.raises(UserError, match=r'train(\.zip)?: has no images in class folders'):
        image_files.open_files(tmp_path, zipped, True, 0)


def test_a_class_that_is_only_in_validation_is_named(tmp_path):
    write_images(tmp_path / 'train', {'a': 1, 'b': 1})
    write_images(tmp_path / 'valid', {'a': 1, 'new': 1, 'other': 1})
    with pytest.raises(UserError, match=r'valid: the class new is not among .* nor are 1 more'):
        image_files.open_files(tmp_path, False, True, 0)


def broken_file(path, kind):
    """Make an image unreadable."""
    data = path.read_bytes()
    path.unlink()
    if kind == 'link to nothing':
        path.symlink_to('nowhere')
    elif kind == 'folder':
        path.mkdir()
    else:
        path.write_bytes({'cut off': data[:len(data) // 2], 'empty': b'', 'one byte': b'x', 'text': b'no image' * 20,
                          'header only': data[:20], 'zeros': bytes(len(data))}[kind])


@pytest.mark.parametrize('lazy', [False, True])
@pytest.mark.parametrize('kind', ['cut off', 'empty', 'one byte', 'text', 'header only', 'zeros', 'link to nothing'])
def test_one_broken_image_of_a_hundred_is_named_once_and_left_out(kind, lazy, tmp_path, monkeypatch, capsys):
    small(monkeypatch)
    many(tmp_path / 'train')
    broken_file(tmp_path / 'train' / 'one' / '042.JPEG', kind)
    place, images = find_images(tmp_path, ['train'], False)
    files = ImageFiles(place, images, ['one'], 0, trains=False)
    if not lazy:
        files.hold(False)
    for training, seen in ((True, 100), (False, 99)):  # another image of its batch takes its place in training
        batches = FileBatches(files, 10, CPU, 0, generator=torch.Generator() if training else None)
        assert [sum(len(batch[1]) for batch in batches) for _ in range(2)] == [seen, seen]
        assert capsys.readouterr().err == f'warning: {place}/one/042.JPEG: is broken or cut off; left out\n'


@pytest.mark.parametrize('lazy', [False, True])
def test_a_broken_entry_of_a_zip_is_a_broken_image(lazy, tmp_path, monkeypatch, capsys):
    small(monkeypatch)
    many(tmp_path / 'train')
    zip_images(tmp_path / 'train', tmp_path / 'train.zip')
    with zipfile.ZipFile(tmp_path / 'train.zip') as archive:
        entry = archive.getinfo('one/042.JPEG')
    content = bytearray((tmp_path / 'train.zip').read_bytes())
    content[entry.header_offset + 200] ^= 255  # its checksum is wrong now
    (tmp_path / 'train.zip').write_bytes(content)
    place, images = find_images(tmp_path, ['train'], True)
    files = ImageFiles(place, images, ['one'], 0, trains=False)
    if not lazy:
        files.hold(False)
    assert sum(len(labels) for _, labels in FileBatches(files, 10, CPU, 0)) == 99
    assert capsys.readouterr().err == f'warning: {place}/one/042.JPEG: is broken or cut off; left out\n'


def test_two_broken_images_of_a_hundred_stop_with_one_line(tmp_path, monkeypatch):
    small(monkeypatch)
    many(tmp_path / 'train', broken=(3, 70))
    place, images = find_images(tmp_path, ['train'], False)
    with pytest.raises(UserError, match='2 of 100 images cannot be decoded, more than 1%') as error:
        list(FileBatches(ImageFiles(place, images, ['one'], 0, trains=False), 10, CPU, 0))
    assert str(place) in str(error.value) and '\n' not in str(error.value)


def test_good_images_of_a_batch_take_the_places_of_broken_ones(monkeypatch):
    """Batch-norm cannot train on a lone image, and a process must take part in each step."""
    files = numbered(300, monkeypatch)
    batches = FileBatches(files, 4, CPU, 0, generator=torch.Generator())
    read = image_files.collate([files[0, 7], 'a.png', files[0, 9], 'b.png'], full=True)
    monkeypatch.setattr(batches, 'loader', [read] * len(batches))
    for images, labels, weight in batches:
        assert numbers(images) == [7, 9, 7, 9] and labels.tolist() == [0] * 4 and weight == 1
    monkeypatch.setattr(batches, 'loader', [image_files.collate(['a.png', 'b.png'], full=True)])
    with pytest.raises(UserError, match='all images of a batch are broken'):
        list(batches)


# --------------------------------------------------------------------------------------------------------------- memory

def test_a_set_that_does_not_fit_into_the_memory_is_read_lazily(root, monkeypatch, capsys, expected):
    size = sum(path.stat().st_size for path in (root / 'valid').rglob('*.JPEG'))
    monkeypatch.setattr(image_files, 'available_memory', lambda: size / 0.8)
    train, valid, _ = image_files.open_files(root, False, False, 5)
    assert train.memory is None and valid.memory is not None
    _, *lines = capsys.readouterr().err.splitlines()  # the first is about a class that valid lacks
    assert len(lines) == 2 and 'train: 0.0 GiB do not fit into the 0.0 GiB of memory that are free; reading lazily' in lines[0]
    assert lines[1].endswith('valid: 5/5 files in memory')
    batches = FileBatches(train, 4, CPU, 0, generator=torch.Generator().manual_seed(5))
    assert_equal_batches(list(batches), expected[0][0])


def test_processes_that_cannot_share_divide_the_memory(root, monkeypatch):
    size = sum(path.stat().st_size for path in (root / 'train').rglob('*.JPEG'))
    monkeypatch.setattr(image_files, 'available_memory', lambda: 3 * size)
    for processes, held in ((2, True), (4, False)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
        train, *_ = image_files.open_files(root, False, False, 5, show=False)
        assert (train.memory is not None) == held


def test_files_in_memory_are_not_read_again(root, tmp_path, expected):
    for part in ('train', 'valid'):
        (tmp_path / part).symlink_to(root / part)
    files, *_ = image_files.open_files(tmp_path, False, False, 5, show=False)
    for part in ('train', 'valid'):
        (tmp_path / part).unlink()
    assert files.memory is not None
    batches = FileBatches(files, 4, CPU, 2, generator=torch.Generator().manual_seed(5))
    assert_equal_batches(list(batches), expected[0][0])


def test_the_available_memory_is_what_the_system_says():
    free = class_folders.available_memory()
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    assert 0 < free <= total or math.isinf(free)


@pytest.mark.parametrize('limit, wanted', [('3000000', 1800000), ('max', 9000 * 1024), (None, 9000 * 1024)])
def test_a_containers_limit_counts(limit, wanted, tmp_path, monkeypatch):
    (tmp_path / 'meminfo').write_text('MemTotal:       10000 kB\nMemAvailable:    9000 kB\n')
    if limit:
        (tmp_path / 'memory.max').write_text(f'{limit}\n')
        (tmp_path / 'memory.stat').write_text('anon 1000000\nfile 500000\nshmem 200000\n')  # files are let go of
    monkeypatch.setattr(class_folders, 'Path', lambda path: tmp_path / Path(path).name)
    assert class_folders.available_memory() == wanted


def memory_of(pid):
    """Proportional and private memory of a process, in MB."""
    with open(f'/proc/{pid}/smaps_rollup') as file:
        values = {line.split()[0]: int(line.split()[1]) for line in file if line.split()[-1] == 'kB'}
    return values['Pss:'] / 1024, (values['Private_Clean:'] + values['Private_Dirty:']) / 1024


def hold_and_report(root, workers, pipe):
    """In a process of its own: hold 200 MB, read two epochs, report the memory of this process and of its workers."""
    torch.set_num_threads(1)
    files, *_ = image_files.open_files(root, False, False, 0, show=False)
    batches = FileBatches(files, 10, CPU, workers, generator=torch.Generator())
    for _ in range(2):
        for _ in batches:
            pass
    workers = [process.pid for process in multiprocessing.active_children()]
    pipe.send([memory_of(pid) for pid in (os.getpid(), *workers)])


@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='the system does not tell the memory of a process')
def test_workers_share_the_files_in_memory_without_a_copy_each(tmp_path):
    for part, count in (('train', 100), ('valid', 1)):
        many(tmp_path / part, count)
        for index, path in enumerate(sorted((tmp_path / part).rglob('*.JPEG'))):
            with open(path, 'ab') as file:  # 2 MB each, random so that nothing can be compressed or merged
                file.write(np.random.RandomState(index).bytes(2_000_000))
    total, private = {}, {}
    for workers in (0, 4):
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context('fork').Process(target=hold_and_report, args=(tmp_path, workers, there))
        process.start()
        parent, *others = here.recv()
        process.join()
        assert len(others) == workers
        total[workers] = parent[0] + sum(pss for pss, _ in others)
        private[workers] = [uss for _, uss in others]
    print(f'\n200 MB of files in memory: {total[0]:.0f} MB in all with 0 workers, {total[4]:.0f} MB with 4, of which private '
          f'to the workers {", ".join(f"{value:.0f}" for value in private[4])} MB')
    assert all(value < 60 for value in private[4])
    assert total[4] < total[0] + 4 * 150  # a copy each would be 800; forked processes add some pages of their own


def images_of_a_process(root, rank, store, pipe, hold, world=2):
    """In a process of its own, the `rank`-th of a machine: hold the images, report memory and what was read."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    reads = []
    real, image_files.Files.read = image_files.Files.read, lambda self, name: reads.append(name) or real(self, name)
    store = torch.distributed.FileStore(store, world) if hold == 'shared' else None
    files, *_ = image_files.open_files(root, False, False, 0, store, show=False, validates=False)
    held = sum(len(files.read(index)) for index in range(len(files)))
    content = zlib.crc32(b''.join(files.read(index) for index in range(len(files))))
    pipe.send((len(reads), held, content))
    pipe.recv()  # all have read
    pipe.send(memory_of(os.getpid()))
    pipe.recv()  # nobody leaves before all have looked


@pytest.mark.skipif(not hasattr(os, 'memfd_create'), reason='the system has no such memory')
def test_the_processes_of_a_machine_hold_one_copy(tmp_path):
    many(tmp_path / 'train', 50)
    for index, path in enumerate(sorted((tmp_path / 'train').rglob('*.JPEG'))):
        with open(path, 'ab') as file:
            file.write(np.random.RandomState(index).bytes(2_000_000))
    size = sum(path.stat().st_size for path in (tmp_path / 'train').rglob('*.JPEG'))
    total, context = {}, multiprocessing.get_context('fork')
    for hold in ('each', 'shared'):
        pipes, processes = [], []
        for rank in range(2):
            here, there = multiprocessing.Pipe()
            pipes.append(here)
            processes.append(context.Process(target=images_of_a_process, args=(
                tmp_path, rank, str(tmp_path / 'store'), there, hold)))
            processes[-1].start()
        seen = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send(None)
        total[hold] = sum(pipe.recv()[0] for pipe in pipes)
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(None)
            process.join()
            assert process.exitcode == 0
        assert [held for _, held, _ in seen] == [size, size] and seen[0][2] == seen[1][2]
        assert seen[1][0] == (1 if hold == 'shared' else 51)  # one image is looked at in opening
    print(f'\n{size / 2**20:.0f} MB in two processes: {total["each"]:.0f} MB each for itself, {total["shared"]:.0f} MB shared')
    assert total['each'] - total['shared'] > 0.8 * size / 2 ** 20


def test_what_does_not_fit_is_lazy_in_all_processes_of_a_machine(root, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, 'available_memory', lambda: 10)
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    for rank in ('0', '1'):
        monkeypatch.setenv('LOCAL_RANK', rank)
        files, *_ = image_files.open_files(root, False, False, 0, store, show=False, validates=False)
        assert files.memory is None


@pytest.mark.skipif(not hasattr(os, 'memfd_create'), reason='the system has no such memory')
def test_held_images_go_to_spawned_workers_by_name_and_go_with_the_last_holder(root):
    files, *_ = image_files.open_files(root, False, False, 0, show=False)
    data = pickle.dumps(files)
    assert len(data) < 5000
    path, copy = files.path, pickle.loads(data)
    assert copy.read(3) == files.read(3) == (root / 'train' / files.names[3]).read_bytes()
    del files
    assert not os.path.exists(path) and copy.read(3)


# ------------------------------------------------------------------------------------------------- shares of processes

@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('count, batch_size', [(12, 6), (13, 6), (17, 7), (25, 12), (7, 100), (40, 6)])
def test_the_processes_together_see_every_image_once(count, batch_size, world, monkeypatch):
    files = numbered(count, monkeypatch)
    single = FileBatches(files, batch_size, CPU, 0, generator=torch.Generator().manual_seed(1))
    ranks = [FileBatches(files, batch_size, CPU, 0, generator=torch.Generator().manual_seed(1), rank=rank, world=world)
             for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for parts in zip(*ranks, strict=True):
        seen += [number for images, _, _ in parts for number in numbers(images)]
        sizes = [len(labels) for _, labels, _ in parts]
        assert sum(weight for *_, weight in parts) == pytest.approx(world)
        assert [weight for *_, weight in parts] == pytest.approx([world * size / sum(sizes) for size in sizes])
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2
    assert sorted(seen) == list(range(count))
    assert seen == [number for images, *_ in single for number in numbers(images)]  # and in one order

    seen = [[numbers(images) for images, _ in FileBatches(files, batch_size, CPU, 0, rank=rank, world=world)]
            for rank in range(world)]
    flat = [number for rank in seen for batch in rank for number in batch]
    assert sorted(flat) == list(range(count))


@pytest.mark.parametrize('batch_size, world, good', [(4, 2, True), (5, 3, False), (1, 1, False), (2, 1, True)])
def test_a_batch_must_hold_two_images_for_each_process(batch_size, world, good, monkeypatch):
    files = numbered(9, monkeypatch)
    data = datasets.load('digits', '', False, CPU)
    makers = (lambda: FileBatches(files, batch_size, CPU, 0, generator=torch.Generator(), world=world),
              lambda: datasets.TrainBatches(data, batch_size, torch.Generator(), world=world))
    for make in makers:
        if good:
            make()
        else:
            with pytest.raises(UserError, match=f'a batch of {batch_size} .* for {world} process.* at least {2 * world}'):
                make()
    FileBatches(files, 1, CPU, 0, world=world)  # evaluation may


def test_chosen_images_come_in_the_chosen_order(monkeypatch):
    files = numbered(20, monkeypatch)
    batches = FileBatches(files, 5, CPU, 0, indices=torch.arange(19, -1, -2))
    assert batches.count == 10 and len(batches) == 2
    images, labels = batches.batch(torch.tensor([9, 0, 4]))
    assert numbers(images) == [1, 19, 11] and labels.tolist() == [0, 0, 0]
    assert [numbers(images) for images, _ in batches] == [[19, 17, 15, 13, 11], [9, 7, 5, 3, 1]]


def test_the_workers_share_the_cores_of_a_machine(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for processes, wanted in (('1', cores), (str(cores), 1), (str(4 * cores), 1)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
        parser = flags.Parser('')
        image_files.add_flags(parser)
        assert parser.parse_args([]).workers == wanted
