"""Models of torch, and whatever is written with torch's functions, as a `Network`.

The model is run once on an `Expression` in place of an image. Each function of torch is asked for in `call`: an affine one
is carried on as it is, a ReLU makes a new value, and anything else is refused by name. Matrices are found at the end, column
by column, by the functions themselves, without their biases; so there is no second formula for any layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from scipy import sparse
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fastrobust.runtime.errors import FastrobustError, first_line
from fastrobust.verification.network import DTYPE, Network, Sum

SAME = {"contiguous", "clone", "detach", "to", "float", "double", "dropout", "dropout1d", "dropout2d", "dropout3d"}
SHAPES = {"size", "dim", "numel", "is_contiguous", "stride", "is_floating_point"}
LISTS = {"cat", "concat", "stack"}
SUMS = LISTS | {"add", "sub"}  # of expressions and constants, which only shift the result
PRODUCTS = {"mul", "multiply", "matmul"}  # of an expression and a constant, in any order
BIASED = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
LINEAR = BIASED | {  # in the first thing that they take
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "movedim", "swapaxes", "getitem"),
    *("expand", "narrow", "select", "flip", "roll", "pad", "neg", "div", "truediv", "true_divide", "mean", "sum"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
}  # fmt: skip
TAKEN = "Convolutions, linear layers, BatchNorm, pooling, padding, sums, concatenation, Flatten, ReLU and LeakyReLU are"
AT_ONCE = 2**24  # numbers that a function makes at a time while its matrix is found


class Expression:
    """A sum of linear functions of values and a constant, `shift`. parts: the function of each."""

    def __init__(self, graph: Graph, parts: dict[int, Callable[[Tensor], Tensor]], shift: Tensor):
        self.graph, self.parts, self.shift = graph, parts, shift

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("graph", "parts", "shift"):
            raise AttributeError(name)
        found = getattr(self.shift, name)
        if isinstance(found, Tensor):
            raise FastrobustError(f"a tensor's .{name} is not supported")
        if not callable(found) or name in SHAPES:
            return found
        return lambda *args, **kwargs: call(getattr(Tensor, name), (self, *args), kwargs)

    def __len__(self) -> int:
        return len(self.shift)

    def matrices(self) -> Sum:
        return Sum({s: self.matrix(s) for s in self.parts}, self.shift.flatten().numpy())

    def matrix(self, s: int) -> sparse.csr_array:
        """Columns that reach different outputs, such as those of pixels far apart, are found together: first which outputs
        each row of an image reaches, then the columns of one row and of others that meet none of its outputs."""
        shape, made = self.graph.shapes[s], self.shift.shape
        width, across = shape[-1], made[-1] if made else 1
        size, outputs = math.prod(shape), self.shift.numel()
        rows, at_once = size // width, max(1, AT_ONCE // max(size, outputs))

        def probed(points: Tensor) -> Tensor:
            """points: N x rows x width."""
            return torch.vmap(self.parts[s])(points.reshape(-1, *shape)).flatten(1)

        any_ = torch.rand(width, dtype=DTYPE, generator=torch.Generator().manual_seed(0)) + 0.5
        reached = torch.zeros(rows, outputs // across, dtype=torch.bool)
        for some in torch.arange(rows).split(at_once):
            points = torch.zeros(len(some), rows, width, dtype=DTYPE)
            points[torch.arange(len(some)), some] = any_
            reached[some] = (probed(points) != 0).view(len(some), -1, across).any(2)
        where, column, values = [], [], []
        for group in apart(reached):
            owner = (reached[group].int() * torch.tensor(group)[:, None]).sum(0)
            for some in torch.arange(width).split(at_once):
                points = torch.zeros(len(some), rows, width, dtype=DTYPE)
                points[torch.arange(len(some))[:, None], torch.tensor(group), some[:, None]] = 1
                found = probed(points)
                n, output = found.nonzero(as_tuple=True)
                where.append(output)
                column.append(owner[output // across] * width + some[n])
                values.append(found[n, output])
        place = torch.cat(where).int().numpy(), torch.cat(column).int().numpy()
        matrix = sparse.csr_array((torch.cat(values).numpy(), place), shape=(outputs, size))
        matrix.sort_indices()
        return matrix


def apart(reached: Tensor) -> list[list[int]]:
    """Groups of rows that have no output in common. reached: which outputs each row reaches, bool rows x outputs."""
    taken, groups = torch.zeros_like(reached), []
    for row, outputs in enumerate(reached):
        free = (~(taken[: len(groups)] & outputs).any(1)).nonzero()[:, 0].tolist()
        if free:
            groups[free[0]].append(row)
        else:
            groups.append([row])
        taken[free[0] if free else len(groups) - 1] |= outputs
    return groups


def _operator(name: str) -> Callable:
    """A method of Expression for an operator of Python."""

    def method(self, *others):
        return call(getattr(Tensor, name), (self, *others), {})

    return method


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg", "getitem"):
    setattr(Expression, f"__{_name}__", _operator(f"__{_name}__"))


class Graph:
    """What a model was found to compute so far: the ReLUs, and the shape of every value."""

    def __init__(self, shape: tuple[int, ...]):
        self.relus: list[Sum] = []
        self.shapes = [shape]

    def value(self, number: int) -> Expression:
        return Expression(self, {number: lambda t: t}, torch.zeros(self.shapes[number], dtype=DTYPE))

    def relu(self, z: Expression) -> Expression:
        found = z.matrices()
        if 0 not in found.parts and min([found.shift.min(), *(w.min() for w in found.parts.values())]) >= 0:
            return z  # what is never negative: a ReLU of a ReLU
        self.relus.append(found)
        self.shapes.append(tuple(z.shift.shape))
        return self.value(len(self.relus))


def call(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a function of torch gives for arguments with expressions among them. Raises FastrobustError."""
    name = function.__name__.strip("_")
    if function.__name__ == f"{name}_" or kwargs.pop("inplace", False):  # all who hold the argument see what becomes of it
        made = call(function if function.__name__ == name else getattr(torch, name), args, kwargs)
        args[0].parts, args[0].shift = made.parts, made.shift
        return args[0]
    args, kwargs = tree_map(_copied, (args, kwargs))
    if name in SAME and not kwargs.get("training"):
        return args[0]
    if name in RULES:
        return RULES[name](*args, **kwargs)
    given = [e for e in tree_flatten((args, kwargs))[0] if isinstance(e, Expression)]
    alone = len(given) == 1 and (name.lstrip("r") in PRODUCTS or (name in LINEAR and given[0] is args[0]))
    if not alone and name.lstrip("r") not in SUMS:
        raise FastrobustError(f"torch's {name} is not supported")
    shift = _run(function, args, kwargs, lambda e: e.shift)
    if name.lstrip("r") in SUMS:
        summed = 1 if name in LISTS else 2
        args = (*tree_map(_zero, args[:summed]), *args[summed:])
    elif name in BIASED:
        args, kwargs = (*args[:2], None, *args[3:]), {key: kwargs[key] for key in kwargs if key != "bias"}
    elif name == "pad":
        args, kwargs = args[:3], {key: kwargs[key] for key in kwargs if key != "value"}

    def part(s: int) -> Callable[[Tensor], Tensor]:
        one = lambda t, e: e.parts[s](t) if s in e.parts else torch.zeros_like(e.shift)
        return lambda t: _run(function, args, kwargs, partial(one, t))

    return Expression(given[0].graph, {s: part(s) for e in given for s in e.parts}, shift)


