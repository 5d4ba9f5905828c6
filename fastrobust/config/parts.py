"""Parts by name. Each table says where a named part is; `package.module:name` names a part of the user's own.

A part is looked up when it is needed and not before, so that a table costs nothing. What a part of each kind must offer
is written in docs/extending.md.
"""

import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

from fastrobust.config.hints import did_you_mean
from fastrobust.runtime.errors import ConfigError, first_line

METHODS = {
    "standard": "fastrobust.train.methods.standard:Standard",
    "fgsm": "fastrobust.train.methods.fgsm:Fgsm",
    "n_fgsm": "fastrobust.train.methods.n_fgsm:NFgsm",
    "pgd": "fastrobust.train.methods.pgd:Pgd",
    "free": "fastrobust.train.methods.free:Free",
    "fgsm_uap": "fastrobust.train.methods.fgsm_uap:FgsmUap",
    "class_uap": "fastrobust.train.methods.class_uap:ClassUap",
    "liet": "fastrobust.train.methods.liet:Liet",
    "fgsm_pgi": "fastrobust.train.methods.fgsm_pgi:FgsmPgi",
    "trades": "fastrobust.train.methods.trades:Trades",
    "n_aaer": "fastrobust.train.methods.n_aaer:NAaer",
    "rs_cs": "fastrobust.train.methods.rs_cs:RsCs",
    "gradalign": "fastrobust.train.methods.gradalign:GradAlign",
    "sora": "fastrobust.train.methods.sora:Sora",
    "awp": "fastrobust.train.methods.awp:Awp",
}
OPTIMIZERS = {
    "sgd": "fastrobust.train.optimizers:Sgd",
    "adam": "fastrobust.train.optimizers:Adam",
    "adamw": "fastrobust.train.optimizers:AdamW",
    "muon": "fastrobust.train.muon:Muon",
}
SCHEDULES = {
    "cyclic": "fastrobust.train.schedules:Cyclic",
    "multistep": "fastrobust.train.schedules:Multistep",
    "cosine": "fastrobust.train.schedules:Cosine",
    "one_cycle": "fastrobust.train.schedules:OneCycle",
    "points": "fastrobust.train.schedules:Points",
}
MODELS = {
    "mnist_net": "fastrobust.models.mnist_net:mnist_net",
    "cifar_net": "fastrobust.models.mnist_net:cifar_net",
    "preact_resnet18": "fastrobust.models.preact_resnet:preact_resnet18",
    "preact_resnet18_w16": "fastrobust.models.preact_resnet:preact_resnet18_w16",
    "preact_resnet18_paper": "fastrobust.models.paper_preact_resnet:preact_resnet18_paper",
    "preact_resnet18_wong2020": "fastrobust.models.paper_preact_resnet:preact_resnet18_wong2020",
    "patch_resnet14": "fastrobust.models.patch_resnet:patch_resnet14",
    "cifar_resnet18": "fastrobust.models.cifar_resnet:cifar_resnet18",
    "cifar_resnet50": "fastrobust.models.cifar_resnet:cifar_resnet50",
    "wide_resnet28_10": "fastrobust.models.wide_resnet:wide_resnet28_10",
    "wide_resnet34_10": "fastrobust.models.wide_resnet:wide_resnet34_10",
    "wide_resnet28_10_silu": "fastrobust.models.wide_resnet:wide_resnet28_10_silu",
    "wide_resnet70_16_silu": "fastrobust.models.wide_resnet:wide_resnet70_16_silu",
}
SECTIONS = {"method": METHODS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}  # of a config, whose `name` is a part's
LOADERS = {
    "resident": "fastrobust.data.loaders.resident:Resident",
    "ffcv": "fastrobust.data.loaders.ffcv:Ffcv",
    "dali": "fastrobust.data.loaders.dali:Dali",
    "torch": "fastrobust.data.loaders.torch_workers:Torch",
}
ATTACKS = {
    "pgd": "fastrobust.attack.pgd:Pgd",
    "pgd-t": "fastrobust.attack.pgd_targeted:PgdT",
    "apgd-ce": "fastrobust.attack.autoattack:ApgdCe",
    "apgd-t": "fastrobust.attack.autoattack:ApgdT",
    "fab-t": "fastrobust.attack.autoattack:FabT",
    "square": "fastrobust.attack.autoattack:Square",
}
ATTACK_GROUPS = {"autoattack": ("apgd-ce", "apgd-t", "fab-t", "square"), "apgd": ("apgd-ce", "apgd-t")}  # each in turn
LOGGERS = {
    "tensorboard": "fastrobust.train.loggers:TensorBoard",
    "wandb": "fastrobust.train.loggers:Wandb",
    "mlflow": "fastrobust.train.loggers:Mlflow",
}

BASES = {  # what a class of the user's own must derive from
    "method": "fastrobust.train.methods.base:Method",
    "optimizer": "fastrobust.train.optimizers:Optimizer",
    "schedule": "fastrobust.train.schedules:Schedule",
    "loader": "fastrobust.data.loaders.base:Loader",
    "attack": "fastrobust.attack.base:Attack",
    "logging": "fastrobust.train.loggers:Logger",
}


def find(kind: str, table: dict[str, str], name: str) -> Any:
    """The part of this name. `kind` is the word that an error uses, such as `method.name`. Raises ConfigError."""
    if ":" in name:
        return imported(kind, name)
    if name not in table:
        raise ConfigError(f"{kind}: {unknown(name, table)}")
    return imported(kind, table[name])


def find_class(kind: str, table: dict[str, str], name: str) -> type:
    """The class of this name. One of the user's own must derive from the base of its kind. Raises ConfigError."""
    found, base = find(kind, table, name), BASES[kind]
    if ":" in name and not (isinstance(found, type) and issubclass(found, imported(kind, base))):
        raise ConfigError(f"{kind}: '{name[:200]}' must be a class that derives from {base}: see docs/extending.md")
    if missing := getattr(found, "__abstractmethods__", None):
        raise ConfigError(f"{kind}: '{name[:200]}' lacks {', '.join(sorted(missing))}: see docs/extending.md")
    return found


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not one of the known ones."""
    hint = did_you_mean(name, known, ", or your own package.module:name")
    return f"'{name[:80]}' is not one of {', '.join(known)}{hint}"


def imported(kind: str, path: str) -> Any:
    """The object at `package.module:name`. Modules in the current folder are found too. Raises ConfigError."""
    module, _, name = path.partition(":")
    where = f"{kind}: '{path[:200]}'"
    if not all([*module.split("."), name]):
        raise ConfigError(f"{where} is not of the form package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            places = "in the current folder or among the installed packages"
            raise ConfigError(f"{where}: there is no module '{error.name[:80]}' {places}") from None
        raise ConfigError(f"{where} needs the package '{error.name}', which is not installed") from None
    except Exception as error:  # the user's module can raise anything
        raise ConfigError(f"{where} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    if not hasattr(found, name):
        raise ConfigError(f"{where}: the module has no '{name[:80]}'")
    return getattr(found, name)
