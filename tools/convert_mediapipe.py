"""MediaPipe's networks for faces (TensorFlow Lite) -> the weights of musetalk/data/face/mediapipe.py.

    pip download --no-deps mediapipe==0.10.21 && pip install tflite
    python -m tools.convert_mediapipe --wheel mediapipe-0.10.21-*.whl

Run once; its output is part of the repository. The networks are Apache-2.0, see musetalk/data/face/NOTICE.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import tyro
from torch import nn

from musetalk.data.face.attention_mesh import REGIONS, SIZE, AttentionMesh, Region
from musetalk.data.face.blazeface import POINTS, FullRangeDetector, ShortRangeDetector
from musetalk.data.face.mediapipe import WEIGHTS

FOLDER = "mediapipe/modules"  # in the wheel
DTYPES = {0: np.float32, 1: np.float16}  # TensorType of TensorFlow Lite -> dtype
SPARSE = 1  # DimensionType of a compressed dimension


@dataclass
class ConvertConfig:
    """The constants of the conversion."""

    wheel: Path  # mediapipe-0.10.21-*.whl


class Graph:
    """The constants of a TensorFlow Lite file, in the order of the operators that use them."""

    def __init__(self, content: bytes) -> None:
        import tflite

        self.model = tflite.Model.GetRootAsModel(content, 0)
        self.graph = self.model.Subgraphs(0)
        operators = [self.graph.Operators(index) for index in range(self.graph.OperatorsLength())]
        # Constants pass through operators of one input that densify or convert them.
        self.source = {
            int(operator.Outputs(0)): int(operator.Inputs(0)) for operator in operators if operator.InputsLength() == 1
        }
        self.operators = operators

    def layers(self) -> Iterator[list[np.ndarray]]:
        """Yields [weight, bias] of each convolution, with the weight as in torch, and [slope] of each PReLU."""
        for operator in self.operators:
            constants = [self.constant(int(index)) for index in operator.InputsAsNumpy()[1:]]
            code = self.model.OperatorCodes(operator.OpcodeIndex())
            kind = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
            if kind == 3:  # CONV_2D: (outputs, H, W, inputs)
                yield [constants[0].transpose(0, 3, 1, 2), constants[1]]
            elif kind == 4:  # DEPTHWISE_CONV_2D: (1, H, W, channels)
                yield [constants[0].transpose(3, 0, 1, 2), constants[1]]
            elif kind == 54:  # PRELU: (1, 1, channels)
                yield [constants[0].reshape(-1)]

    def constant(self, index: int) -> np.ndarray:
        """The values of a tensor that is a constant, float16; an empty array for another tensor."""
        while index in self.source:
            index = self.source[index]
        tensor = self.graph.Tensors(index)
        buffer = self.model.Buffers(tensor.Buffer())
        if not buffer.DataLength() or tensor.Type() not in DTYPES:
            return np.zeros(0)
        values = np.frombuffer(buffer.DataAsNumpy().tobytes(), DTYPES[tensor.Type()])
        shape = tensor.ShapeAsNumpy()
        return densify(values, shape, tensor.Sparsity()) if tensor.Sparsity() else values.reshape(shape)


def densify(values: np.ndarray, shape: np.ndarray, sparsity: Any) -> np.ndarray:
    """Expands a sparse tensor. Source of the format: TensorFlow Lite's schema, SparsityParameters."""
    order = sparsity.TraversalOrderAsNumpy()
    blocks = sparsity.BlockMapAsNumpy() if sparsity.BlockMapLength() else np.zeros(0, int)
    block_size = {}
    for index, axis in enumerate(blocks):
        block_size[int(axis)] = sparsity.DimMetadata(len(shape) + index).DenseSize()
    result = np.zeros(shape, values.dtype)
    # Positions along the traversed dimensions, one row for each stored value so far.
    positions = np.zeros((1, 0), int)
    storage = np.zeros(1, int)  # index of each row in the current dimension's storage
    for level in range(len(order)):
        dimension = sparsity.DimMetadata(level)
        if dimension.Format() == SPARSE:
            segments, indices = integers(dimension, "Segments"), integers(dimension, "Indices")
            counts = segments[storage + 1] - segments[storage]
            starts = np.repeat(segments[storage], counts)
            offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            storage = starts + offset
            positions = np.column_stack([np.repeat(positions, counts, axis=0), indices[storage]])
        else:
            size = dimension.DenseSize()
            positions = np.column_stack([np.repeat(positions, size, axis=0), np.tile(np.arange(size), len(positions))])
            storage = (storage[:, None] * size + np.arange(size)).reshape(-1)
    places = np.zeros((len(positions), len(shape)), int)
    for level, axis in enumerate(order):
        if axis < len(shape):
            places[:, axis] += positions[:, level] * block_size.get(int(axis), 1)
        else:
            places[:, blocks[axis - len(shape)]] += positions[:, level]
    result[tuple(places.T)] = values[storage]
    return result


