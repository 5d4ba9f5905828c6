"""What one training step asks of a GPU, counted and not timed: nodes of its CUDA graph, bytes, launches.

    python -m benchmarks.counts --json benchmarks/results/counts.json

Bytes are those of a model: each operation of the eager step reads its inputs once and writes its outputs once, whatever
caches do, and BatchNorm in training reads activations and gradients twice. Kernels of the `fused` engine are compiled for
an H100 (sm_90): registers of a thread, and bytes of the stack, where what did not fit into registers would be.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

from benchmarks import measure
from benchmarks.step import cifar_config, images
from fastrobust.data.loaders.resident import Resident
from fastrobust.models import fused
from fastrobust.runtime.operations import Operations
from fastrobust.train.step import build

TWICE = {  # which arguments are read twice: once for sums over the batch, once to make the result
    "aten.cudnn_batch_norm": (0,),
    "aten.cudnn_batch_norm_backward": (0, 1),
    "fastrobust.norm_relu": (0,),
    "fastrobust.norm_relu_backward": (0, 1),
}
VIEWS = re.compile(
    r"aten\.(detach|t|(_unsafe_)?view|expand|permute|select|slice|(un)?squeeze|alias|as_strided|transpose|unbind)"
)
EMPTY = re.compile(r"aten\.(new_)?empty(_like|_strided)?")


class Traffic(Operations):
    """Adds up the bytes and the operations of what runs inside."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.bytes = device, 0

    def size(self, t) -> int:
        return t.numel() * t.element_size() if isinstance(t, torch.Tensor) and t.device.type == self.device.type else 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        name = str(function._overloadpacket)
        if VIEWS.fullmatch(name) or EMPTY.fullmatch(name):
            return out
        given = {id(t): t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)}.values()
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        again = [args[k] for k in TWICE.get(name, ())]
        written = sum(map(self.size, made))
        if name.endswith("_") or "foreach" in name or "fused" in name or "amp" in name:  # in place
            first = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            written = max(written, sum(map(self.size, first)))
        self.bytes += sum(map(self.size, [*given, *again])) + written
        return out


class Kept(torch.cuda.CUDAGraph):
    """A graph that can be looked at after its capture; the last one is `Kept.last`."""

    last: Kept

    def __init__(self):
        super().__init__(keep_graph=True)
        Kept.last = self

    def nodes(self) -> int:
        """By CUDA's own count."""
        count, runtime = ctypes.c_size_t(), ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
        if runtime.cudaGraphGetNodes(ctypes.c_void_p(self.raw_cuda_graph()), None, ctypes.byref(count)):
            raise RuntimeError("CUDA did not count the nodes of a graph")
        return count.value


@contextmanager
def kernels_counted(traffic: Traffic):
    """Inside, the bytes of those of our kernels that are no operations of torch are added too."""
    from fastrobust.attack import threat_kernels
    from fastrobust.data import augment_kernels
    from fastrobust.models import pixel_kernels
    from fastrobust.train import update_kernels

    def watched(module, name: str, written: tuple[int, ...] = ()):
        """What the call reads, what it returns, and the arguments that it writes as well."""
        original = getattr(module, name)

        def call(*arguments):
            out = original(*arguments)
            more = [getattr(out, "seen", None), *(arguments[k] for k in written)]
            traffic.bytes += sum(map(traffic.size, [*arguments, out, *more]))
            return out

        return mock.patch.object(module, name, call)

    with (
        watched(update_kernels, "check"),
        watched(update_kernels, "sgd", (2, 3)),  # masters and momentum; the half weights are written only
        watched(threat_kernels, "climb"),
        watched(threat_kernels, "start"),
        watched(augment_kernels, "shift_flip"),
        watched(pixel_kernels, "normalise"),
    ):
        yield


def counted(method: str, engine: str, precision: str, batch_size: int, device: torch.device) -> dict:
    """Nodes, gigabytes, operations of one step. `as before` is `cuda_graph` with each BatchNorm counting its own batches."""
    if engine == "as before":
        with mock.patch.object(fused, "prepare", lambda *arguments: None):
            return counted(method, "cuda_graph", precision, batch_size, device)
    loader = Resident(images(4 * batch_size), device)
    batch = next(loader.batches(0, 0, batch_size, 0, 1))
    with mock.patch.object(torch.cuda, "CUDAGraph", Kept):
        build(cifar_config(method, engine, precision, batch_size), loader, device)(batch)
    eager = "fused" if "fused" in engine else "eager"
    step = build(cifar_config(method, eager, precision, batch_size), loader, device)
    for _ in range(2):
        step(batch)
    with Traffic(device) as traffic, kernels_counted(traffic):
        step(batch)
    return {"nodes": Kept.last.nodes(), "gigabytes": traffic.bytes / 1e9, "gflop": traffic.number / 1e9}


