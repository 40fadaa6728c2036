"""The networks for other programs, through torch.hub or by import.

    import torch
    network = torch.hub.load('PATH OF THIS PROJECT', 'naonet_a_36', source='local', checkpoint='checkpoint_best.pt')
    logits, _ = network.eval()(images)              # images (batch, 3, 32, 32), as datasets.normalise makes them

In eval mode they go through torch.export, torch.onnx.export and torch.jit.trace.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

import architecture
import checkpoint as checkpoints
from flags import UserError
from model import FixedNetwork, NASNetworkCIFAR, NASNetworkImageNet

dependencies = ['torch', 'torchvision', 'numpy']


def naonet(arch: str | None = None, checkpoint: str | Path | None = None, *, imagenet: bool | None = None,
           classes: int | None = None, layers: int | None = None, channels: int | None = None, use_aux_head: bool = False,
           keep_prob: float = 1.0, drop_path_keep_prob: float = 1.0, steps: int = 1) -> FixedNetwork:
    """The network of an architecture, for images (batch, 3, 32, 32), or with `imagenet` (batch, 3, 224, 224).

    arch: a line of integers, one of architecture.PUBLISHED such as 'NAONet_A', or the path of an arch_pool file. With a
    checkpoint, of which the weights are loaded, whatever is not given comes from it; else layers 6 and channels 36, or on
    ImageNet 4 and 42. Raises flags.UserError.
    """
    state: dict[str, Any] = checkpoints.load_network(checkpoint) if checkpoint else {'args': {}, 'model': {}}
    args, weights = state['args'], state['model']
    arch = arch or checkpoints.architecture_of(state)
    if not arch:
        raise UserError(f'{checkpoint}: does not name its architecture; give arch' if checkpoint else
                              'give arch, or a checkpoint that names its architecture')
    weight, counts = weights.get('classifier.weight'), [args.get(name) for name in ('layers', 'channels', 'arc_index')]
    if (weights and not isinstance(weight, Tensor)) or not all(isinstance(value, int | None) for value in counts):
        raise UserError(f'{checkpoint}: is not the checkpoint of a network of this project')
    try:
        parsed = architecture.read(arch, args.get('arc_index') or 0)
    except architecture.ArchitectureError as error:
        raise UserError(f'the architecture: {error}') from None
    imagenet = any(name.startswith('stem0.') for name in weights) if imagenet is None else imagenet
    use_aux_head = use_aux_head or any(name.startswith('auxiliary_head.') for name in weights)
    if classes is None:
        classes = len(weight) if weights else (1000 if imagenet else 10)
    layers = layers or args.get('layers') or (4 if imagenet else 6)
    channels = channels or args.get('channels') or (42 if imagenet else 36)
    network = (NASNetworkImageNet if imagenet else NASNetworkCIFAR)(
        classes, layers, len(parsed.normal) // 4, channels, keep_prob, drop_path_keep_prob, use_aux_head, steps, parsed)
    if checkpoint:
        checkpoints.same_architecture(state, network.arch, checkpoint)
        checkpoints.fill_model(network, weights, checkpoint)
    return network


def naonet_a_36(checkpoint: str | Path | None = None, **options: Any) -> FixedNetwork:
    """NAONet-A with 36 channels for CIFAR (2.48 % top-1 error on CIFAR-10); `options` go to naonet."""
    return naonet('NAONet_A', checkpoint, **{'imagenet': False, 'layers': 6, 'channels': 36} | options)


def naonet_a_128(checkpoint: str | Path | None = None, **options: Any) -> FixedNetwork:
    """NAONet-A with 128 channels for CIFAR (1.93 % top-1 error on CIFAR-10); `options` go to naonet."""
    return naonet('NAONet_A', checkpoint, **{'imagenet': False, 'layers': 6, 'channels': 128} | options)


def naonet_b_36(checkpoint: str | Path | None = None, **options: Any) -> FixedNetwork:
    """NAONet-B with 36 channels for CIFAR (2.93 % top-1 error on CIFAR-10); `options` go to naonet."""
    return naonet('NAONet_B', checkpoint, **{'imagenet': False, 'layers': 6, 'channels': 36} | options)


def naonet_a_imagenet(checkpoint: str | Path | None = None, **options: Any) -> FixedNetwork:
    """NAONet-A with 42 channels for ImageNet (25.7 % top-1 error); `options` go to naonet."""
    return naonet('NAONet_A', checkpoint, **{'imagenet': True, 'layers': 4, 'channels': 42} | options)


def naonet_v2_36(checkpoint: str | Path | None = None, **options: Any) -> FixedNetwork:
    """NAONet-V2 with 36 channels for CIFAR (2.57 % top-1 error on CIFAR-10); `options` go to naonet."""
    return naonet('NAONet_V2', checkpoint, **{'imagenet': False, 'layers': 6, 'channels': 36} | options)


def naonet_v2_imagenet(checkpoint: str | Path | None = None, **options: Any) -> FixedNetwork:
    """NAONet-V2 with 52 channels for ImageNet (25.5 % top-1 error); `options` go to naonet."""
    return naonet('NAONet_V2', checkpoint, **{'imagenet': True, 'layers': 4, 'channels': 52} | options)
