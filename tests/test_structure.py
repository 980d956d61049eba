"""Packages depend on each other in one direction, and every public name is declared. Reads the sources only."""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

INSTALLED = ("pallas_kernels", "shfl_jax")

BELOW = {"pallas_kernels": (), "shfl_jax": ("pallas_kernels",), "training": ("shfl_jax", "pallas_kernels")}
"""Package -> what it may import of this repository, besides itself."""

LEVELS = {
    "shfl_jax._paths": 0,
    "shfl_jax._layers": 0,
    "shfl_jax.patterns": 1,
    "shfl_jax.sparse": 2,
    "shfl_jax.models": 3,
    "shfl_jax.pruning": 4,
    "shfl_jax.oneshot": 4,
    "shfl_jax.cli": 5,
    "shfl_jax": 6,
}
"""The parts of `shfl_jax`: each imports only parts of a lower level. The last is the package's own `__init__`."""

BACKENDS = {"xla": (), "gpu": (), "triton": ("gpu", "xla"), "mosaic": ("gpu", "triton")}
"""Sub-package of `pallas_kernels` -> the others it may import. `gpu` is what the two GPU backends share."""

DISPATCH = ("_op", "_conv", "_cost", "tune")
"""The modules of `pallas_kernels` that choose between its backends, which the backends do not import."""

PUBLIC_MODULES = {
    "pallas_kernels.timing",
    "pallas_kernels.tune",
    "shfl_jax.models.linen",
    "shfl_jax.models.nnx",
}

ALLOWED: dict[tuple[str, str], str] = {}
"""(module, private name of a package below) -> why it is imported."""

NAMESAKES = {"pallas_kernels.tune.tune": "the function behind `shfl-jax tune`"}
"""Public function that is called like its module -> what it is."""


class Import(NamedTuple):
    module: str
    line: int
    target: str
    """The dotted name of what is imported: a module, or a name in one."""

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


@functools.cache
def sources(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module; a package has the name of its folder."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def modules() -> dict[str, Path]:
    return {name: path for package in BELOW for name, path in sources(package).items()}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(package: str) -> list[Import]:
    """All imports, those inside functions too."""
    found = []
    for module, path in sources(package).items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                found += [Import(module, node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}:{node.lineno}: relative imports are not used"
                found += [Import(module, node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def bound(path: Path) -> set[str]:
    """The names that a module defines or imports at its top level."""
    names: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def declared(path: Path) -> list[str] | None:
    """What `__all__` lists; None without one."""
    for node in tree(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return ast.literal_eval(node.value)
    return None


def part(name: str) -> str:
    """The part of `shfl_jax` that a dotted name belongs to."""
    return next((p for p in LEVELS if p != "shfl_jax" and f"{name}.".startswith(f"{p}.")), "shfl_jax")


def is_private(name: str) -> bool:
    return any(piece.startswith("_") and not piece.startswith("__") for piece in name.split("."))


def is_public(target: str) -> bool:
    """Whether a dotted name is that of a public module, or of what a module declares."""
    known, (owner, _, name) = modules(), target.rpartition(".")
    exported = target in known or name in (declared(known[owner]) or () if owner in known else ())
    return exported and not is_private(target)


def is_package(path: Path) -> bool:
    return path.name == "__init__.py"


@pytest.mark.parametrize("package", BELOW)
def test_packages_import_only_packages_below(package):
    ours = {path.name for path in ROOT.iterdir() if any(path.glob("*.py"))} | {"tests"}
    allowed = {package, *BELOW[package]}
    assert not [str(i) for i in imports(package) if i.target.partition(".")[0] in ours - allowed]


def test_parts_of_shfl_jax_import_only_parts_below():
    wrong = []
    for each in imports("shfl_jax"):
        if each.target.partition(".")[0] != "shfl_jax":
            continue
        here, there = part(each.module), part(each.target)
        if here != there and LEVELS[there] >= LEVELS[here]:
            wrong.append(str(each))
    assert not wrong


def test_every_part_of_shfl_jax_has_a_level():
    assert {".".join(name.split(".")[:2]) for name in sources("shfl_jax")} == set(LEVELS)


@pytest.mark.parametrize("package", ["shfl_jax", "training"])
def test_other_packages_are_used_by_their_public_names(package):
    """Also from one part of `shfl_jax` to another, but for its private modules `_paths` and `_layers`."""
    wrong = []
    for each in imports(package):
        top = each.target.partition(".")[0]
        if top not in BELOW or (each.module, each.target) in ALLOWED:
            continue
        here, there = part(each.module), part(each.target)
        same = top == package and (package != "shfl_jax" or here == there)
        if same or (package == "shfl_jax" and there in ("shfl_jax._paths", "shfl_jax._layers")):
            continue
        if not is_public(each.target):
            wrong.append(str(each))
    assert not wrong


def test_benchmarks_use_the_public_names_of_shfl_jax():
    used = [i for i in imports("benchmarks") if f"{i.target}.".startswith("shfl_jax.")]
    assert used
    assert not [str(i) for i in used if not is_public(i.target)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_import_only_the_backends_below(backend):
    closed = {f"pallas_kernels.{name}" for name in (*DISPATCH, *BACKENDS)}
    closed -= {f"pallas_kernels.{name}" for name in (backend, *BACKENDS[backend])}
    mine = [i for i in imports("pallas_kernels") if f"{i.module}.".startswith(f"pallas_kernels.{backend}.")]
    assert mine
    assert not [str(i) for i in mine if ".".join(i.target.split(".")[:2]) in closed]


def test_every_exception_is_needed():
    made = {(i.module, i.target) for package in BELOW for i in imports(package)}
    assert not set(ALLOWED) - made
    assert set(NAMESAKES) == set(namesakes())


def test_modules_are_private_or_declared_public():
    found = {
        name
        for package in INSTALLED
        for name, path in sources(package).items()
        if not is_package(path) and not is_private(name)
    }
    assert found == PUBLIC_MODULES


def test_public_names_are_declared_and_exist():
    wrong = []
    for name, path in modules().items():
        if not is_package(path) and name not in PUBLIC_MODULES:
            continue
        names = declared(path)
        if names is None:
            wrong.append(f"{name} has no __all__")
            continue
        missing = set(names) - bound(path)
        if missing or len(set(names)) != len(names):
            wrong.append(f"{name}: __all__ lists {sorted(missing) or 'a name twice'}")
    assert not wrong


def namesakes() -> list[str]:
    """Functions and classes that are called like the module that defines them."""
    return [
        f"{name}.{node.name}"
        for name, path in modules().items()
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name.rpartition(".")[2]
    ]


def test_no_function_or_class_is_called_like_its_module():
    assert not [name for name in namesakes() if name not in NAMESAKES]


def test_no_public_name_hides_a_public_module():
    """No function or class that a package exports is called like one of its modules."""
    wrong = []
    for package in (name for top in INSTALLED for name, path in sources(top).items() if is_package(path)):
        path = modules()[package]
        inside = {name.rpartition(".")[2] for name in modules() if name.rpartition(".")[0] == package}
        origins = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in tree(path).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        exported = set(declared(path) or ())
        wrong += [f"{package}.{name}" for name in exported & inside if origins.get(name) != f"{package}.{name}"]
    assert not wrong
