"""Damages what a command reads, file by file, and runs the command again.

Each file is deleted, emptied, cut in half, replaced by a neighbour or by the file of the same name of another model,
and, if it holds JSON, by JSON of another type. The command must then make the same output, or end with one line (after
those of its log) and exit code 2, or 1 for a damaged input among others. Anything else is a fault: another output
without a word, or a traceback.

    python tests/damage/damage.py              # all cases, which takes minutes
    python tests/damage/damage.py --seed 7 --number 60
"""

import argparse
import contextlib
import io
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]  # when it runs as a script

from svqvae_cli import main  # noqa: E402

LOG_LINE = re.compile(r"\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2},\d{3} finished part ")
JSON_OF_OTHER_TYPES = (b"[]", b"null", b'"text"', b"3")


@dataclass(frozen=True)
class Command:
    """A command and what it reads.

    Args:
        words (`str`): Command line; the folders are in `{root}`.
        damaged (`tuple[str, ...]`): Files and folders below the root that are damaged.
        others (`dict[str, str]`): For a damaged folder, a folder of the same kind whose files replace its own.
        is_repeated (`bool`, defaults to `False`): Whether the command has made its output before the damage, so that
            it has a record to compare with. Without one, nobody can tell another whole model from the one before.
        output (`str`, defaults to `"out"`): Folder of the output below the root. The folders may hold a part of it.
    """

    words: str
    damaged: tuple[str, ...]
    others: dict[str, str]
    is_repeated: bool = False
    output: str = "out"


@dataclass(frozen=True)
class Case:
    """A command, one file that it reads, and the damage."""

    command: Command
    file: str
    damage: str


@dataclass(frozen=True)
class Outcome:
    """What a run of a command did."""

    exit_code: int
    stdout: str
    stderr: str
    files: dict[str, bytes]


def run(command: Command, root: Path) -> Outcome:
    """Runs a command in this process."""
    stdout = io.StringIO()
    stderr = io.StringIO()
    argv = command.words.format(root=root).split()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            exit_code = main(argv)
        except Exception:
            exit_code = -1
            stderr.write(traceback.format_exc())
    return Outcome(exit_code, stdout.getvalue(), stderr.getvalue(), read_files(root, command.output))


def read_files(root: Path, output: str) -> dict[str, bytes]:
    """Content of all files of an output folder but the records of runs, with `ROOT` for the path of the folders."""
    contents = {}
    for path in sorted((root / output).rglob("*")):
        is_record = path.name.startswith(".svqvae-") or path.parent.name == "parts"
        if path.is_file() and not is_record:
            content = path.read_bytes().replace(str(root).encode(), b"ROOT")
            contents[str(path.relative_to(root / output))] = content
    return contents


def damages(root: Path, command: Command, file: str) -> list[str]:
    """Names of the damages that a file can have."""
    names = ["deleted", "emptied", "halved"]
    if file.endswith((".json", ".jsonl")):
        for number in range(len(JSON_OF_OTHER_TYPES)):
            names.append(f"JSON {number}")
    if neighbour_of(root, file) is not None:
        names.append("neighbour")
    if other_of(root, command, file) is not None:
        names.append("other")
    return names


def neighbour_of(root: Path, file: str) -> Path | None:
    """Another file with the same suffix in the same folder."""
    path = root / file
    for neighbour in sorted(path.parent.glob(f"*{path.suffix}")):
        if neighbour != path and neighbour.read_bytes() != path.read_bytes():
            return neighbour
    return None


def other_of(root: Path, command: Command, file: str) -> Path | None:
    """The file of the same name in another folder of the same kind."""
    for folder, other_folder in command.others.items():
        if file.startswith(f"{folder}/"):
            other = root / other_folder / file.removeprefix(f"{folder}/")
            if other.is_file() and other.read_bytes() != (root / file).read_bytes():
                return other
    return None


def apply(case: Case, root: Path) -> None:
    """Damages the file of a case."""
    path = root / case.file
    if case.damage == "deleted":
        path.unlink()
    elif case.damage == "emptied":
        path.write_bytes(b"")
    elif case.damage == "halved":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif case.damage.startswith("JSON "):
        number = int(case.damage.removeprefix("JSON "))
        path.write_bytes(JSON_OF_OTHER_TYPES[number])
    elif case.damage == "neighbour":
        shutil.copyfile(neighbour_of(root, case.file), path)
    else:
        shutil.copyfile(other_of(root, case.command, case.file), path)


def all_cases(root: Path, commands: list[Command]) -> list[Case]:
    """All cases, in order."""
    cases = []
    for command in commands:
        for name in command.damaged:
            path = root / name
            paths = [path] if path.is_file() else sorted(path.rglob("*"))
            for file in paths:
                if not file.is_file() or file.name == "README.md":
                    continue
                for damage in damages(root, command, str(file.relative_to(root))):
                    cases.append(Case(command, str(file.relative_to(root)), damage))
    return cases


