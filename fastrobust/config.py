"""The schema of a run: strict, typed, and written as people write it (`epsilon: 8/255`).

`load("configs/mnist_fgsm.yaml", ["seed=1"])` gives a `Config` in which every default has been filled in, so that what is
stored with a run says everything that the run did. A mistake raises `ConfigError` that names the key and the nearest
right one. Pixels are in [0, 1]: epsilon and alpha are fractions of that range.
"""

from __future__ import annotations

import difflib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fastrobust.errors import ConfigError


def parse_number(value: Any) -> Any:
    """`8/255`, `5e-3` (a string in YAML 1.1) and plain numbers -> float; anything else is left for the schema to refuse."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", ""))) if "/" in value else float(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"'{value}' is not a number; write 0.03 or 8/255") from None
    if isinstance(value, bool):
        raise ValueError("expected a number, got true/false")
    return value


def _pixels(value: float) -> float:
    if value > 1:
        raise ValueError(f"{value:g} is larger than the pixel range [0, 1]; did you mean {value:g}/255?")
    return value


def _mean(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(not 0 <= v <= 1 for v in values):
        raise ValueError("must lie in [0, 1]: pixels are divided by 255")
    return values


def _some(values: tuple) -> tuple:
    if not values:
        raise ValueError("at least one value is needed")
    return values


def _std(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(v <= 0 for v in values):
        raise ValueError("must be positive")
    return values


Number = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Pixels = Annotated[Number, Field(ge=0), AfterValidator(_pixels)]
Count = Annotated[int, Field(ge=1, le=10**9, strict=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Augment(Section):
    """Applied on the training device, batch by batch. `pad` is the random crop with zero padding of the CIFAR-10 recipe."""

    crop: Literal["none", "pad", "random_resized"] = "none"
    padding: Count = 4
    flip: bool = False


class Data(Section):
    dataset: Literal["mnist", "fashion_mnist", "cifar10", "image_folder"]
    path: str | None = None
    download: bool = False
    limit: Count | None = None
    augment: Augment = Augment()


class Model(Section):
    """`mean` and `std` are in units of pixels in [0, 1]; the normalisation they describe is the model's first layer."""

    name: str
    mean: Annotated[tuple[Number, ...], AfterValidator(_mean)] | None = None
    std: Annotated[tuple[Number, ...], AfterValidator(_std)] | None = None


class Standard(Section):
    name: Literal["standard"]


class Attacked(Section):
    """`attack_batchnorm`: `train` (the authors' code) lets the attack pass use batch statistics and move the running
    averages; `eval` makes it use the running averages and leave them alone."""

    attack_batchnorm: Literal["train", "eval"] = "train"


class Fgsm(Attacked):
    name: Literal["fgsm"]
    init: Literal["zero", "random", "previous"] = "random"
    alpha: Pixels | None = None  # default 1.25 epsilon
    clip_start: bool = (
        True  # random starts are cut with the pixel box: so in the authors' CIFAR-10 code, not in their MNIST code
    )


class NFgsm(Attacked):
    name: Literal["n_fgsm"]
    noise: Positive = 2.0  # the start is U(-noise * epsilon, noise * epsilon)
    alpha: Pixels | None = None  # default epsilon


class Pgd(Attacked):
    name: Literal["pgd"]
    steps: Count = 7
    alpha: Pixels
    init: Literal["zero", "random"] = "random"
    skip_misclassified: bool = False  # true in the authors' MNIST code: such examples stay where they are


class Free(Section):
    name: Literal["free"]
    replays: Count = 8


class Sgd(Section):
    name: Literal["sgd"]
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 5e-4
    decay_batchnorm: bool = True


class Adam(Section):
    name: Literal["adam"]
    weight_decay: NonNegative = 0.0
    decay_batchnorm: bool = True


class Cyclic(Section):
    """0 -> max_lr at `peak` (a fraction of training) -> 0, linear in between (paper, section 5.2: 2/5)."""

    name: Literal["cyclic"]
    max_lr: Positive
    peak: Annotated[Number, Field(gt=0, lt=1)] = 0.4


