"""The shape of the package: what may import what, and how long a file may be. Read from the source with `ast`; nothing is
imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fastrobust"
LATER = ("train", "evaluation", "verification", "reporting", "tuning")  # rooms that no room on their left knows
FORBIDDEN = {
    "runtime": ("data", "models", "attack", *LATER),
    "config": ("data", "models", "attack", *LATER),
    "models": ("data", "attack", *LATER),
    "data": ("models", "attack", *LATER),
    "attack": LATER,
    "train": ("verification", "reporting", "tuning"),
    "evaluation": ("verification", "reporting", "tuning"),
    "verification": ("reporting", "tuning"),
    "reporting": ("tuning",),
}
LONGEST = 400  # lines of a file


class Module:
    """One file of a tree: what it imports, and which of that when it is imported itself."""

    def __init__(self, root: Path, file: Path):
        words = file.relative_to(root).with_suffix("").parts
        self.name = ".".join(words[:-1] if words[-1] == "__init__" else words)
        self.file, self.package = file, self.name if words[-1] == "__init__" else self.name.rpartition(".")[0]
        self.tree = ast.parse(file.read_text(encoding="utf-8"))
        self.now = list(self.imports(self.tree, later=False))
        self.all = list(self.imports(self.tree, later=True))

    def imports(self, node: ast.AST, later: bool):
        """(module, name or None, line) for each `import module` and each `from module import name`. Without `later` what
        stands in a function, or below `if TYPE_CHECKING`, is left out: it does not run when the module is imported."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, None, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = self.package.split(".")[: len(self.package.split(".")) - child.level + 1] if child.level else []
                module = ".".join([*above, *([child.module] if child.module else [])])
                yield from ((module, alias.name, child.lineno) for alias in child.names)
            elif later or not (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _typing(child)):
                yield from self.imports(child, later)


def _typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def read(root: Path) -> dict[str, Module]:
    modules = [Module(root, file) for file in sorted((root / PACKAGE).rglob("*.py"))]
    return {module.name: module for module in modules}


def targets(modules: dict[str, Module], imports: list) -> list[tuple[str, int]]:
    """(module of the package, line) for each import of one; `from package import module` is one of the module."""
    found = []
    for module, name, line in imports:
        whole = f"{module}.{name}"
        if name is not None and whole in modules:
            found.append((whole, line))
        elif module in modules:
            found.append((module, line))
    return found


def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") else ""


def cycle(modules: dict[str, Module]) -> list[str] | None:
    """Modules that import each other in a circle when they are imported, or None. A package's own `__init__` is run before
    a module of it, and so it is imported by whoever imports that module."""
    graph = {}
    for name, module in modules.items():
        graph[name] = set()
        for target, _ in targets(modules, module.now):
            words = target.split(".")
            parents = {".".join(words[:k]) for k in range(1, len(words))}
            graph[name] |= {target} | {parent for parent in parents if not name.startswith(f"{parent}.") and parent != name}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in sorted(graph[name]):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := visit(name, []))), None)


def against_the_direction(modules: dict[str, Module]) -> list[str]:
    return [
        f"{module.name}, line {line}, imports {target}"
        for module in modules.values()
        for target, line in targets(modules, module.all)
        if room(target) in FORBIDDEN.get(room(module.name), ())
    ]


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(modules: dict[str, Module]) -> list[str]:
    """Names with an underscore that a module takes from another: imported, or as an attribute of an imported module."""
    wrong = []
    for module in modules.values():
        known = {}  # what a module of the package is called here
        for source, name, line in module.all:
            if name is not None and private(name) and source.split(".")[0] == PACKAGE:
                wrong.append(f"{module.name}, line {line}: {source}.{name}")
            if f"{source}.{name}" in modules:
                known[name] = f"{source}.{name}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom):
                known |= {alias.asname: known[alias.name] for alias in node.names if alias.asname and alias.name in known}
        for node in ast.walk(module.tree):
            taken = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known
            if taken and private(node.attr):
                wrong.append(f"{module.name}, line {node.lineno}: {known[node.value.id]}.{node.attr}")
    return wrong


