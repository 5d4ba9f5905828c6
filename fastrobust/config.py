"""Reading a run's config: YAML, `key.sub=value` overrides, and an answer to every mistake.

`load("configs/mnist_fgsm.yaml", ["seed=1"])` gives a resolved `schema.Config`. A mistake raises `ConfigError` that names
the key and the nearest right one.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fastrobust.errors import ConfigError
from fastrobust.schema import Config


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
    flat_a, flat_b = flatten(a.to_dict()), flatten(b.to_dict())
    return [
        f"{key}: {flat_a.get(key, 'absent')} in one, {flat_b.get(key, 'absent')} in the other"
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(key, "absent") != flat_b.get(key, "absent")
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix.rstrip("."): value}
    return {k: v for name, item in items for k, v in flatten(item, f"{prefix}{name}.").items()}


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