class Multistep(Section):
    """`lr`, multiplied by `factor` at each milestone (fractions of training)."""

    name: Literal["multistep"]
    lr: Positive
    milestones: tuple[Annotated[Number, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    factor: Positive = 0.1


class Points(Section):
    """Linear interpolation between (epoch, learning rate) pairs."""

    name: Literal["points"]
    points: Annotated[tuple[tuple[NonNegative, NonNegative], ...], AfterValidator(_some)]

    @model_validator(mode="after")
    def _sorted(self):
        epochs = [epoch for epoch, _ in self.points]
        if epochs != sorted(epochs):
            raise ValueError("the epochs of the points must not decrease")
        return self


class Phase(Section):
    """`resolution` is the side of the images that the model sees; `resize` the side of those they are cropped from."""

    epochs: Count
    batch_size: Count
    resolution: Count | None = None
    resize: Count | None = None


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads `off` as false


class Guard(Section):
    """PGD on one training minibatch after each epoch (paper, appendix B): a fall of robust accuracy by more than `drop`
    from one epoch to the next is catastrophic overfitting. alpha defaults to epsilon / 4 (2/255 at epsilon 8/255)."""

    action: Annotated[Literal["stop", "warn", "off"], BeforeValidator(_off)] = "stop"
    steps: Count = 5
    alpha: Pixels | None = None
    drop: Annotated[Number, Field(gt=0, lt=1)] = 0.2


class Evaluation(Section):
    """PGD on the test set. epsilon defaults to the training epsilon; alpha to epsilon / 4."""

    epsilon: Annotated[tuple[Pixels, ...], AfterValidator(_some)] | None = None
    alpha: Pixels | None = None
    steps: Count = 50
    restarts: Count = 10
    batch_size: Count = 500
    limit: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_epsilon(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("epsilon"), (int, float, str)):
            return {**data, "epsilon": [data["epsilon"]]}
        return data


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    engine: Literal["auto", "eager", "compile", "cuda_graph", "compile+cuda_graph"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    epsilon: Pixels
    epsilon_warmup: NonNegative = 0.0  # epochs over which epsilon and alpha grow linearly from 0
    data: Data
    model: Model
    method: Annotated[Standard | Fgsm | NFgsm | Pgd | Free, Field(discriminator="name")]
    optimizer: Annotated[Sgd | Adam, Field(discriminator="name")]
    schedule: Annotated[Cyclic | Multistep | Points, Field(discriminator="name")]
    phases: Annotated[tuple[Phase, ...], AfterValidator(_some)]
    guard: Guard = Guard()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fill_in(self):
        """Resolve every default that depends on another key, and refuse what cannot be meant."""
        method, data, augment = self.method, self.data, self.data.augment
        if method.name == "fgsm" and method.alpha is None:
            method.alpha = 1.25 * self.epsilon
        if method.name == "n_fgsm" and method.alpha is None:
            method.alpha = self.epsilon
        if method.name != "standard" and self.epsilon == 0:
            raise ValueError("epsilon is 0: use `method: {name: standard}` for training without an attack")
        if self.epsilon_warmup > self.epochs:
            raise ValueError(f"epsilon_warmup is {self.epsilon_warmup:g} epochs, but the phases last {self.epochs}")
        if self.guard.alpha is None:
            self.guard.alpha = self.epsilon / 4
        if self.evaluation.epsilon is None:
            self.evaluation.epsilon = (self.epsilon,)
        mean, std = NORMALISATION[data.dataset]
        self.model.mean = mean if self.model.mean is None else self.model.mean
        self.model.std = std if self.model.std is None else self.model.std
        channels = CHANNELS[data.dataset]
        if len(self.model.mean) != channels or len(self.model.std) != channels:
            raise ValueError(f"model.mean and model.std need {channels} value(s) for {data.dataset}")
        for i, phase in enumerate(self.phases):
            native = RESOLUTION[data.dataset]
            if native is None and phase.resolution is None:
                raise ValueError(f"phases.{i}.resolution is needed for {data.dataset}: the side of the training images")
            phase.resolution = phase.resolution or native
            phase.resize = phase.resize or (native or phase.resolution)
            if native is not None and phase.resize != native:
                raise ValueError(f"phases.{i}.resize is {phase.resize}, but {data.dataset} images are {native} pixels wide")
            if augment.crop != "random_resized" and phase.resolution != phase.resize:
                raise ValueError(
                    f"phases.{i}: a resolution of {phase.resolution} out of images of {phase.resize} needs "
                    "data.augment.crop: random_resized"
                )
        if self.schedule.name == "points" and self.schedule.points[-1][0] < self.epochs:
            last = self.schedule.points[-1][0]
            raise ValueError(f"schedule.points end at epoch {last:g}, but the phases last {self.epochs} epochs")
        return self

    @property
    def epochs(self) -> int:
        """Epochs as the paper counts them: for `free`, replays of a minibatch count as epochs."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def replays(self) -> int:
        return self.method.replays if self.method.name == "free" else 1

    def passes(self, phase: Phase) -> int:
        """Passes over the data in a phase: its epochs, divided by the replays of `free` and rounded up."""
        return math.ceil(phase.epochs / self.replays)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(self.model_dump_json())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)


CHANNELS = {"mnist": 1, "fashion_mnist": 1, "cifar10": 3, "image_folder": 3}
RESOLUTION = {"mnist": 28, "fashion_mnist": 28, "cifar10": 32, "image_folder": None}
NORMALISATION = {  # the authors train MNIST on raw pixels
    "mnist": ((0.0,), (1.0,)),
    "fashion_mnist": ((0.0,), (1.0,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "image_folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a repeated key silently win; here it is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected `key: value` pairs", node.start_mark)
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain words", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())[:300]}") from None


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping that a YAML text holds. Raises ConfigError, which names `where`."""
    data = _parse_yaml(text, where)
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must hold `key: value` lines, found {type(data).__name__}")
    return data


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, check and resolve it. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    data = read_yaml(text, str(path))
    data.setdefault("name", path.stem)
    for override in overrides:
        _apply(data, override)
    return parse(data, str(path))


def parse(data: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(lines))) from None


def differences(a: Config, b: Config) -> list[str]:
    """Readable lines `key: value in a, not value in b` for every key in which two configs differ."""
    flat_a, flat_b = _flatten(a.to_dict()), _flatten(b.to_dict())
    return [
        f"{key}: {flat_a.get(key, 'absent')} in one, {flat_b.get(key, 'absent')} in the other"
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(key, "absent") != flat_b.get(key, "absent")
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix.rstrip("."): value}
    return {k: v for name, item in items for k, v in _flatten(item, f"{prefix}{name}.").items()}


def _nearest_file(path: Path) -> str:
    there = {p.name: str(p) for p in (path.parent if path.parent.is_dir() else Path("configs")).glob("*.yaml")}
    near = difflib.get_close_matches(path.name, there, n=1)
    return (
        f"; did you mean {there[near[0]]}?" if near else f"; there are: {', '.join(sorted(there.values()))}" if there else ""
    )


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{override}' is not of the form key=value")
    value = _parse_yaml(text, f"'{override[:80]}'")
    node: Any = data
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = _item(node, part, override)
        elif node.get(part) is None:
            node[part] = node = {}
        else:
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"'{override}': '{part}' holds a value, not a section")
    if isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _item(node: list, part: str, override: str) -> Any:
    if not (part.isascii() and part.isdecimal() and len(part) < 9) or int(part) >= len(node):
        raise ConfigError(f"'{override}': '{part}' must be a number from 0 to {len(node) - 1}")
    return node[int(part)]


def _all_keys() -> list[str]:
    """Every dotted key of the schema, from its JSON form."""
    schema = Config.model_json_schema()

    def walk(node: dict[str, Any], prefix: str) -> list[str]:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        keys = []
        for branch in node.get("anyOf", []) + node.get("oneOf", []) + node.get("allOf", []):
            keys += walk(branch, prefix)
        if isinstance(node.get("items"), dict):
            keys += walk(node["items"], prefix + "0.")
        for name, child in node.get("properties", {}).items():
            keys += [prefix + name, *walk(child, f"{prefix}{name}.")]
        return keys

    return list(dict.fromkeys(walk(schema, "")))


def _explain(error: dict[str, Any]) -> str:
    """One line for one pydantic error: the dotted key, what is wrong, and the nearest right key for an unknown one."""
    tags = {"standard", "fgsm", "n_fgsm", "pgd", "free", "sgd", "adam", "cyclic", "multistep", "points"}
    loc = [str(part) for part in error["loc"]]
    loc = [
        part for i, part in enumerate(loc) if not (i == 1 and loc[0] in ("method", "optimizer", "schedule") and part in tags)
    ]
    loc = [part for part in loc if not part.startswith(("function-", "tuple[", "constrained-"))]
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        known = _all_keys()
        if key in known:
            return f"unknown key '{key}': it does not belong to this {loc[0]}'s `name`"
        siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
        same_leaf = [k for k in known if k.rpartition(".")[2] == loc[-1]]
        near = same_leaf or difflib.get_close_matches(key, siblings, n=1) or difflib.get_close_matches(key, known, n=1)
        allowed = f"; the keys there are: {', '.join(k.rpartition('.')[2] for k in siblings)}" if siblings else ""
        return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else allowed)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        message = "this key is needed"
    elif error["type"] in ("literal_error", "union_tag_invalid"):
        context = error["ctx"]
        expected = context.get("expected") or context.get("expected_tags")
        given = context.get("tag", error["input"])
        near = difflib.get_close_matches(str(given), [e.strip("' ") for e in expected.replace(" or ", ",").split(",")], n=1)
        message = f"'{given}' is not one of {expected}" + (f"; did you mean '{near[0]}'?" if near else "")
    elif error["type"] == "union_tag_not_found":
        message = "this section needs a `name`"
    elif not error["type"].startswith("value_error"):
        message = f"{message[0].lower()}{message[1:]}, got {error['input']!r}"
    return f"{key}: {message}" if key else message