def _run(function: Callable, args: tuple, kwargs: dict[str, Any], tensor: Callable[[Expression], Tensor]) -> Tensor:
    """With a tensor for each expression."""
    args, kwargs = tree_map(lambda a: tensor(a) if isinstance(a, Expression) else a, (args, kwargs))
    return function(*args, **kwargs)


def _copied(a: Any) -> Any:
    return Expression(a.graph, a.parts, a.shift) if isinstance(a, Expression) else a


def _zero(a: Any) -> Any:
    return a if isinstance(a, Expression) else torch.zeros_like(a) if isinstance(a, Tensor) else 0


def _batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5) -> Expression:
    if training or mean is None:
        raise FastrobustError("BatchNorm without running averages is not supported")
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    wide = (-1, *[1] * (x.dim() - 2))
    return x * scale.view(wide) + shift.view(wide)


def _maximum(a, b) -> Expression:
    return a + torch.relu(b - a)


def _leaky_relu(x, negative_slope=0.01, *_) -> Expression:
    return negative_slope * x + (1 - negative_slope) * torch.relu(x)


def _max_pool2d(x, kernel, stride=None, padding=0, dilation=1, ceil_mode=False, **_) -> Expression:
    pair = lambda size: (size, size) if isinstance(size, int) else tuple(size)
    if pair(padding) != (0, 0) or pair(dilation) != (1, 1) or ceil_mode:
        raise FastrobustError("max pooling with padding, dilation or ceil_mode is not supported")
    (height, width), (down, right) = pair(kernel), pair(stride or kernel)
    ends = (x.shape[2] - height + 1, x.shape[3] - width + 1)
    parts = [x[:, :, i : ends[0] + i : down, j : ends[1] + j : right] for i in range(height) for j in range(width)]
    return reduce(_maximum, parts)


RULES = {
    "batch_norm": _batch_norm,
    "relu": lambda x, *_: x.graph.relu(x),
    "leaky_relu": _leaky_relu,
    "maximum": _maximum,
    "max_pool2d": _max_pool2d,
}


def lower(run: Callable[[Expression], Expression], shape: tuple[int, ...]) -> Network:
    """The network of a function of one input of this shape that is made of torch's functions."""
    graph = Graph(shape)
    outputs = run(graph.value(0))
    if not isinstance(outputs, Expression):
        raise FastrobustError(f"it gives {type(outputs).__name__}, not something that depends on its input")
    return Network(tuple(graph.relus), outputs.matrices())


def lower_model(model: nn.Module, shape: tuple[int, ...]) -> Network:
    """The network of a model as it is in eval mode. shape: of one image, C x H x W. Raises FastrobustError, which names the
    layer that cannot be verified."""
    model = copy.deepcopy(model).to("cpu", DTYPE, memory_format=torch.contiguous_format).eval().requires_grad_(False)
    inside: list[str] = []
    for name, module in model.named_modules():
        said = f"{type(module).__name__} ('{name}')" if name else type(module).__name__
        module.register_forward_pre_hook(lambda _, __, said=said: inside.append(said))
        module.register_forward_hook(lambda *_: inside.pop() and None)
    x = torch.rand(4, *shape, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    try:
        network = lower(model, (1, *shape))
        expected = model(x).flatten(1)
    except (FastrobustError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        where = inside[-1] if inside else type(model).__name__
        raise FastrobustError(f"verification: {where} is not supported: {first_line(error)}. {TAKEN}") from error
    check(network, x, expected)
    return network


def check(network: Network, x: Tensor, expected: Tensor) -> None:
    """Raise FastrobustError unless the network gives what the model gives, both in double precision."""
    error, scale = (network(x) - expected).abs().max().item(), max(1.0, expected.abs().max().item())
    if not error <= 1e-9 * scale:
        raise FastrobustError(
            f"verification: the model gives other outputs than its layers do (by {error:.2g}): it changes tensors in place, "
            "or computes with their values"
        )
