"""The network of one architecture, for CIFAR and for ImageNet (paper, section 4 and appendix).

A network is a stem, 3·layers+2 cells of which two are reduction cells, and a classifier; an auxiliary head hangs on the
second reduction cell in training. The names of all parameters are those of the published checkpoints.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import architecture
from architecture import nodes_of, unread_states
from flags import UserError
from operations import OPERATIONS, BatchNorm2d, FactorizedReduce, ReLUConvBN, State, apply_operation

AUX_HEAD_IMAGE = 29  # pixels of a side of the smallest image of which two reductions leave 8
Shape = tuple[int, int]  # of a state: (how often the image's height and width were halved, channels)


class MaybeCalibrateSize(nn.Module):
    """Bring a cell's two inputs to one size and to the cell's channels, as far as they are not there yet."""

    def __init__(self, inputs: Sequence[Shape], channels: int):
        super().__init__()
        (halvings_x, channels_x), (halvings_y, channels_y) = inputs
        self.halvings = halvings_y
        if halvings_x != halvings_y:
            self.preprocess_x = FactorizedReduce(channels_x, channels)
        elif channels_x != channels:
            self.preprocess_x = ReLUConvBN(channels_x, channels)
        if channels_y != channels:
            self.preprocess_y = ReLUConvBN(channels_y, channels)

    def forward(self, x: State, y: State, bn_train: bool = False) -> list[State]:
        """The states 0 and 1 of the cell, both (batch, channels, h, w)."""
        states = []
        for side, state in (('x', x), ('y', y)):
            preprocess = getattr(self, f'preprocess_{side}', None)
            states.append(State(preprocess(state.relu, bn_train)) if preprocess else state)
        return states


def combine_operands(x: Tensor, y: Tensor, masks: Tensor | None) -> Tensor:
    """x + y, each multiplied per sample by its row of `masks` (2, batch, 1, 1, 1): the value of a node."""
    if masks is None:
        return x + y
    masks = masks.to(x.dtype)  # of mixed precision
    return torch.addcmul(x * masks[0], y, masks[1])


class Node(nn.Module):
    """A node of a cell: the sum of two operations, each on one state."""

    def __init__(self, node: Sequence[int], channels: int, reduction: bool):
        super().__init__()
        x_id, x_op, y_id, y_op = node
        self.operands = []
        for side, state, operation_id in (('x', x_id, x_op), ('y', y_id, y_op)):
            stride = 2 if reduction and state < 2 else 1
            operation = OPERATIONS[operation_id].make(channels, stride)
            name = f'{side}_id_fact_reduce' if isinstance(operation, FactorizedReduce) else f'{side}_op'
            self.add_module(name, operation)
            self.operands.append((state, name, (operation_id, stride)))

    def forward(self, states: Sequence[State], masks: Tensor | None) -> Tensor:
        """The node's value, (batch, channels, h, w); `masks` (2, batch, 1, 1, 1) drops paths."""
        x, y = (apply_operation(getattr(self, name), states[state], key) for state, name, key in self.operands)
        return combine_operands(x, y, masks)


class FinalCombine(nn.Module):
    """Concatenate the unread states; an input of a reduction cell is reduced first."""

    def __init__(self, concat: Sequence[int], channels: int, reduction: bool):
        super().__init__()
        self.concat = concat
        self.reduced = [state for state in concat if reduction and state < 2]
        self.ops = nn.ModuleList(FactorizedReduce(channels, channels) for _ in self.reduced)

    def forward(self, states: Sequence[State]) -> State:
        """(batch, channels · number of unread states, h, w)."""
        outputs = {state: operation(states[state].raw) for state, operation in zip(self.reduced, self.ops, strict=True)}
        outputs = [outputs[state] if state in outputs else states[state].raw for state in self.concat]
        return State(torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0])


class Cell(nn.Module):
    """A normal or a reduction cell of a fixed architecture."""

    def __init__(self, cell: Sequence[int], inputs: Sequence[Shape], channels: int, reduction: bool):
        super().__init__()
        self.ops = nn.ModuleList(Node(node, channels, reduction) for node in nodes_of(cell))
        self.maybe_calibrate_size = MaybeCalibrateSize(inputs, channels)
        concat = unread_states(cell)
        self.final_combine = FinalCombine(concat, channels, reduction)
        self.output_shape = (self.maybe_calibrate_size.halvings + reduction, channels * len(concat))

    def forward(self, x: State, y: State, masks: Tensor | None) -> State:
        """The cell's output from those of the two cells before; `masks` (2·nodes, batch, 1, 1, 1) drops paths."""
        states = self.maybe_calibrate_size(x, y)
        for index, node in enumerate(self.ops):
            states.append(State(node(states, None if masks is None else masks[2 * index:2 * index + 2])))
        return self.final_combine(states)


