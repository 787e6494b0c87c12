"""Runs `svqvae` in this process."""

from pathlib import Path

from svqvae_cli import main


def svqvae(*argv: object) -> int:
    """Runs a command and returns its exit code."""
    return main([str(word) for word in argv])


def fails(capsys, *argv: object) -> str:
    """Runs a command that must end with exit code 2, one line on stderr and nothing on stdout; returns the line."""
    assert svqvae(*argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("svqvae: error: ")
    assert captured.err[:-1].isprintable()
    assert captured.err.endswith("\n")
    assert captured.out == ""
    return captured.err


def names(folder: Path) -> list[str]:
    """Sorted names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def visible(folder: Path) -> list[str]:
    """Sorted names in a folder, without the record of a run."""
    return [name for name in names(folder) if name[0] != "."]
