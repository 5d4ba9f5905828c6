"""Reading a run's config: YAML, `key.sub=value` overrides, and an answer to every mistake.

`load("configs/mnist_fgsm.yaml", ["seed=1"])` gives a resolved `schema.Config`. A mistake raises `ConfigError` that names
the key and the nearest right one.
"""

import math
import os
import re
import reprlib
import shlex
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from fastrobust.config import keys, packaged
from fastrobust.config.hints import did_you_mean, nearest
from fastrobust.config.places import utf8
from fastrobust.config.schema import Config
from fastrobust.runtime.errors import ConfigError

FAR_ALIKE = 0.8  # the least likeness of a key and one of another section that it is taken for
MESSAGES = 20  # as many mistakes are told at once
LARGEST = 10_000  # values in a config: a few lines of YAML with aliases can stand for more than any memory holds
MAY_CHANGE = (
    "device", "engine", "logging", "data.path", "data.prepared", "data.labels", "data.workers", "data.download",
    "evaluation",
)  # fmt: skip
_FREE = re.compile(rf"({'|'.join(map(re.escape, MAY_CHANGE))})(\.[\w.]+)?: ")
_MOVED = re.compile(r"(name|output): ")  # whoever moves a run may say so in its config
_ABSOLUTE = ("data.path", "data.prepared", "data.labels")  # a run stores them so
_CHOSEN = {
    "loader": "auto",
    "engine": "auto",
    "precision": "auto",
    "evaluation.precision": "auto",
    "data.prepared": None,
    "data.channels": None,
}  # keys that a run resolves, and what leaves it the choice


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


def _expanded(value: Any, known: dict[int, float]) -> float:
    """How many values a YAML document has with every alias written out; infinite where one is inside itself."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        children = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(value)]


def _parse_yaml(text: str, where: str) -> Any:
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
        if _expanded(data, {}) > LARGEST:
            raise ValueError(f"with its aliases written out it has more than {LARGEST} values, or no end of them")
        return data
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
    path = packaged.find(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"config file {path} cannot be read: it is a folder{_for_folder(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    data = read_yaml(text, str(path))
    data.setdefault("name", path.stem)
    for override in overrides:
        _apply(data, override)
    return parse(data, _changed(path, overrides))


def _changed(where: str | Path, overrides: list[str] | tuple[str, ...]) -> str:
    """What an error calls a config: a mistake may be in its file or in what was changed."""
    return f"{where} with {' '.join(overrides)[:200]}" if overrides else str(where)


def parse(data: dict[str, Any], where: str) -> Config:
    for key, value in flatten(data).items():
        if isinstance(value, str):
            utf8(value, f"{where}: {key}: ")
    try:
        return Config.model_validate(data, context={"norm": data.get("norm") if isinstance(data, dict) else None})
    except ValidationError as error:
        raise refused(error, where, keys.chosen(data if isinstance(data, dict) else {})) from None


def refused(error: ValidationError, where: str, known: list[keys.Key]) -> ConfigError:
    """What pydantic refused, in the project's words, a line for each mistake. known: the keys that there are."""
    problems = error.errors()
    lines = list(dict.fromkeys(_explain(e, known) for e in problems[:MESSAGES]))
    if len(problems) > MESSAGES:
        lines.append(f"and {len(problems) - MESSAGES} more")
    return ConfigError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines))


def differences(a: Config, b: Config, places: tuple[str, str] = ("in one", "in the other")) -> list[str]:
    """Readable lines `key: value in a, not value in b` for every key in which two configs differ. Where one leaves the
    choice to the run, and the other is what the run chose, they do not differ."""
    flat_a, flat_b = flatten(a.to_dict()), flatten(b.to_dict())
    for key in ("model.mean", "model.std"):  # a list's numbers have keys of their own
        if None in (flat_a.get(key, 0), flat_b.get(key, 0)):
            flat_a, flat_b = ({k: v for k, v in flat.items() if not k.startswith(key)} for flat in (flat_a, flat_b))
    return [
        f"{key}: {flat_a.get(key, 'absent')} {places[0]}, {flat_b.get(key, 'absent')} {places[1]}"
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(key, "absent") != flat_b.get(key, "absent")
        and not (key in _ABSOLUTE and len({value and os.path.abspath(value) for value in (flat_a[key], flat_b[key])}) == 1)
        and not (key in _CHOSEN and _CHOSEN[key] in (flat_a.get(key), flat_b.get(key)))
    ]


