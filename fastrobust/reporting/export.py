"""A trained model for use without fastrobust: fastrobust export RUN

RUN/export/model.py          the network and `load()`, in plain PyTorch
           weights.pt        its weights, a plain state_dict
           model.onnx        the same network for ONNX runtimes, any batch size
           README.md         the model card: data, threat model, every accuracy with its attack and n
           robustbench.json  the same in the form of a RobustBench entry
           robustbench.pt    the weights for RobustBench's own class of the network, where it has one
"""

import contextlib
import copy
import importlib.util
import inspect
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrobust.config import parts
from fastrobust.config.numbers import ball_in_words, describe, radius_in_words
from fastrobust.models import Normalized
from fastrobust.models.fused import norm_silu, plain_norm_relu
from fastrobust.models.weights import read_weights, weights_digest
from fastrobust.reporting import known, robustbench
from fastrobust.reporting.known import EXACT, EXACT_NOTE, OTHER_IMAGES, Known
from fastrobust.reporting.stored import Summary
from fastrobust.runtime.errors import FastrobustError, RunError, first_line, installing
from fastrobust.runtime.files import explained, write_atomically, write_json, write_text
from fastrobust.runtime.progress import duration
from fastrobust.runtime.torchvision_compat import import_torchvision

CHECKS = "Checks for masked gradients"


