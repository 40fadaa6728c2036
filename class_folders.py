"""Images in class folders, or in a zip of them: which there are, and of which class each is."""

import os
import struct
import zipfile
import zlib
from pathlib import Path

import torchvision
from PIL import Image

from flags import UserError

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile,
              Image.DecompressionBombError)  # what Pillow and zipfile raise for broken files


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
