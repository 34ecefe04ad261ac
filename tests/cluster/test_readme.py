"""Every command and every Python block of README.md, run in their order, in one folder, on one Ray.

Commands of the documents in docs/ are checked as far as their files and their configuration, and not run.

What stands for what: ``photos`` and ``ratings.csv`` are 100 planted images of 64 pixels and their ratings, ``koniq10k``
a table of KonIQ-10k's shape with 12 of them. Where a command leaves the backbone to the registry it gets the small
backbone of `tests.tiny` with random weights, and what decides only how long a job takes is set lower (`_SMALLER`).
Commands with an address of another machine, or for another program than a job, are checked in the same way; so is
``make demo``, which runs the same jobs on more images. Of the outputs that the README shows, the labels of the lines
are compared, not the numbers.
"""

import csv
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import ais
from ais.command_line import load_config
from ais.planted import PlantedSpec, make_planted
from tests import tiny  # noqa: F401 - registers the backbone

ROOT = Path(__file__).parents[2]
_TINY = ["backbone.name=tiny", "backbone.weights=random", "backbone.seed=3"]
_SMALLER = {
    "train": [*_TINY, "fit.epochs=10", "fit.workers=1", "head.hidden=16"],
    "validate": ["folds=2", "seeds=2", "steps=2", "images_limit=4"],
    "report": [],
}
_REMOTE = re.compile(r"\b(s3|gs|gcs|abfs|https?)://")


@dataclass(frozen=True)
class Command:
    """A command of the README, its line there, and the lines that it is said to print."""

    line: int
    words: list[str]
    output: list[str]

    def __str__(self) -> str:
        return f"{self.line}: {' '.join(self.words)}"


def commands(text: str) -> list[Command]:
    """Those of indented blocks that begin with a program, and those after a ``$`` in fenced blocks."""
    found: list[Command] = []
    lines = text.splitlines()
    fenced = False
    for index, line in enumerate(lines):
        if line.startswith("```"):
            fenced = line == "```console"
            continue
        whole = line
        while whole.endswith("\\"):
            index += 1
            whole = whole[:-1] + lines[index]
        if fenced and line.startswith("$ "):
            found.append(Command(index + 1, shlex.split(whole[2:], comments=True), []))
        elif re.match(r" {4,}(make|kubectl|docker|export|\.venv/bin/\w+) ", line):
            found.append(Command(index + 1, shlex.split(whole, comments=True), []))
        elif fenced and found:
            found[-1].output.append(line)
    return found


def python_blocks(text: str) -> list[str]:
    """The indented blocks that begin with an import."""
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE)
    return [re.sub("^ {4}", "", block, flags=re.MULTILINE) for block in blocks if re.match(r"\s*(from|import) ", block)]


README = (ROOT / "README.md").read_text()
COMMANDS = commands(README)
DOCUMENTS = {path.name: commands(path.read_text()) for path in sorted((ROOT / "docs").glob("*.md"))}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader would type."""
    folder = tmp_path_factory.mktemp("reader")
    planted = make_planted(folder / "planted", PlantedSpec(count=100, size=64))
    planted.images_directory.rename(folder / "photos")
    with (planted.directory / "ratings.csv").open() as file:
        rows = [(f"photos/{Path(row['image']).name}", row["score"]) for row in csv.DictReader(file)]
    with (folder / "ratings.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "score"), *rows])
    sets = ["training"] * 8 + ["validation"] * 2 + ["test"] * 2
    lines = [f"{Path(rows[i][0]).name},0,0,0,0.7,0.3,105,{rows[i][1]},0.5,{sets[i]}" for i in range(12)]
    (folder / "koniq10k").mkdir()
    (folder / "koniq10k" / "koniq10k_distributions_sets.csv").write_text(
        "\n".join(["image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set", *lines]) + "\n"
    )
    return folder


def test_the_readme_has_commands() -> None:
    jobs = {word for command in COMMANDS for word in command.words if word.startswith("jobs/")}
    assert {"jobs/convert.py", "jobs/train.py", "jobs/importance.py", "jobs/heatmaps.py", "jobs/report.py"} <= jobs


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command(
    command: Command,
    home: Path,
    local_ray: None,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command.words
    script = next((word for word in words[:2] if word.startswith("jobs/")), None)
    if script is None or script == "jobs/demo.py" or any(_REMOTE.search(text) for text in [*words, *configs(words)]):
        monkeypatch.chdir(ROOT)
        check(words)
        return
    monkeypatch.chdir(home)
    assert words[0] == ".venv/bin/python"
    name = Path(script).stem
    assert importlib.import_module(f"jobs.{name}").main([*words[2:], *_SMALLER.get(name, [])]) == 0
    said = capsys.readouterr().out
    # Ray itself warns, in yellow, of more workers than it likes; many jobs share this cluster, others do not.
    lines = [line for line in said.splitlines() if "(raylet)" not in line]
    drawn = [line for line in lines if re.search(r"[\x00-\x08\x0b-\x1f]", line)]
    assert not drawn, "control characters in what is not a terminal"
    printed = labels(lines)
    for label in labels(command.output):
        assert label in printed, f"README, line {command.line}: the job prints no {label!r} after what stands before it"
        printed = printed[printed.index(label) :]


def configs(words: list[str]) -> list[str]:
    """The configuration files that a command names, their text."""
    return [(ROOT / word).read_text() for word in words if word.startswith("configs/")]


def check(words: list[str]) -> None:
    """What can be said of a command without running it: its files exist, and its configuration is one."""
    program, *rest = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in rest if "=" not in target)
        return
    assert program in {".venv/bin/python", "python", ".venv/bin/ray", "kubectl", "docker", "export"}, words
    for word in rest:
        if re.match(r"(jobs|cluster|configs|tests)/", word):
            assert list(ROOT.glob(word)), f"there is no {word}"
    if "cluster/submit.py" in rest:
        at = rest.index("--")
        assert importlib.import_module("cluster.submit").main([*rest[1:at], "--dry-run", *rest[at:]]) == 0
    script = next((index for index, word in enumerate(rest) if re.fullmatch(r"jobs/\w+\.py", word)), None)
    if script is not None:
        job = importlib.import_module(f"jobs.{Path(rest[script]).stem}")
        name = Path(rest[script]).stem.replace("_", "")
        model = next(value for key, value in vars(job).items() if key.lower() == f"{name}config")
        load_config(model, [word for word in rest[script + 1 :] if word != "&"], doc="")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_other_documents_are_checked(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in DOCUMENTS[document]:
        check(command.words)


def labels(lines: list[str]) -> list[str]:
    """The first words of lines that a job prints: ``ratings     300 images`` and ``embeddings: 64 of 300``."""
    return [match[1] for line in lines if (match := re.match(r"([a-z]+)(?: {2,}|: |  ?\d)", line))]


def test_python(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    run_id = next((home / "out" / "runs").iterdir()).name
    images = [Image.open(path) for path in sorted((home / "photos").iterdir())[:2]]
    blocks = python_blocks(README)
    assert len(blocks) >= 2
    whole = ais.load_backbone
    monkeypatch.setattr(ais, "load_backbone", lambda _name: whole("tiny", weights="random", seed=3), raising=False)
    for block in blocks:
        exec(block.replace("<run_id>", run_id), {"images": images})