def integers(dimension: Any, name: str) -> np.ndarray:
    """Segments or indices of a sparse dimension, which are stored as one of three vector types."""
    import tflite

    kinds = {1: tflite.Int32Vector, 2: tflite.Uint16Vector, 3: tflite.Uint8Vector}
    vector = kinds[getattr(dimension, f"Array{name}Type")()]()
    table = getattr(dimension, f"Array{name}")()
    vector.Init(table.Bytes, table.Pos)
    return vector.ValuesAsNumpy().astype(int)


def executed_layers(network: nn.Module, size: int) -> list[nn.Module]:
    """The convolutions and PReLUs of a network in the order in which it executes them."""
    layers: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: layers.append(module))
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.PReLU)
    ]
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return layers


def fill(layers: list[nn.Module], constants: list[list[np.ndarray]]) -> None:
    """Copies constants into layers, which must agree in number and shapes."""
    for layer, values in zip(layers, constants, strict=True):
        for parameter, value in zip(layer.parameters(), values, strict=True):
            if parameter.shape != value.shape:
                raise ValueError(f"{layer}: a parameter of shape {tuple(parameter.shape)} gets {value.shape}")
            parameter.data = torch.from_numpy(value.astype(np.float16))


def order_of_mesh(constants: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Reorders the layers of the attention mesh from TensorFlow Lite's order, in which regions alternate, to ours.

    From 128 channels on each eye has a branch for its contour and one for its iris, which is left out.
    """
    mesh = AttentionMesh()
    layers = executed_layers(mesh, SIZE)
    trunk = layers.index(mesh.mesh) + 1
    presence, rest = constants[-1], constants[trunk:-1]
    lips = mesh.regions["lips"]
    assert isinstance(lips, Region)
    shared, own = len(layers_of(lips.body[:6])), len(layers_of(lips.body[6:])) + len(layers_of(lips.narrow)) + 1
    branches = {name: rest[index : 3 * shared : 3] for index, name in enumerate(REGIONS)}
    for index, name in ((0, "lips"), (1, "left_eye"), (3, "right_eye")):
        branches[name] = branches[name] + rest[3 * shared + index :: 5]
        assert len(branches[name]) == shared + own
    return constants[:trunk] + [values for name in REGIONS for values in branches[name]] + [presence]


def layers_of(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.PReLU)]


def main(config: ConvertConfig) -> None:
    """Writes the weights of all three networks."""
    with zipfile.ZipFile(config.wheel) as wheel:
        read = {
            name: list(Graph(wheel.read(f"{FOLDER}/{path}.tflite")).layers())
            for name, path in (
                ("full_range", "face_detection/face_detection_full_range_sparse"),
                ("short_range", "face_detection/face_detection_short_range"),
                ("mesh", "face_landmark/face_landmark_with_attention"),
            )
        }
    networks = {"full_range": FullRangeDetector(), "short_range": ShortRangeDetector(), "mesh": AttentionMesh()}
    # TensorFlow's depth to space has the coordinates of a face inside, torch's pixel shuffle has them outside.
    order = np.arange(8 * POINTS).reshape(4, 2 * POINTS).T.reshape(-1)
    read["full_range"][-2:] = [[values[order] for values in layer] for layer in read["full_range"][-2:]]
    read["mesh"] = order_of_mesh(read["mesh"])
    for name, size in (("full_range", 192), ("short_range", 128), ("mesh", SIZE)):
        fill(executed_layers(networks[name], size), read[name])
    tensors = nn.ModuleDict(networks).state_dict()
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, WEIGHTS)
    print(f"wrote {WEIGHTS}: {WEIGHTS.stat().st_size} bytes, {sum(t.numel() for t in tensors.values())} parameters")


if __name__ == "__main__":
    main(tyro.cli(ConvertConfig, description=__doc__))
