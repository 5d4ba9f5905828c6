"""The sections of a config, key by key. What a key means is written here, and docs/configuration.md repeats it."""

import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, SerializeAsAny, ValidationInfo, field_validator

from fastrobust.config import datasets, parts
from fastrobust.config.fields import Count, NonNegative, Number, Pixels, Positive, Section, Seed, key, quoted, some
from fastrobust.config.places import expand, utf8
from fastrobust.runtime.errors import ConfigError


def _place(value: str, info: ValidationInfo) -> str:
    try:
        path = utf8(expand(value))
        if info.field_name != "output":  # the others are stored with the folder that they are given in
            utf8(os.path.abspath(path))
        return path
    except ConfigError as error:
        raise ValueError(str(error)) from None


Place = Annotated[str, AfterValidator(_place), Field(title="a folder")]


def word(known: Iterable[str], own: str) -> Any:
    """The type of a word: one of the known ones, or the user's own `package.module:name`."""

    def read(value: str) -> str:
        if ":" not in value and value not in known:
            raise ValueError(parts.unknown(value, known))
        return value

    return Annotated[str, AfterValidator(read), Field(title=quoted((*known, own)))]


def _dataset(value: str) -> str:
    try:
        datasets.find(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("data.dataset: ")) from None
    return value


def named(section: str) -> Any:
    """The type of a section whose `name` says which class of a table it is, or a class of the user's own."""

    def read(value: Any, info: ValidationInfo) -> Section:
        if isinstance(value, Section):
            return value
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str):
            raise ValueError("this section needs a `name`" if name is None else "its `name` must be a word")
        try:
            kind = parts.find_class(section, parts.SECTIONS[section], name)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix(f"{section}: ")) from None
        return kind.model_validate(value, context=info.context)

    return Annotated[SerializeAsAny[Section], PlainValidator(read)]


class Augment(Section):
    """Applied on the training device, batch by batch."""

    crop: Literal["none", "pad", "random_resized"] = key(
        "`pad`: zeros around the image, then a random crop of the old size. `random_resized`: torchvision's "
        "RandomResizedCrop (8 to 100 % of the area, aspect ratio 3/4 to 4/3)",
        "none",
    )
    padding: Count = key("width of the border of `pad`", 4, values="pixels of the image, from 1")
    border: Literal["zeros", "reflect"] = key("`reflect`: the border of `pad` is the image, mirrored at its edge", "zeros")
    flip: Literal[True, False, "alternate"] = key(
        "`true`: mirror half of the images. `alternate`: half of them in the first pass over the data, the others in the "
        "second, and so on. Not with `random_resized`",
        False,
    )
    randaugment: int = key(
        "RandAugment: operations on each image, drawn for it. torchvision's, without sharpness and equalize",
        0,
        values="a count up to 10",
        ge=0,
        le=10,
        strict=True,
    )
    magnitude: int = key("of these operations, in torchvision's units", 9, ge=0, le=30, strict=True)
    cutout: int = key(
        "side of a square that is black, its middle anywhere in the image", 0, values="pixels", ge=0, strict=True
    )
    mixup: NonNegative = key("alpha of mixup, see below; 0 is without", 0.0)
    cutmix: NonNegative = key("alpha of CutMix", 0.0)

    @property
    def mixes(self) -> str:
        """Which key gives images the labels of two; empty if none does."""
        return "mixup" if self.mixup else "cutmix" if self.cutmix else ""


class Data(Section):
    dataset: Annotated[word((*datasets.DATASETS, *datasets.FROM_FILES), "package.module:name"), AfterValidator(_dataset)] = (
        key("the data set: see [data.md](data.md)")
    )
    path: Place | None = key("where the data set is", None, "the usual places", values="a folder or file")
    prepared: Place | None = key("where the prepared files are", None, "see [data.md](data.md#loaders)")
    workers: Count | None = key("threads or processes that decode images", None, "one for each core")
    download: bool = key("fetch `mnist`, `fashion_mnist`, `cifar10`, `cifar100` or `svhn` if it is not found", False)
    limit: Count | None = key("train on so many images, evenly spaced over the data set", None, "all")
    held_out: int = key(
        "so many training images, the same number of each class, are never trained on. They are the test images where the "
        "data set has none: see [data.md](data.md#held-out-images)",
        0,
        values="a count",
        ge=0,
        strict=True,
    )
    seed: Seed = key("which images those are; `seed` does not change them", 0)
    labels: Place | None = key(
        "columns `file`, `label` and perhaps `split`: see [data.md](data.md#labels-in-a-file)",
        None,
        "the folders say the classes",
        values="a CSV file",
    )
    skip_corrupt: bool = key(
        "leave out images that cannot be decoded, and list them: see [data.md](data.md#bad-images)", False
    )
    balance: bool = key("every class comes equally often, whatever the number of its images: see below", False)
    channels: Literal[1, 3] | None = key(
        "of the images that the model sees. An image folder of grey files has 1: see [data.md](data.md#grey-images)",
        None,
        "of the files",
    )
    augment: Augment = Augment()