class AuxHead(nn.Module):
    """The auxiliary classifier on the second reduction cell."""

    def __init__(self, channels: int, classes: int, pool_stride: int):
        super().__init__()
        self.pool = nn.AvgPool2d(5, pool_stride)
        self.conv1 = nn.Conv2d(channels, 128, 1, bias=False)
        self.bn1 = BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 768, 2, bias=False)
        self.bn2 = BatchNorm2d(768)
        self.classifier = nn.Linear(768, classes)

    def forward(self, rectified: Tensor) -> Tensor:
        """(batch, channels, 8, 8) on CIFAR, (batch, channels, 7, 7) on ImageNet, after ReLU -> logits (batch, classes)."""
        x = F.relu(self.bn1(self.conv1(self.pool(rectified))))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.classifier(x.mean((2, 3)))


class CIFARStem:
    """Mixin: 32×32 images; one convolution, and both inputs of cell 0 are its output."""

    aux_pool_stride = 3

    def make_stem(self, channels: int) -> list[Shape]:
        """Add the stem's modules; return the shapes of cell 0's inputs."""
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * channels, 3, padding=1, bias=False), BatchNorm2d(3 * channels))
        return [(0, 3 * channels)] * 2

    def apply_stem(self, images: Tensor) -> tuple[State, State]:
        """Images (batch, 3, h, w) -> the inputs of cell 0."""
        output = State(self.stem(images))
        return output, output


class ImageNetStem:
    """Mixin: 224×224 images; three convolutions of stride 2, and cell 0 sees the second and the third."""

    aux_pool_stride = 2

    def make_stem(self, channels: int) -> list[Shape]:
        """Add the stem's modules; return the shapes of cell 0's inputs."""
        half = max(1, channels // 2)
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), BatchNorm2d(half), nn.ReLU(inplace=True),
            nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False), BatchNorm2d(channels))
        self.stem1 = nn.Sequential(
            nn.Identity(), nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False), BatchNorm2d(channels))
        return [(2, channels), (3, channels)]

    def apply_stem(self, images: Tensor) -> tuple[State, State]:
        """Images (batch, 3, h, w) -> the inputs of cell 0, at 1/4 and 1/8 of the images' size."""
        stem0 = State(self.stem0(images))
        return stem0, State(self.stem1(stem0.relu))