def changed_since(stored: Any, config: Config) -> list[str]:
    """What differs in a run's config from the one stored in its checkpoint, but for what may change: where its files and
    data lie, which device it is on, and how the trained model is evaluated."""
    if not isinstance(stored, dict):
        return ["the checkpoint holds no config"]
    before = parse(stored, "the checkpoint's config")
    lines = differences(before, config, ("then", "now"))
    return [line for line in lines if is_binding(line)]


def is_binding(line: str) -> bool:
    """Whether a line of `differences` says that two configs train something else, wherever a run lies now."""
    return not may_change(line) and not _MOVED.match(line)


def may_change(line: str) -> bool:
    """Whether a line of `differences` is about a key that may change while a run is under way: it decides where and how
    fast the run is trained, or how the trained model is evaluated, and not what is trained."""
    return _FREE.match(line) is not None


def change(config: Config, overrides: list[str] | tuple[str, ...], where: str) -> Config:
    """A config with `key.sub=value` changes. Radii that are new have a step size of a quarter. Raises ConfigError."""
    data = config.to_dict()
    for override in overrides:
        _apply(data, override)
    keys = [override.partition("=")[0] for override in overrides]
    again = "evaluation.epsilon" in keys and not any(key.startswith("evaluation.alpha") for key in keys)
    if again:
        data["evaluation"]["alpha"] = None
    changed = parse(data, _changed(where, overrides))
    if again:
        changed.evaluation.alpha = tuple(map(config.evaluation.alpha_at, changed.evaluation.epsilon))
    return changed


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix.rstrip("."): value}
    return {k: v for name, item in items for k, v in flatten(item, f"{prefix}{name}.").items()}


def _nearest_file(path: Path) -> str:
    beside = {p.name: str(p) for p in path.parent.glob("*.yaml")} if path.parent.is_dir() else {}
    known = beside | ({} if path.suffix else {name: name for name in packaged.names()})
    if near := nearest(path.name, known):
        return f"; did you mean {known[near]}?"
    there = f"; there are: {', '.join(sorted(beside.values()))}" if beside else ""
    return f"{there}\n`fastrobust configs` lists those that come with fastrobust"


def _for_folder(path: Path) -> str:
    """What to give in the place of a folder: what goes on with a run, or the file that is called after it."""
    if (path / "config.yaml").is_file():
        run = shlex.quote(str(path))
        return f" of a run: `fastrobust train --resume {run}` goes on with it, and {run}/config.yaml is its config"
    beside = path.with_name(f"{path.name}.yaml")
    return f"; did you mean {beside}?" if beside.is_file() else ": give a YAML file"


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = utf8(override).partition("=")
    if not equals or not key:
        raise ConfigError(f"'{override}' is not of the form key=value")
    put(data, key, _parse_yaml(text, f"'{override[:80]}'"), override)