class Checker:
    """Checks cases, each in a copy of the folders.

    Args:
        root (`Path`): Folders that the commands read. They are not changed.
    """

    def __init__(self, root: Path):
        self.root = root
        self.outcomes: dict[str, Outcome] = {}  # without damage, by the command line

    def check(self, case: Case) -> str | None:
        """Runs a case. Returns its fault, or `None`."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "root")
            shutil.copytree(self.root, copy, symlinks=True)
            whole = self._run_whole(case.command)
            if case.command.is_repeated:
                run(case.command, copy)
            apply(case, copy)
            before = read_files(copy, case.command.output)
            return fault_of(run(case.command, copy), whole, before, copy)

    def _run_whole(self, command: Command) -> Outcome:
        """What the command does without damage."""
        if command.words not in self.outcomes:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, "root")
                shutil.copytree(self.root, copy, symlinks=True)
                outcome = run(command, copy)
            if outcome.exit_code != 0:
                raise RuntimeError(f"`{command.words}` must work without damage, but: {outcome.stderr}")
            self.outcomes[command.words] = outcome
        return self.outcomes[command.words]


def fault_of(outcome: Outcome, whole: Outcome, before: dict[str, bytes], root: Path) -> str | None:
    """What is wrong with the outcome of a damaged run, or `None`.

    Args:
        outcome ([`Outcome`]): What the run did.
        whole ([`Outcome`]): What it does without damage.
        before (`dict[str, bytes]`): Files of the output folder before the run.
        root (`Path`): Folders that it reads.
    """
    lines = error_lines(outcome)
    if outcome.exit_code == 0:
        if outcome.files != whole.files:
            return "another output without a word"
        if not outcome.files and has_wrong_facts(outcome, whole):
            return "other facts without a word"
        return None
    if outcome.exit_code not in (1, 2):
        return f"exit code {outcome.exit_code}: {outcome.stderr.strip()[-600:]}"
    if not lines or not all(line.startswith("svqvae: ") for line in lines):
        return f"not one line: {outcome.stderr[:600]}"
    if outcome.exit_code == 2 and len(lines) > 1 and not lines[0].startswith("svqvae: skipped: "):
        return f"{len(lines)} lines: {outcome.stderr[:600]}"
    if str(root) not in lines[0] and "--" not in lines[0] and "`" not in lines[0]:
        return f"no name: {lines[0][:300]}"
    for name, content in outcome.files.items():
        if content not in (whole.files.get(name), before.get(name)):
            return f"another output, `{name}`, beside an error"
    return None


def error_lines(outcome: Outcome) -> list[str]:
    """Lines on stderr, without the lines of the log about parts that were finished before the error."""
    return [line for line in outcome.stderr.splitlines() if not LOG_LINE.match(line)]


def has_wrong_facts(outcome: Outcome, whole: Outcome) -> bool:
    """Whether a run printed other facts, none of which says that a part of a set is missing, or a model unknown."""
    changed = set(facts(outcome)) ^ set(facts(whole))
    tells_of_damage = any(line.startswith("missing") or line.endswith("unknown model") for line in changed)
    return bool(changed) and not tells_of_damage


def facts(outcome: Outcome) -> list[str]:
    """Printed lines without the places of temporary folders."""
    return [line.split("/")[0] for line in outcome.stdout.splitlines()]


def check_cases(
    checker: Checker, cases: list[Case], seconds: float | None = None
) -> Iterator[tuple[Case, str | None]]:
    """Checks cases until the time is over, and yields each with its fault."""
    start = time.monotonic()
    for case in cases:
        if seconds is not None and time.monotonic() - start > seconds:
            return
        yield case, checker.check(case)


def sample(cases: list[Case], seed: int) -> list[Case]:
    """The cases in an order by chance."""
    order = list(cases)
    random.Random(seed).shuffle(order)
    return order


def run_script(make: Callable[[Path], list[Command]]) -> int:
    """Checks all cases, or some by chance, and prints the faults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="number of cases (default: all)")
    parser.add_argument("--only", default="", help="cases whose command or file has this text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        cases = all_cases(root, make(root))
        if options.only:
            cases = [case for case in cases if options.only in f"{case.command.words} {case.file}"]
        if options.number is not None:
            cases = sample(cases, options.seed)[: options.number]
        num_faults = 0
        for case, fault in check_cases(Checker(root), cases):
            if fault is not None:
                num_faults += 1
                sys.stdout.write(f"{case.command.words}\n  {case.file} {case.damage}: {fault}\n")
                sys.stdout.flush()
        sys.stdout.write(f"{len(cases)} cases, seed {options.seed}, {num_faults} faults\n")
    return 1 if num_faults else 0


if __name__ == "__main__":
    from workspaces import make_workspace

    sys.exit(run_script(make_workspace))