def too_long(modules: dict[str, Module]) -> list[str]:
    lengths = {str(m.file): len(m.file.read_text(encoding="utf-8").splitlines()) for m in modules.values()}
    return [f"{file}: {lines} lines" for file, lines in lengths.items() if lines > LONGEST]


@pytest.fixture(scope="module")
def package():
    return read(ROOT)


def test_modules_do_not_import_each_other_in_a_circle(package):
    assert len(package) > 60 and sum(len(targets(package, m.now)) for m in package.values()) > 200, "they were read"
    assert cycle(package) is None


def test_nothing_on_the_left_knows_what_is_on_the_right(package):
    assert set(FORBIDDEN) <= {room(name) for name in package}
    assert against_the_direction(package) == []


def test_private_names_stay_in_their_module(package):
    assert private_names(package) == []


def test_files_are_short(package):
    assert too_long(package) == []


# ---- the checks themselves


@pytest.fixture
def made_up(tmp_path):
    """made_up({"data/a": text, ...}) -> the modules of a package with these files."""

    def make(files: dict[str, str]) -> dict[str, Module]:
        for name, text in files.items():
            file = tmp_path / PACKAGE / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        for folder in (tmp_path / PACKAGE).rglob("*"):
            if folder.is_dir() and not (folder / "__init__.py").exists():
                (folder / "__init__.py").write_text("")
        return read(tmp_path)

    return make


@pytest.mark.parametrize("form", ["from fastrobust.data import b", "import fastrobust.data.b", "from . import b"])
def test_a_circle_is_found(made_up, form):
    circle = {"data/a": form, "data/b": "from fastrobust.data.c import x", "data/c": "from fastrobust.data import a"}
    assert sorted(cycle(made_up(circle))[1:]) == ["fastrobust.data.a", "fastrobust.data.b", "fastrobust.data.c"]


@pytest.mark.parametrize("above", ["def f():", "if TYPE_CHECKING:"])
def test_an_import_that_does_not_run_at_once_makes_no_circle(made_up, above):
    files = {"data/a": "from fastrobust.data.b import f", "data/b": f"{above}\n    from fastrobust.data import a"}
    assert cycle(made_up(files)) is None
    assert cycle(made_up(files | {"data/b": "try:\n    from fastrobust.data import a\nfinally:\n    pass"})) is not None


def test_a_circle_through_the_init_of_another_package_is_found(made_up):
    files = {"data/a": "from fastrobust.train.b import x", "train/__init__": "from fastrobust.data import a", "train/b": ""}
    assert set(cycle(made_up(files))) == {"fastrobust.data.a", "fastrobust.train"}


STEP = "fastrobust.train.step"


@pytest.mark.parametrize(
    "text", ["from fastrobust.train import step", f"from {STEP} import Step", f"def f():\n    import {STEP}"]
)
def test_an_arrow_in_the_wrong_direction_is_found(made_up, text):
    (found,) = against_the_direction(made_up({"data/a": text, "train/step": ""}))
    assert found.startswith("fastrobust.data.a, line ") and found.endswith(f"imports {STEP}")
    assert against_the_direction(made_up({"data/a": "", "train/step": "from fastrobust.data import a"})) == []


@pytest.mark.parametrize(
    "text",
    ["from fastrobust.data.b import _x", "from fastrobust.data import b\nb._x", "from fastrobust.data import b as c\nc._x"],
)
def test_a_private_name_of_another_module_is_found(made_up, text):
    (found,) = private_names(made_up({"data/a": text, "data/b": "_x = 1"}))
    assert found.endswith("fastrobust.data.b._x")
    assert private_names(made_up({"data/a": "from fastrobust.data.b import __version__\nself._x"})) == []


def test_a_long_file_is_found(made_up):
    (found,) = too_long(made_up({"data/a": "\n" * (LONGEST + 1), "data/b": "\n" * LONGEST}))
    assert found.endswith(f"a.py: {LONGEST + 1} lines")