def put(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Set the dotted key of a config that is not yet checked. `override`: what an error says of it. Raises ConfigError."""
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


def merge(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    """`put`, where a section is merged with the one that is there, unless it names another part. Raises ConfigError."""
    head, _, rest = key.partition(".")
    there, value = data.get(head), {rest: value} if rest else value
    sections = isinstance(there, dict) and isinstance(value, dict)
    if sections and value.get("name", there.get("name")) == there.get("name"):
        for below, part in value.items():
            merge(there, str(below), part, override)
    else:
        put(data, key, value[rest] if rest else value, override)


def _item(node: list, part: str, override: str) -> Any:
    if not (part.isascii() and part.isdecimal() and len(part) < 9) or int(part) >= len(node):
        raise ConfigError(f"'{override}': '{part}' must be a number from 0 to {len(node) - 1}")
    return node[int(part)]


def _shown(value: Any) -> str:
    """A value in a few words at most."""
    short = reprlib.Repr()
    short.maxlevel = short.maxlist = short.maxdict = 4
    short.maxstring = short.maxother = 80
    try:
        return short.repr(value)
    except ValueError:  # Python refuses to write an integer of thousands of digits
        return "a number of thousands of digits"


def _meaning(path: str, known: list[keys.Key]) -> str:
    """What a key means, in a few words: ` (step size)`."""
    path = re.sub(r"\.\d+\.", ".0.", path)
    words = next((key.meaning for key in known if key.path == path and key.meaning), "")
    words = re.split(r"\. |[:,]? see |[:,]? \(?\[", words)[0]
    return f" ({words})" if words else ""


def _meant(key: str, siblings: list[str], known: list[str]) -> str | None:
    """The known key that an unknown one stands for: one like it beside it, one elsewhere that is called so or has a word
    more or less (`lr`, `max_lr`), or one like the whole of it."""
    leaf, leaves = _leaf(key), {_leaf(k): k for k in siblings}
    if near := nearest(leaf, leaves):
        return leaves[near]
    alike = [k for k in known if f"_{leaf}_" in f"_{_leaf(k)}_" or f"_{_leaf(k)}_" in f"_{leaf}_"]
    return min(alike, key=lambda k: abs(len(_leaf(k)) - len(leaf)), default=None) or nearest(key, known, FAR_ALIKE)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _takes(key: keys.Key, value: Any) -> bool:
    try:
        TypeAdapter(Annotated[key.field.annotation, key.field]).validate_python(value)
    except ValidationError:
        return False
    return True


def _explain(error: dict[str, Any], known: list[keys.Key]) -> str:
    """One line for one pydantic error: the dotted key, what is wrong, and the nearest right key for an unknown one."""
    loc = [str(part) for part in error["loc"]]
    key = ".".join(part for part in loc if not part.startswith(("function-", "tuple[", "list[", "dict[", "constrained-")))
    value, paths = error["input"], list(dict.fromkeys(k.path for k in known))
    if error["type"] == "extra_forbidden":
        siblings = [k for k in paths if k.rpartition(".")[0] == key.rpartition(".")[0]]
        other = len(loc) > 1 and any(k.path == key for k in keys.every())
        if near := _meant(key, siblings, siblings if other else paths):
            return f"unknown key '{key}'; did you mean '{near}'?{_meaning(near, known)}"
        there = f"; the keys there are: {', '.join(map(_leaf, siblings))}" if siblings else ""
        return f"unknown key '{key}'{', which belongs to another `name`' if other else ''}{there}"
    inside = [k for k in known if k.path.startswith(f"{key}.") and not k.holds]
    if inside and error["type"] != "missing" and not isinstance(value, (dict, list, tuple)):
        fits = next((k.path for k in inside if value is not None and _takes(k, value)), None)
        write = f"{fits}={'off' if value is False else str(value)[:80]}" if fits else f"its keys, such as {inside[0].path}"
        if not fits and not any(k.field.is_required() for k in inside):
            write = f"{key}={{}} for its defaults, or {write}"
        return f"{key}: this is a section with keys of its own, not {_shown(value)}: write {write}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        message = f"this key is needed{_meaning(key, known)}"
    elif error["type"] == "literal_error":
        expected, given = error["ctx"]["expected"], value[:80] if isinstance(value, str) else _shown(value)
        words = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
        message = f"'{given}' is not one of {expected}{did_you_mean(given, words)}"
    elif not error["type"].startswith("value_error"):
        message = message.replace("tuple", "list").replace("dictionary", "section")
        message = f"{message[0].lower()}{message[1:]}, got {_shown(value)}"
    return f"{key}: {message}" if key else message