def compiled() -> list[dict]:
    """Registers and stack of every kernel, as the `fused` engine starts it in half precision."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from fastrobust.attack import threat_kernels as threat
    from fastrobust.data import augment_kernels as pixels
    from fastrobust.models import norm_kernels as norm
    from fastrobust.models import pixel_kernels as seen
    from fastrobust.train import update_kernels as update

    def sums(inputs: int) -> dict:
        rows, stages = norm.AHEAD[inputs]
        return {"BM": rows, "BC": 64, "BP": norm.PROGRAMS, "STAGES": stages}

    tile = {"BM": norm.ROWS, "BC": 64}
    jobs = [(norm._statistics, {"ADD": add, **sums(1 + add)}, 8) for add in (False, True)]
    jobs += [(norm._normalise, {"TRAIN": True, "BEFORE": False, "AFTER": after, **tile}, 4) for after in (False, True)]
    jobs += [(norm._sums_of_gradients, {"TRAIN": True, "AFTER": after, **sums(2 + after)}, 8) for after in (False, True)]
    jobs += [(norm._gradient, {"TRAIN": True, "SUM": add, "AFTER": not add, **tile}, 4) for add in (False, True)]
    jobs += [
        (update._check, {"B": update.BLOCK}, 4),
        (update._sgd, {"SCALED": True, "MOMENTUM": True, "B": update.BLOCK}, 4),
    ]
    jobs += [(threat._climb, {"PROJECT": True, "SEEN": True, "TENSOR_A": False, "TENSOR_R": False, "B": threat.BLOCK}, 4)]
    jobs += [(threat._start, {"CLIP": True, "SEEN": True, "TENSOR_R": False, "B": threat.BLOCK}, 4)]
    jobs += [(seen._normalise, {"B": seen.BLOCK}, 4)]
    jobs += [(pixels._shift_flip, {"FLIP": True, "RECIPROCAL": True, "B": pixels.BLOCK}, 4)]
    halves = {"x", "add", "z", "y", "dy", "dz", "dx", "dadd", "half", "half_gradient"}
    numbers = dict.fromkeys(("eps", "momentum", "unbiased", "decay", "alpha", "radius"), "fp32")
    numbers |= {
        "channels": "i32",
        "seen": "*fp16",
        "counter": "*i32",
        "images": "*u8",
        "top": "*i64",
        "left": "*i64",
        "H": "i32",
        "W": "i32",
        "padding": "i32",
    }
    whole = {"M", "C", "rows", "n", "cut", "begin", "end"}
    rows = []
    for kernel, constants, warps in jobs:
        names, fp32 = kernel.arg_names, kernel.fn.__module__ in (threat.__name__, pixels.__name__, seen.__name__)
        kinds = {name: numbers.get(name, "i32" if name in whole else "*fp32") for name in names}
        kinds |= {name: "*fp16" for name in names if name in halves and not fp32}
        kinds |= {"gradient": "*fp16"} if kernel is threat._climb else {}
        kinds |= dict.fromkeys(constants, "constexpr")
        places = [k for k, name in enumerate(names) if kinds[name].startswith("*") or name in whole]
        source = ASTSource(
            kernel,
            kinds,
            {(names.index(name),): value for name, value in constants.items()},
            {(k,): [["tt.divisibility", 16]] for k in places},
        )
        binary = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
        switches = [name for name, value in constants.items() if value is True]
        rows.append({"kernel": " ".join([kernel.__name__[1:], *switches]), "registers": registers, "stack": stack})
    return rows


def main() -> None:
    p = measure.arguments(__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=int, default=128)
    arguments = p.parse_args()
    device = torch.device("cuda")
    result = {"batch_size": arguments.batch_size, "precision": "fp16", "steps": {}, "kernels": compiled()}
    table = []
    for method in ("standard", "fgsm", "pgd-7"):
        for engine in ("as before", "cuda_graph", "fused+cuda_graph"):
            found = counted(method, engine, "fp16", arguments.batch_size, device)
            result["steps"][f"{method} {engine}"] = found
            table.append([method, engine, str(found["nodes"]), f"{found['gigabytes']:.2f}", f"{found['gflop']:.0f}"])
    for row in result["kernels"]:
        print(row)
    measure.report("counts", ["method", "engine", "graph nodes", "GB", "GFLOP"], table, result, arguments.json, device)


if __name__ == "__main__":
    main()
