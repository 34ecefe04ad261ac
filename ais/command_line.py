"""The command line of every job: flags, help, exit codes."""

import difflib
import io
import os
import select
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, NoReturn

from pydantic import BaseModel

from ais.config import ConfigT, Section, show
from ais.errors import (
    AisError,
    BackboneError,
    ConfigError,
    DatasetError,
    HeadError,
    ImportanceError,
    LeaseLostError,
    LockedError,
    RatingsError,
    SimilarityError,
    TerminatedInterrupt,
    WeightsError,
)
from ais.secrets import redact
from ais.settings import Key, config_error, keys_of, parse_config, sections_of, suggest_key


@dataclass(frozen=True)
class Loaded(Generic[ConfigT]):
    """What a command line asked for."""

    config: ConfigT
    dry_run: bool


def load_config(model: type[ConfigT], argv: Sequence[str], *, doc: str) -> Loaded[ConfigT]:
    """Read a job's command line: ``[--config FILE] [--dry-run] [key=value ...]`` or ``--help``.

    Overrides beat the file, a later override beats an earlier one. ``--help`` prints an example, ``doc`` and the
    keys of ``model`` on one screen, ``--help NAME`` everything about a key or a section, ``--help-all`` all of it.

    Raises:
        ConfigError: anything is wrong with the flags, the file or a value; all problems are listed.
        SystemExit: with code 0, after ``--help``.
    """
    if (text := _help_wanted(model, argv, doc)) is not None:
        print(text)
        raise SystemExit(0)
    arguments = _read_arguments(argv)
    text, source = ("", "") if arguments.file is None else (_read_text(arguments.file), arguments.file)
    config = parse_config(model, text, arguments.overrides, source=source)
    _refuse_lost_outputs(config)
    return Loaded(config, arguments.dry_run)


def _help_wanted(model: type[Section], argv: Sequence[str], doc: str) -> str | None:
    """What to print if the command line asks for help, whatever else is on it."""
    if "--help-all" in argv:
        return _help_all(model)
    for index, argument in enumerate(argv):
        name = argument.partition("=")[2]
        if argument in ("--help", "-h"):
            following = argv[index + 1] if index + 1 < len(argv) else "-"
            name = "" if following.startswith("-") or "=" in following else following
        elif not argument.startswith("--help="):
            continue
        return _help_about(model, name) if name else _help(model, doc)
    return None


# Where Ray unpacks the working directory of a submitted job, on every node anew.
_UNPACKED = "/runtime_resources/working_dir_files/"


def _refuse_lost_outputs(config: BaseModel) -> None:
    """Refuse what a submitted job would write into its unpacked copy of the working directory, which is deleted.

    Raises:
        ConfigError: there is something.
    """
    if _UNPACKED not in os.getcwd():
        return
    lost = [
        f"{key}: {show(value)} is relative, and this job runs in a copy of the submitted folder that is deleted after"
        " it; give the full path of a folder that all nodes share, or a remote address"
        for key in ("output", "cache")
        if (value := getattr(config, key, None)) and "://" not in value and not os.path.isabs(os.path.expanduser(value))
    ]
    if lost:
        raise config_error(lost)


# Errors that the same command would meet again.
_IN_VAIN = (
    ConfigError,
    BackboneError,
    WeightsError,
    HeadError,
    RatingsError,
    SimilarityError,
    ImportanceError,
    DatasetError,
)


def run_job(main: Callable[[list[str]], int]) -> NoReturn:
    """Run ``main`` on the command line and exit with its code.

    An :class:`~ais.errors.AisError` is printed without traceback. The codes of every job:

    ===  ====================================================================================================
      0  all is done, or was before
      1  work did not end well; what is good is kept, and the same command continues
      2  the configuration is wrong, or something that it names cannot be used: the same command would fail again
      3  somebody else writes the same output (`LockedError`, `LeaseLostError`); try again when they are done
    130  Ctrl-C, as shells do
    141  whoever reads standard output has gone, as of ``| head``; the same command continues
    143  told to end (SIGTERM), as shells do
    ===  ====================================================================================================
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log shows how far a job is, not only that it ended; a terminal that is not UTF-8 shows escapes.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    told: list[int] = []

    def terminate(number: int, frame: object) -> NoReturn:  # noqa: ARG001 - the signature of a signal's handler
        told.append(number)
        raise TerminatedInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        _check_working_directory()
        code = main(sys.argv[1:])
    except AisError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        code = 2 if isinstance(error, _IN_VAIN) else 3 if isinstance(error, LockedError | LeaseLostError) else 1
    except KeyboardInterrupt as interrupt:
        told_to = bool(told) or isinstance(interrupt, TerminatedInterrupt)  # of which Ray makes a plain one
        print("told to end" if told_to else "interrupted", file=sys.stderr)
        code = 128 + signal.SIGTERM if told_to else 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _check_working_directory() -> None:
    """Refuse to work in a folder that was deleted, where no relative path means anything.

    Raises:
        ConfigError: it was.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the working directory was deleted; change to one that is there, and start again") from error


