import jax.numpy as jnp
import pytest

import shfl_jax
from shfl_jax import VW, LayerSpec, Mask, Masks
from shfl_jax.cli import _main as cli


@pytest.fixture
def installed(monkeypatch):
    """A command beside the library's own."""

    def count(argv):
        print("got", argv)
        return len(argv)

    monkeypatch.setitem(cli.COMMANDS, "count", ("Counts its arguments.", count))


@pytest.fixture
def checkpoint(tmp_path):
    spec = LayerSpec("mlp/kernel", (6, 8), (), (0,), (1,), VW(0.5, group_size=4))
    mask = Mask(jnp.arange(8, dtype=jnp.int32), jnp.arange(6) < jnp.array([[1], [2]]), 8)
    shfl_jax.save(
        tmp_path / "model",
        shfl_jax.compress({"mlp": {"kernel": jnp.ones((6, 8))}}, Masks({"mlp/kernel": mask}, (spec,))),
    )
    return tmp_path / "model"


def test_help_lists_the_commands_with_what_they_do(installed, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "Counts its arguments." in text
    assert "report" in text
    assert "shfl-jax COMMAND --help" in text


def test_commands_get_the_rest_of_the_arguments_and_give_the_status(installed, capsys):
    assert cli.main(["count", "--flag", "--help", "x"]) == 3
    assert "['--flag', '--help', 'x']" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["nothing"]])
def test_wrong_usage_explains_itself(installed, argv, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(argv)
    assert done.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_report_reads_a_checkpoint(checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["report", str(checkpoint), "--tokens", "4"]) == 0
    text = capsys.readouterr().out
    assert "mlp/kernel" in text
    assert "N=4" in text


def test_report_explains_a_failure(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "header.json does not exist; give the directory" in capsys.readouterr().err


def test_report_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert "Example: shfl-jax report" in capsys.readouterr().out
