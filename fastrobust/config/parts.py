"""Parts by name. Each table says where a named part is; `package.module:name` names a part of the user's own.

A part is looked up when it is needed and not before, so that a table costs nothing. What a part of each kind must offer
is written in docs/extending.md.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

from fastrobust.runtime.errors import ConfigError, first_line

METHODS = {
    "standard": "fastrobust.train.methods.standard:Standard",
    "fgsm": "fastrobust.train.methods.fgsm:Fgsm",
    "n_fgsm": "fastrobust.train.methods.n_fgsm:NFgsm",
    "pgd": "fastrobust.train.methods.pgd:Pgd",
    "free": "fastrobust.train.methods.free:Free",
}
OPTIMIZERS = {
    "sgd": "fastrobust.train.optimizers:Sgd",
    "adam": "fastrobust.train.optimizers:Adam",
}
SCHEDULES = {
    "cyclic": "fastrobust.train.schedules:Cyclic",
    "multistep": "fastrobust.train.schedules:Multistep",
    "points": "fastrobust.train.schedules:Points",
}
MODELS = {
    "mnist_net": "fastrobust.models.mnist_net:mnist_net",
    "preact_resnet18": "fastrobust.models.preact_resnet:preact_resnet18",
    "preact_resnet18_w16": "fastrobust.models.preact_resnet:preact_resnet18_w16",
    "preact_resnet18_paper": "fastrobust.models.paper_preact_resnet:preact_resnet18_paper",
}
LOADERS = {
    "resident": "fastrobust.data.loaders.resident:Resident",
    "ffcv": "fastrobust.data.loaders.ffcv:Ffcv",
    "dali": "fastrobust.data.loaders.dali:Dali",
    "torch": "fastrobust.data.loaders.torch_workers:Torch",
}
ATTACKS = {
    "pgd": "fastrobust.attack.pgd:Pgd",
    "apgd-ce": "fastrobust.attack.autoattack:ApgdCe",
    "apgd-t": "fastrobust.attack.autoattack:ApgdT",
    "fab-t": "fastrobust.attack.autoattack:FabT",
    "square": "fastrobust.attack.autoattack:Square",
}


def find(kind: str, table: dict[str, str], name: str) -> Any:
    """The part of this name. `kind` is the word that an error uses, such as `method.name`. Raises ConfigError."""
    if ":" in name:
        return imported(kind, name)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(table)}, or your own package.module:name"
        raise ConfigError(f"{kind}: there is no '{name}'{hint}")
    return imported(kind, table[name])


def imported(kind: str, path: str) -> Any:
    """The object at `package.module:name`. Modules in the current folder are found too. Raises ConfigError."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            where = "in the current folder or among the installed packages"
            raise ConfigError(f"{kind}: '{path}': there is no module '{error.name}' {where}") from None
        raise ConfigError(f"{kind}: '{path}' needs the package '{error.name}', which is not installed") from None
    except AttributeError:
        raise ConfigError(f"{kind}: '{path}': the module {module} has no '{name}'") from None
    except (ImportError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{kind}: '{path}' cannot be imported: {first_line(error)}") from None