def _nobody_reads() -> bool:
    """Whether the other end of standard output is closed, as by ``| head``; what is left to say goes nowhere then."""
    other_end = select.poll()
    other_end.register(sys.stdout.fileno(), 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in other_end.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it at its exit
    return True


class _Arguments(NamedTuple):
    file: str | None
    overrides: list[str]
    dry_run: bool


def _read_arguments(argv: Sequence[str]) -> _Arguments:
    files: list[str] = []
    overrides: list[str] = []
    problems: list[str] = []
    dry_run = False
    rest = iter(argv)
    for argument in rest:
        if argument == "--dry-run":
            dry_run = True
        elif argument == "--config":
            files.append(next(rest, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        elif argument.startswith("-"):
            hint = f"; write {argument.lstrip('-')}" if "=" in argument else ""
            flags = "the flags are --config FILE, --dry-run, --help [NAME] and --help-all"
            problems.append(f"{argument}: unknown flag{hint}; {flags} (command line)")
        elif argument != argument.encode("utf-8", "replace").decode():  # no table can hold such an address
            problems.append(f"{argument}: not UTF-8 text; rename the file or folder that it names (command line)")
        else:
            overrides.append(argument)
    if "" in files:
        problems.append("--config: expected the path of a YAML file after it, got nothing (command line)")
    if len(files) > 1:
        problems.append(f"--config: expected one file, got {', '.join(map(show, files))} (command line)")
    if problems:
        raise config_error(problems)
    return _Arguments(files[0] if files else None, overrides, dry_run)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise config_error([f"--config: cannot read {show(path)}: {error.strerror}"]) from error
    except ValueError as error:  # UnicodeDecodeError, or a path with a null character
        raise config_error([f"--config: cannot read {show(path)} as UTF-8 text: {error}"]) from error


_HELP_WIDTH = 110


_HELP_LINES = 40  # a screen


def _help(model: type[Section], doc: str) -> str:
    """One screen: an example, what the job does, its flags and keys, a line each."""
    keys = keys_of(model)
    own = [name for name, key in keys.items() if key.is_required or "." not in name]
    own.sort(key=lambda name: not keys[name].is_required)
    sections = sections_of(keys)
    width = max(len(name) for name in [*own, *(f"{section}.*" for section in sections)])
    lines = [
        *_usage(model, keys),
        "",
        doc.strip(),
        "",
        "  --config FILE   read the configuration from a YAML file; key=value beats the file",
        "  --dry-run       print the resolved configuration and what would be done, and do nothing",
        "  --help NAME     everything about one key or one section; --help-all: about all of them",
        "",
    ]
    for name in own:
        default = "REQUIRED" if keys[name].is_required else show(keys[name].default)
        lines.append(_shortened(f"  {name:<{width}}  {default:<10}  {keys[name].description}"))
    listed = []
    for name in sections:
        number = sum(key.startswith(f"{name}.") for key in keys)
        count = f"{number} key{'s' if number > 1 else ''}"
        listed.append(
            _shortened(f"  {name + '.*':<{width}}  {count:<10}  {model.model_fields[name].annotation.__doc__}")
        )
    if len("\n".join([*lines, *listed]).splitlines()) >= _HELP_LINES:
        listed = textwrap.wrap(f"Sections: {', '.join(f'{name}.*' for name in sections)}", _HELP_WIDTH)
    lines += ["", *listed]
    return "\n".join(lines)


def _usage(model: type[Section], keys: Mapping[str, Key]) -> list[str]:
    program = f"python {os.path.relpath(sys.argv[0])}"
    required = [f"{name}={key.example}" for name, key in keys.items() if key.is_required]
    required = [shlex.quote(override) for override in [*required, *model.EXAMPLE]]
    example = " ".join(["Example:  " + program, *required])
    if len(example) > _HELP_WIDTH:
        example = " \\\n            ".join(["Example:  " + program, *required])
    return [example, f"Usage:    {program} [--config FILE] [--dry-run] [key=value ...]"]


def _shortened(line: str) -> str:
    return line if len(line) <= _HELP_WIDTH else line[: _HELP_WIDTH - 1].rpartition(" ")[0].rstrip(",;:") + "…"


def _help_all(model: type[Section]) -> str:
    """Every key with what it takes, its default and its meaning."""
    keys = keys_of(model)
    parts = [
        "\n".join(_usage(model, keys)),
        *(_help_section(model, keys, section) for section in ["", *sections_of(keys)]),
    ]
    return "\n\n".join(parts)


def _help_about(model: type[BaseModel], name: str) -> str:
    """Everything about one key or one section.

    Raises:
        ConfigError: there is no such name.
    """
    keys = keys_of(model)
    name = name.removesuffix(".*")
    if name in sections_of(keys):
        return _help_section(model, keys, name)
    if name in keys:
        return _help_key(name, keys[name])
    near = difflib.get_close_matches(name, sections_of(keys), n=1)
    hint = f"did you mean {near[0]}?" if near else suggest_key(name, keys)
    raise config_error([f"--help {name}: no key and no section; {hint} (command line)"])


def _help_section(model: type[BaseModel], keys: Mapping[str, Key], section: str) -> str:
    heading = f"{section}: {model.model_fields[section].annotation.__doc__}" if section else "Keys:"
    own = [_help_key(name, key) for name, key in keys.items() if name.rpartition(".")[0] == section]
    return "\n".join([heading, *own])


def _help_key(name: str, key: Key) -> str:
    default = "REQUIRED" if key.is_required else show(key.default)
    indent = " " * 6
    meaning = textwrap.wrap(key.description, _HELP_WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([f"  {name} ({key.expected}): {default}", *meaning])
