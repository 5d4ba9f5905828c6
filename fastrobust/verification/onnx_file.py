"""A network in an ONNX file, run by torch's functions, which `lowering` knows."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.runtime.errors import FastrobustError, first_line, installing
from fastrobust.runtime.files import explained

FLOATS, WHOLE = (1, 11), (6, 7)  # ONNX's numbers of float and double, int32 and int64
TAKEN = "Conv, Gemm, MatMul, BatchNormalization, average and max pooling, Pad, sums, Relu and what only moves values are"


class OnnxNetwork:
    """A file's network of one input and one output. shape: of the input, with 1 where the file leaves a size open.
    reference: its output by onnxruntime, as the competition judges counterexamples, float32. Raises FastrobustError."""

    def __init__(self, path: Path):
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise FastrobustError(f"ONNX files need {error.name}: {installing('verify')}") from None
        with explained(f"{path} cannot be read"):
            content = path.read_bytes()
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        try:
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            model = onnx.load_from_string(content)
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # what is no ONNX file, or one with parts elsewhere, raises many things
            raise FastrobustError(f"{path} is not an ONNX file that can be used: {first_line(error)}") from None
        graph, array = model.graph, onnx.numpy_helper.to_array
        self.tensors = {t.name: torch.from_numpy(np.array(array(t))) for t in graph.initializer}
        inputs = [i for i in graph.input if i.name not in self.tensors]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise FastrobustError(f"{path}: it has {len(inputs)} inputs and {len(graph.output)} outputs, not one of each")
        self.path, self.input, self.output = path, inputs[0].name, graph.output[0].name
        self.shape = tuple(d.dim_value or 1 for d in inputs[0].type.tensor_type.shape.dim)
        self.nodes = []
        for node in graph.node:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            values = {
                k: torch.from_numpy(np.array(array(v))) if isinstance(v, onnx.TensorProto) else v for k, v in values.items()
            }
            self.nodes.append((node.op_type, node.name or node.output[0], values, list(node.input), list(node.output)))
        self.reference = lambda x: torch.from_numpy(session.run(None, {self.input: x.numpy()})[0])

    def __call__(self, x: Any) -> Any:
        """The output for one input of its shape, a tensor or an Expression; floats are of the input's precision."""
        known = {name: t.to(x.dtype) if t.is_floating_point() else t for name, t in self.tensors.items()} | {"": None}
        known[self.input] = x
        for kind, name, attributes, inputs, outputs in self.nodes:
            try:
                if kind not in OPERATORS or len(outputs) != 1:
                    raise FastrobustError("there is no such operator here")
                made = OPERATORS[kind](attributes, *(known[i] for i in inputs))
            except (FastrobustError, RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                words = f"{kind} ('{name}') is not supported: {first_line(error)}. {TAKEN}"
                raise FastrobustError(f"{self.path}: {words}") from None
            constant = isinstance(made, Tensor) and made.is_floating_point()
            known[outputs[0]] = made.to(x.dtype) if constant else made
        return known[self.output]


def _pads(attributes: dict, dims: int) -> list[int]:
    """As torch's `pad` takes them: the last dimension first, what is before it and after it."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise FastrobustError(f"auto_pad {attributes['auto_pad'].decode()}")
    return _pairs(attributes.get("pads", [0] * 2 * dims))


def _pairs(pads: list[int]) -> list[int]:
    half = len(pads) // 2
    return [pads[k] for i in reversed(range(half)) for k in (i, i + half)]


def _conv(attributes: dict, x, weight: Tensor, bias: Tensor | None = None):
    dims = weight.dim() - 2
    pads, ones = _pads(attributes, dims), [1] * dims
    if any(pads):
        x = F.pad(x, pads)
    options = {"stride": attributes.get("strides", ones), "dilation": attributes.get("dilations", ones)}
    return getattr(F, f"conv{dims}d")(x, weight, bias, **options, groups=attributes.get("group", 1))


def _gemm(attributes: dict, a, b: Tensor, c: Tensor | None = None):
    a, b = a.transpose(0, 1) if attributes.get("transA") else a, b.transpose(0, 1) if attributes.get("transB") else b
    made = attributes.get("alpha", 1.0) * (a @ b)
    return made if c is None else made + attributes.get("beta", 1.0) * c


def _batch_norm(attributes: dict, x, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor):
    if attributes.get("training_mode"):
        raise FastrobustError("it is in training mode")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, attributes.get("epsilon", 1e-5))


def _average_pool(attributes: dict, x):
    kernel = attributes["kernel_shape"]
    pads = _pads(attributes, len(kernel))
    outside = bool(attributes.get("count_include_pad"))
    if attributes.get("ceil_mode") or attributes.get("dilations", kernel[:0]) not in ([], [1] * len(kernel)):
        raise FastrobustError("ceil_mode or dilations")
    if outside and any(pads):
        x, pads = F.pad(x, pads), [0] * len(pads)
    if pads[::2] != pads[1::2]:
        raise FastrobustError("different pads at the two sides, which are not counted")
    pool = getattr(F, f"avg_pool{len(kernel)}d")
    return pool(x, kernel, attributes.get("strides", [1] * len(kernel)), pads[::-2], False, outside)


def _max_pool(attributes: dict, x):
    kernel = attributes["kernel_shape"]
    ones = [1] * len(kernel)
    if any(_pads(attributes, len(kernel))) or attributes.get("ceil_mode") or attributes.get("dilations", ones) != ones:
        raise FastrobustError("pads, ceil_mode or dilations")
    return getattr(F, f"max_pool{len(kernel)}d")(x, kernel, attributes.get("strides", ones))


def _pad(attributes: dict, x, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None):
    mode = attributes.get("mode", b"constant").decode()
    given = attributes["pads"] if pads is None else pads.tolist()
    whole = [0] * (2 * x.dim())
    for k, axis in enumerate(range(x.dim()) if axes is None else axes.tolist()):
        whole[axis % x.dim()], whole[axis % x.dim() + x.dim()] = given[k], given[k + len(given) // 2]
    pairs = _pairs(whole)
    while len(pairs) > 2 and not any(pairs[-2:]):
        pairs = pairs[:-2]
    if not any(pairs):
        return x
    if mode == "constant":
        return F.pad(x, pairs, value=attributes.get("value", 0.0) if value is None else value.item())
    return F.pad(x, pairs, mode={"edge": "replicate", "wrap": "circular"}.get(mode, mode))


def _reshape(attributes: dict, x, shape: Tensor):
    sizes = [x.shape[i] if size == 0 and not attributes.get("allowzero") else size for i, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


def _slice(attributes: dict, x, starts=None, ends=None, axes=None, steps=None):
    starts, ends = (attributes[k] if t is None else t.tolist() for k, t in (("starts", starts), ("ends", ends)))
    axes = attributes.get("axes", range(len(starts))) if axes is None else axes.tolist()
    place = [slice(None)] * len(x.shape)
    for axis, start, end, step in zip(
        axes, starts, ends, [1] * len(starts) if steps is None else steps.tolist(), strict=True
    ):
        place[axis] = slice(start, end, step)
    return x[tuple(place)]


def _axes(attributes: dict, axes: Tensor | None) -> list[int] | None:
    return attributes.get("axes") if axes is None else axes.tolist()


def _reduced(name: str):
    def reduce(attributes: dict, x, axes: Tensor | None = None):
        dims = _axes(attributes, axes) or list(range(len(x.shape)))
        return getattr(x, name)(dims, keepdim=bool(attributes.get("keepdims", 1)))

    return reduce


def _squeeze(attributes: dict, x, axes: Tensor | None = None):
    chosen = _axes(attributes, axes)
    size = len(x.shape)
    gone = [i for i in range(size) if x.shape[i] == 1] if chosen is None else [a % size for a in chosen]
    return x.reshape([x.shape[i] for i in range(size) if i not in gone])


def _unsqueeze(attributes: dict, x, axes: Tensor | None = None):
    chosen = _axes(attributes, axes)
    size = len(x.shape) + len(chosen)
    rest = iter(x.shape)
    fresh = {a % size for a in chosen}
    return x.reshape([1 if i in fresh else next(rest) for i in range(size)])


def _flatten(attributes: dict, x):
    axis = attributes.get("axis", 1) % (len(x.shape) + 1) if attributes.get("axis", 1) < 0 else attributes.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _gather(attributes: dict, x, indices: Tensor):
    axis = attributes.get("axis", 0) % max(1, len(x.shape))
    return x[(slice(None),) * axis + (indices,)]


def _cast(attributes: dict, x):
    kind = attributes["to"]
    if kind in FLOATS:
        return x.to(torch.float64) if isinstance(x, Tensor) else x
    if kind not in WHOLE or not isinstance(x, Tensor):  # whole numbers are of shapes
        raise FastrobustError(f"a Cast to type {kind} of ONNX rounds; float and double are taken")
    return x.to(torch.int64)


def _constant(attributes: dict):
    (value,) = attributes.values()
    return value if isinstance(value, Tensor) else torch.tensor(value)


OPERATORS = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda _, a, b: torch.matmul(a, b),
    "Add": lambda _, a, b: torch.add(a, b),
    "Sub": lambda _, a, b: torch.sub(a, b),
    "Mul": lambda _, a, b: torch.mul(a, b),
    "Div": lambda _, a, b: torch.div(a, b),
    "Neg": lambda _, x: torch.neg(x),
    "Sum": lambda _, *terms: sum(terms[1:], terms[0]),
    "Relu": lambda _, x: torch.relu(x),
    "LeakyRelu": lambda attributes, x: F.leaky_relu(x, attributes.get("alpha", 0.01)),
    "Max": lambda _, first, *others: first if not others else torch.maximum(first, OPERATORS["Max"](_, *others)),
    "BatchNormalization": _batch_norm,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": lambda _, x: x.mean(list(range(2, len(x.shape))), keepdim=True),
    "ReduceMean": _reduced("mean"),
    "ReduceSum": _reduced("sum"),
    "Pad": _pad,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": lambda attributes, x: x.permute(attributes.get("perm", list(range(len(x.shape)))[::-1])),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda attributes, *parts: torch.cat(parts, attributes["axis"]),
    "Slice": _slice,
    "Gather": _gather,
    "Shape": lambda _, x: torch.tensor(x.shape),
    "Cast": _cast,
    "Constant": _constant,
    "Identity": lambda _, x: x,
    "Dropout": lambda _, x, *rest: x,
}