class Model(Section):
    """The normalisation that `mean` and `std` describe is the model's first layer."""

    name: str = key("the network", values="see below")
    options: dict[str, str | bool | int | float] | None = key(
        "further arguments of the model, such as `{drop_path_rate: 0.1}` for timm's and `{stochastic_depth_prob: 0.1}` for "
        "torchvision's `convnext_…` and `efficientnet_…`: drop-path, also called stochastic depth",
        None,
        "none",
        values="a section",
    )
    weights: Annotated[Place, AfterValidator(os.path.abspath)] | None = key(
        "weights to start with: `.pth`, `.pt`, `.safetensors` of any program, or a run directory. A last layer for other "
        "classes is replaced by a new one, and that is said",
        None,
        "none",
        values="a file or a run",
    )
    mean: tuple[Pixels, ...] | None = key(
        "subtracted from pixels in [0, 1] by the model's first layer",
        None,
        "of the data set; for grey folders 0.449",
        values="one number for each channel",
    )
    std: tuple[Positive, ...] | None = key(
        "divides them after that", None, "of the data set; for grey folders 0.226", values="one number for each channel"
    )


class Phase(Section):
    epochs: Count = key(
        "length. For `free` every replay counts as an epoch, as in the paper; it trains whole passes, so this is rounded up "
        "to a multiple of the replays, and a note says so"
    )
    batch_size: Count = key("images in a batch, of all processes together")
    accumulate: Count = key(
        "a batch passes through the model in so many parts, one after the other, and their gradients are averaged for its "
        "one update. So it needs memory for a part only",
        1,
        values="a count, at most the batch",
    )
    resolution: Count | None = key(
        "side of the square that the model sees",
        None,
        "the data set's size; needed for image folders and ImageNet",
        values="pixels",
    )
    resize: Count | Literal["original"] | None = key(
        "short side of the image that the square is cropped from", None, "`resolution`", values="pixels or `original`"
    )


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads `off` as false


class Guard(Section):
    """PGD on 512 training images after each epoch (paper, appendix B: on one minibatch). The default alpha is 2/255 at
    8/255."""

    action: Annotated[Literal["stop", "recover", "warn", "off"], BeforeValidator(_off)] = key(
        "after overfitting. `stop`: end training and keep the weights of the last healthy epoch. `recover`: go back to "
        "them, and on with [another method](#guardaction-recover)",
        "stop",
    )
    steps: Count = key("steps of the attack", 5)
    alpha: Pixels | None = key("its step size", None, "epsilon / 4")
    drop: Number = key("a fall of PGD accuracy by more than this is catastrophic overfitting", 0.2, gt=0, lt=1)


class Averaging(Section):
    """mean <- decay mean + (1 - decay) weights after every update, with less decay in the first ones. 0.999 for 15 to 30
    epochs, 0.9995 for 100."""

    decay: Number = key("averaged weights. `averaging: {}` turns them on", 0.999, gt=0, lt=1)


class Selection(Section):
    """The run ends with the weights, trained or averaged, that stood the attack on held-out images best."""

    steps: Count = key("steps of the attack, at the full epsilon", 10)
    alpha: Pixels | None = key("its step size", None, "epsilon / 4")
    every: Count = key("passes over the data after which it attacks; it always does after the last", 1)


class Evaluation(Section):
    """PGD on the test set."""

    epsilon: Annotated[tuple[Pixels, ...], AfterValidator(some)] | None = key(
        "the radii", None, "`epsilon` of training", values="pixels, one or a list"
    )
    alpha: Annotated[tuple[Pixels, ...], AfterValidator(some)] | None = key(
        "the step size", None, "a quarter of each radius", values="pixels, one or one for each radius"
    )
    steps: Count = key("steps of PGD", 50)
    restarts: Count = key("random restarts", 10)
    batch_size: Count = key("images at once", 500)
    precision: Literal["auto", "fp32", "bf16"] = key(
        "of PGD's steps; what breaks an image is decided in fp32 always. `bf16` is for CPUs that have it, others take "
        "`fp32`. `auto` is what a trial of a few passes finds faster, by 1.15 times at least, and `fp32` with "
        "`deterministic: true`",
        "auto",
    )
    limit: Count | None = key("so many test images: every class in proportion, evenly spaced within it", None, "all")

    @field_validator("epsilon", "alpha", mode="before")
    @classmethod
    def _one_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, (int, float, str)) else value

    def alpha_at(self, epsilon: float) -> float:
        """The step size of PGD at a radius: the config's for a radius that stands there, else a quarter of it."""
        return dict(zip(self.epsilon, self.alpha, strict=True)).get(epsilon, epsilon / 4)