def command(arguments) -> int:
    """The export command."""
    path = Path(arguments.run)
    model, config, classes = read_weights(path)
    if not arguments.output and not path.is_dir():
        raise RunError(f"{path} is not a run directory: name a folder for the export with --output DIR")
    folder = Path(arguments.output) if arguments.output else path / "export"
    with explained(f"the folder {folder} cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    facts = known.read(path, weights_digest(model), model)

    save(folder / "weights.pt", {name: t.contiguous() for name, t in model.state_dict().items()})
    tensors = robustbench.state(model, config)
    if tensors is not None:
        save(folder / "robustbench.pt", tensors)
    write_text(folder / "model.py", snippet(config, classes))
    images = examples(config)
    check_snippet(folder, model, images)
    difference = write_onnx(folder / "model.onnx", model, images)
    write_text(folder / "README.md", card(config, classes, facts, onnx=difference is not None))
    write_json(folder / "robustbench.json", entry(config, facts))

    print(f"{folder}/: model.py with weights.pt (the same logits as the run's),")
    print(f"  README.md, robustbench.json{'' if tensors is None else ', robustbench.pt'}")
    if difference is None:
        print(f"model.onnx is left out: it needs onnx, onnxscript and onnxruntime:\n  {installing('export')}")
    else:
        print(f"  model.onnx (logits differ by at most {difference:.1e} in onnxruntime)")
    if arguments.json:
        rows = [row.to_dict() for row in facts.accuracies]
        print(json.dumps({"folder": str(folder), "onnx_difference": difference, "accuracies": rows}))
    return 0


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def examples(config):
    """16 random images as the model takes them, float 16 x C x H x W in [0, 1]."""
    side = config.phases[-1].resolution
    return torch.rand(16, len(config.model.mean), side, side, generator=torch.Generator().manual_seed(0))


def used_by(function) -> list:
    """The classes and functions of the module of one of our models, and of our modules from which it takes a network.
    Functions that make other models are left out."""
    makers = {path.rpartition(":")[2] for path in parts.MODELS.values()} - {function.__name__}
    module, found = inspect.getmodule(function), []
    for name, part in vars(module).items():
        home = inspect.getmodule(part)
        if home is module and name not in makers:
            found.append(part)
        elif inspect.isclass(part) and issubclass(part, nn.Module) and home.__name__.startswith("fastrobust.models."):
            found += [one for one in used_by(part) if one not in found]
    return found


def snippet(config, classes: tuple[str, ...]) -> str:
    """The source of model.py."""
    name, channels, source, imports = config.model.name, len(config.model.mean), "", ""
    options = "".join(f", {key}={value!r}" for key, value in (config.model.options or {}).items())
    if name in parts.MODELS:  # ours: the classes and the function that makes the network
        function = parts.find("model.name", parts.MODELS, name)
        source = "\n\n".join(map(inspect.getsource, used_by(function)))
        make = f"{function.__name__}({channels}, {len(classes)}{options})"
    elif ":" in name:
        place, _, function = name.partition(":")
        imports, make = f"from {place} import {function}\n", f"{function}({channels}, {len(classes)}{options})"
    elif name.startswith("timm/"):
        imports = "import timm\n"
        make = f"timm.create_model({name.removeprefix('timm/')!r}, num_classes={len(classes)}, in_chans={channels}{options})"
    else:
        imports = "import torchvision\n"
        extra = ", aux_logits=False, init_weights=True" if name in ("googlenet", "inception_v3") else ""
        make = f"torchvision.models.get_model({name!r}, weights=None, num_classes={len(classes)}{extra}{options})"
    for plain in (plain_norm_relu, norm_silu):
        usual = plain.__name__.removeprefix("plain_")
        if re.search(rf"\b{usual}\b", source):
            source = f"{inspect.getsource(plain).replace(plain.__name__, usual)}\n\n{source}"
    source = f"{source}\n\n{inspect.getsource(Normalized)}".lstrip()
    return f'''"""{config.name}: {name}, trained with fastrobust. `load()` gives it in eval mode, ready to use:

    logits = load()(images)   # images: float N x {channels} x H x W in [0, 1]; the normalisation is inside
"""

from __future__ import annotations

from pathlib import Path

{imports}import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = {list(classes)!r}


{source}

def load(weights: str | Path = Path(__file__).with_name("weights.pt")) -> nn.Module:
    model = Normalized({make}, {tuple(config.model.mean)!r}, {tuple(config.model.std)!r})
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()
'''


def check_snippet(folder: Path, model, images) -> None:
    """model.py gives the model's logits. Raises RunError."""
    with contextlib.suppress(ImportError):
        import_torchvision()  # so that a snippet that needs it can import it beside any torch
    spec = importlib.util.spec_from_file_location("fastrobust_exported_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad():
        if not torch.equal(module.load()(images), model(images)):
            raise RunError(f"{folder / 'model.py'} does not give the run's logits; please report this")


def write_onnx(path: Path, model, images) -> float | None:
    """Writes the model and returns by how much its logits in onnxruntime differ at most, or None without the packages.
    Raises RunError, and leaves no file, if that is more than rounding."""

    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        return None
    plain = copy.deepcopy(model)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            shapes = ({0: torch.export.Dim("batch", min=1)},)
            names = {"input_names": ["images"], "output_names": ["logits"]}
            program = torch.onnx.export(plain, (images[:4],), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        content = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            expected = model(images)
        found = [torch.from_numpy(session.run(None, {"images": x.numpy()})[0]) for x in (images, images[:1])]
    except Exception as error:  # the exporter and the runtime raise errors of many kinds
        raise FastrobustError(f"the model cannot be exported to ONNX: {first_line(error)}") from None
    difference = max((found[0] - expected).abs().max().item(), (found[1] - expected[:1]).abs().max().item())
    if not difference <= 1e-4 * (1 + expected.abs().max().item()):
        raise FastrobustError(f"the ONNX model's logits differ by {difference:.3g} from the run's: it is not written")
    write_atomically(path, lambda file: file.write(content))
    return difference


REACH = {
    "linf": "every pixel by at most epsilon (L-infinity)",
    "l2": "the image by at most epsilon in the L2 norm over all pixels and channels",
}


def card(config, classes: tuple[str, ...], facts: Known, onnx: bool) -> str:
    """The model card, Markdown."""
    images = facts.summary and facts.summary.training_images  # version 0.1 did not count them
    used = f"{images:,} training images" if images else "its training images"
    tested = facts.summary.tested_on if facts.summary and "held-out" in facts.summary.tested_on else "its test images"
    side, usage = config.phases[-1].resolution, robustbench.usage(config, len(classes))
    paragraphs = [
        f"# {config.name}",
        f"An image classifier ({config.model.name}, {len(classes)} classes) trained with fastrobust to withstand "
        f"adversarial examples at {ball_in_words(config.epsilon, config.norm)}.",
        "## Data",
        f"Trained on {config.data.dataset} ({used}), evaluated on {tested}, {side} x {side} pixels.\n"
        f"Classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}.",
        "## Threat model",
        f"Pixels are in [0, 1]. An attacker knows the model and may change {REACH[config.norm]}, and\n"
        "the changed image stays in [0, 1]. Nothing is claimed about other changes (other norms, rotations, blur,\n"
        "corruptions), larger radii, or other data.",
        "## Accuracy",
        *([facts.left_out] if facts.left_out else []),
        accuracy_table(facts),
        *(
            f"{CHECKS} at {ball_in_words(m.epsilon, m.norm)} ({m.examples:,} images{facts.which(m)}): {m.in_words()}."
            for m in facts.masking
        ),
        *([] if facts.masking else [f"{CHECKS} were not made."]),
        "## Training",
        training(config, facts.summary),
        "## Use",
        "```python\nfrom model import CLASSES, load\n\n"
        "logits = load()(images)  # float N x C x H x W in [0, 1]; the normalisation is inside\n```",
        *(["`model.onnx` takes the same images (input `images`, output `logits`)."] if onnx else []),
        *([f"With RobustBench's own class:\n\n```python\n{usage}\n```"] if usage else []),
    ]
    return "\n\n".join(paragraphs) + "\n"


def accuracy_table(facts: Known) -> str:
    if not facts.accuracies:
        return "None is known for these weights."
    lines = ["| attack | epsilon | accuracy | 95 % interval | test images |", "|---|---|---|---|---|"]
    for row in facts.accuracies:
        low, high = row.interval
        cells = [
            row.attack + row.unusual,
            radius_in_words(row.epsilon, row.norm),
            row.in_words(),
            f"{low:.2%} to {high:.2%}",
            f"{row.examples}{facts.which(row)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Accuracy under an attack is an upper bound: a stronger attack may find more. The interval (Wilson) is about",
        "the choice of test images alone.",
    ]
    if any(row.attack == EXACT for row in facts.accuracies):
        lines += ["", EXACT_NOTE]
    if any(found.other for found in (*facts.accuracies, *facts.masking)):
        lines += ["", OTHER_IMAGES]
    return "\n".join(lines)


def training(config, summary: Summary | None) -> str:
    plain = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    settings = "".join(f", {key} {plain(value)}" for key, value in vars(config.method).items() if key != "name")
    radius = ball_in_words(config.epsilon, config.norm)
    lines = [f"Method {config.method.name}{settings}; {radius}, {config.epochs} epochs, seed {config.seed}."]
    for found in summary.recovered if summary else ():
        went = f"It overfitted in epoch {found['epoch']}, went back to epoch {found['went_back_to']}"
        lines.append(f"{went}, and on with {found['method']}.")
    if summary and summary.stopped:
        lines.append(f"It was {summary.stopped}.")
    if summary and "device" in summary.hardware:
        lines.append(f"It took {duration(summary.train_seconds)} on {summary.hardware['device']}.")
    return "\n".join(lines)


def entry(config, facts: Known) -> dict[str, Any]:
    """The fields of RobustBench's model_info files; accuracies in percent, as text. What is not known is null: of
    the summary's accuracy too, where what is quoted is of another radius, of another number of images or of other images."""
    percent = lambda value: None if value is None else f"{100 * value:.2f}"
    first, auto = facts.summary and facts.summary.evaluations[0], facts.autoattack
    quoted = auto or first  # both have a norm, an epsilon and a number of examples
    about = lambda found: (found.norm, found.epsilon, found.examples)
    alike = first and about(first) == about(quoted) and not (auto and auto.other)
    architecture = {
        "preact_resnet18": "PreActResNet-18",
        "mnist_net": "2 convolutions, 2 linear layers (Tjeng et al., 2017)",
    }
    norm = "" if not quoted or quoted.norm == "linf" else f", in the {quoted.norm.upper()} norm"
    return {
        "link": None,
        "name": config.name,
        "authors": None,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": config.data.dataset,
        "venue": "Unpublished",
        "architecture": architecture.get(config.model.name, config.model.name),
        "eps": describe(quoted.epsilon if quoted else config.epsilon),
        "clean_acc": percent(facts.autoattack_clean if auto else first and first.clean_accuracy),
        "reported": percent(first.robust_accuracy if alike else None),
        "autoattack_acc": percent(auto and auto.accuracy),
        "footnote": f"Measured on {quoted.examples} test images{norm}." if quoted else None,
    }
