"""Builds the wheel, looks at what it holds, installs it into an empty environment and runs `smoke.py` there.

Run by `make wheel-test`, with an interpreter that has `build`. pip takes the versions to install from environment
variables that make sets.
"""

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("pallas_kernels", "shfl_jax")
NEEDED = ("pallas_kernels/py.typed", "pallas_kernels/tables/nvidia-h200.json", "shfl_jax/py.typed")


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Runs a command that must succeed."""
    print("+", *(Path(part).name if Path(part).is_absolute() else part for part in command), flush=True)
    subprocess.run(command, check=True, cwd=cwd)


def check_files(wheel: Path) -> None:
    """Compares a wheel with the packages of this tree: every file must be in it, and nothing else."""
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == source, f"too many: {sorted(files - source)}; missing: {sorted(source - files)}"
    assert files.issuperset(NEEDED), f"missing: {sorted(set(NEEDED) - files)}"


def main() -> None:
    """Builds, installs, runs."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder)
        # The wheel comes from the source distribution: what an earlier build left in `build/` cannot get into it.
        run(sys.executable, "-m", "build", "--quiet", "--outdir", temporary / "dist", ROOT)
        (wheel,) = (temporary / "dist").glob("*.whl")
        check_files(wheel)

        venv.create(temporary / "venv", with_pip=True)
        python = temporary / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)

        project = temporary / "project"  # a user's, with a package of its own that is called like one of ours
        (project / "training").mkdir(parents=True)
        (project / "training" / "__init__.py").write_text("MINE = True\n")
        shutil.copy(Path(__file__).with_name("smoke.py"), project)
        run(python, "smoke.py", cwd=project)


if __name__ == "__main__":
    main()