class Backbone(nn.Module):
    """What every network here shares: stem, cells, auxiliary head, classifier and the drop-path schedule.

    A subclass brings a stem (CIFARStem, ImageNetStem) and its kind of cell (`make_cell`). layout: what images are brought to
    first, None: they stay as they are.
    """

    layout: torch.memory_format | None = None
    is_supernet = False

    def __init__(self, classes: int, layers: int, nodes: int, channels: int, keep_prob: float,
                 drop_path_keep_prob: float, use_aux_head: bool, steps: int):
        super().__init__()
        self.nodes, self.classes, self.steps = nodes, classes, steps
        self.keep_prob, self.drop_path_keep_prob = keep_prob, drop_path_keep_prob
        inputs = self.make_stem(channels)
        self.cells = nn.ModuleList()
        self.aux_index = 2 * layers + 1
        cells = 3 * layers + 2
        for index in range(cells):
            reduction = index in (layers, self.aux_index)
            channels *= 1 + reduction
            self.cells.append(self.make_cell(inputs, channels, reduction))
            inputs = [inputs[1], self.cells[-1].output_shape]
            if use_aux_head and index == self.aux_index:
                self.auxiliary_head = AuxHead(inputs[1][1], classes, self.aux_pool_stride)
        self.classifier = nn.Linear(inputs[1][1], classes)
        self.register_buffer('depth', torch.arange(1, cells + 1).reshape(-1, 1, 1) / cells, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.kaiming_normal_(parameter)
        self.norms = [module for name, module in self.named_modules()
                      if isinstance(module, BatchNorm2d) and self.always_used(name)]
        for norm in self.norms:
            norm.counted_together = True

    def always_used(self, name: str) -> bool:
        """Whether every training step uses the module of this name."""
        return True

    def count_batch(self) -> None:
        """Add 1 to `num_batches_tracked` of all batch-norms that this step trains: one launch on a GPU, not one for each.

        The replicas that DataParallel makes hold this list too; of them the one on the network's own device counts.
        """
        counters = [norm.num_batches_tracked for norm in self.norms if norm.training]
        if counters and counters[0].device == self.depth.device:
            torch._foreach_add_(counters, 1)

    def drop_path_masks(self, images: Tensor, step: int | None) -> Tensor | None:
        """Draw Bernoulli(p)/p for every cell, operand and sample: (cells, 2·nodes, batch, 1, 1, 1), or None at p >= 1.

        p falls with the cell's depth and with training: p = 1 - (step+1)/steps · (index+1)/cells · (1 - keep). Without
        a step, as at the end of training. One draw for all cells, on the images' device.
        """
        if not self.training or self.drop_path_keep_prob >= 1:
            return None
        progress = 1.0 if step is None else min(1.0, (step + 1) / self.steps)
        keep = 1 - self.depth * (progress * (1 - self.drop_path_keep_prob))
        masks = torch.bernoulli(keep.expand(-1, 2 * self.nodes, images.shape[0])) / keep
        return masks[..., None, None, None]

    def propagate(self, images: Tensor, step: int | None,
                  extras: Callable[[nn.Module], tuple] = lambda cell: ()) -> tuple[Tensor, Tensor | None]:
        """Run stem, cells and heads; `extras(cell)` are further arguments of a cell's forward.

        Returns (logits, auxiliary logits), both (batch, classes); the second is None unless training with that head.
        """
        self.count_batch()
        if self.layout is not None:
            images = images.contiguous(memory_format=self.layout)
        masks = self.drop_path_masks(images, step)
        x, y = self.apply_stem(images)
        aux_logits = None
        for index, cell in enumerate(self.cells):
            x, y = y, cell(x, y, None if masks is None else masks[index], *extras(cell))
            if index == self.aux_index and self.training and hasattr(self, 'auxiliary_head'):
                aux_logits = self.auxiliary_head(y.relu)
                y = y.rectified()  # published results rest on this: with the head, later cells see y rectified
        pooled = F.dropout(y.raw.mean((2, 3)), 1 - self.keep_prob, self.training)
        return self.classifier(pooled), aux_logits


class FixedNetwork(Backbone):
    """A backbone whose cells are those of one architecture."""

    def __init__(self, classes: int, layers: int, nodes: int, channels: int, keep_prob: float,
                 drop_path_keep_prob: float, use_aux_head: bool, steps: int, arch: 'str | Sequence'):
        self.arch = architecture.parse(arch, nodes)
        super().__init__(classes, layers, nodes, channels, keep_prob, drop_path_keep_prob, use_aux_head, steps)

    def make_cell(self, inputs: Sequence[Shape], channels: int, reduction: bool) -> Cell:
        """A cell for inputs of the given shapes."""
        return Cell(self.arch.reduction if reduction else self.arch.normal, inputs, channels, reduction)

    def forward(self, input: Tensor, step: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Images (batch, 3, h, w) -> (logits, auxiliary logits or None), each (batch, classes).

        step: the global optimiser step, for the drop-path schedule. While torch.jit traces, an empty tensor stands for
        None, which a trace cannot return.
        """
        logits, aux_logits = self.propagate(input, step)
        if aux_logits is None and torch.jit.is_tracing():
            aux_logits = logits.new_empty(0)
        return logits, aux_logits


class NASNetworkCIFAR(CIFARStem, FixedNetwork):
    """The network of an architecture for 32×32 images.

    arch: a line of integers or a (normal, reduction) pair; steps: optimiser steps of the whole training. Raises
    architecture.ArchitectureError.
    """


class NASNetworkImageNet(ImageNetStem, FixedNetwork):
    """The network of an architecture for 224×224 images; arguments as NASNetworkCIFAR."""


def check_image_size(size: int, use_aux_head: bool) -> None:
    """Raise UserError if images of size×size pixels are too small for the CIFAR network with the auxiliary head."""
    if use_aux_head and size < AUX_HEAD_IMAGE:
        raise UserError(f'images of {size}×{size} pixels are too small for the auxiliary head, which needs 8×8 after both '
                        f'reductions: {AUX_HEAD_IMAGE}×{AUX_HEAD_IMAGE} at least; leave it out')


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, the auxiliary head left out as in the paper's tables."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith('auxiliary_head.'))


@torch.no_grad()
def count_madds(model: nn.Module, image_size: int, *extras: Any, channels: int = 3) -> int:
    """Multiply-adds of the convolutions and linear layers for one image; `extras` go to the model after the image.

    They are counted on a copy without values, where every operation has its plain form (see kernels.py).
    """
    model = copy.deepcopy(model).to('meta').eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, channels, image_size, image_size, device='meta'), *extras)
    return counter.get_total_flops() // 2
