"""Configurations as text: read from YAML and ``key=value`` overrides, and written as YAML.

Nothing but the file and the command line sets a value: no environment variable is looked at. Whatever is wrong is told
in one `ais.errors.ConfigError` that lists every problem found, each with its dotted key, the value and where it came
from.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from ais.config import ConfigT, ConflictError, show
from ais.errors import ConfigError


class Key(NamedTuple):
    """One key of a model, as messages and ``--help`` present it."""

    expected: str  # "whole number >= 1 or null"
    choices: list[str]
    is_text: bool
    is_required: bool
    default: Any
    example: str
    description: str


class _Setting(NamedTuple):
    value: Any
    origin: str  # "configs/train.yaml:12" or "command line"


def parse_config(
    model: type[ConfigT], text: str, overrides: Sequence[str] = (), *, source: str = "configuration"
) -> ConfigT:
    """Read a configuration from YAML ``text`` and ``key=value`` overrides.

    Scalars are those of the YAML 1.2 core schema, in decimal and without leading zeros: ``1e-3`` is a number,
    ``007``, ``1:30``, ``yes`` and ``2026-11-23`` are text (https://yaml.org/spec/1.2.2/#103-core-schema). An
    override of a key that holds text is taken as it stands, except ``null``. A section with nothing under it
    keeps its defaults.

    Args:
        source: what messages call ``text``, such as its path.

    Raises:
        ConfigError: listing every unknown, repeated or missing key and every impossible value.
    """
    keys = keys_of(model)
    settings, problems = _read_yaml(text, source)
    for override in overrides:
        try:
            key, setting = _read_override(override, keys)
        except ConfigError as error:
            problems.append(str(error))
        else:
            settings[key] = setting

    sections = sections_of(keys)
    for key, setting in settings.items():
        if key in keys:
            continue
        if key in sections:
            if setting.value not in (None, {}):
                problems.append(
                    f"{key}: a section, got {show(setting.value)}; its keys are {_names(key, keys)} ({setting.origin})"
                )
        else:
            problems.append(f"{key}: unknown key; {suggest_key(key, keys)} ({setting.origin})")
    try:
        config = model.model_validate(_values(keys, settings))
    except ValidationError as error:
        problems += dict.fromkeys(_describe(error, keys, settings))  # a list may have several items of one problem
    if problems:
        raise config_error(problems)
    return config


def _values(keys: Mapping[str, Key], settings: Mapping[str, _Setting]) -> dict[str, Any]:
    """The nested values that the settings and, where there is none, the defaults give."""
    values: dict[str, Any] = {section: {} for section in sections_of(keys)}
    for name, key in keys.items():
        section, _, leaf = name.rpartition(".")
        target = values[section] if section else values
        if name in settings:
            target[leaf] = settings[name].value
        elif not key.is_required:
            target[leaf] = key.default
    return values


def to_yaml(config: BaseModel) -> str:
    """The whole configuration as YAML; :func:`parse_config` makes an equal one of it."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


# Python refuses to read a number of thousands of digits (ValueError), and brackets nested as deep.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars are null, booleans and decimal numbers as in YAML 1.2, otherwise text."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # An alias can make a value contain itself, and a tag can ask for any type: no job needs them.
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="aliases (*) and tags (!) are not allowed; put text that starts so in quotes",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes each text that a YAML 1.1 reader or :class:`_Loader` would take for something else."""


_Loader.yaml_implicit_resolvers = {}  # forget those of YAML 1.1


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def _read_yaml(text: str, source: str) -> tuple[dict[str, _Setting], list[str]]:
    """The settings by dotted key, and what is wrong with the keys; a syntax error is raised at once."""
    settings: dict[str, _Setting] = {}
    problems: list[str] = []
    origins: dict[str, str] = {}

    def collect(mapping: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in mapping.value:
            origin = f"{source}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{prefix or source}: a key has to be a word ({origin})")
                continue
            key = prefix + key_node.value
            if key in origins:
                problems.append(f"{key}: given twice, first at {origins[key]} ({origin})")
                continue
            origins[key] = origin
            if isinstance(value_node, yaml.MappingNode) and value_node.value:
                collect(value_node, f"{key}.")
            else:
                settings[key] = _Setting(loader.construct_object(value_node, deep=True), origin)

    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            collect(root, "")
        elif root is not None:
            found = show(loader.construct_object(root, deep=True))
            raise config_error([f"{source}: expected a mapping of keys to values, got {found}"])
    except _YAML_ERRORS as error:
        raise config_error([_yaml_problem(error, source)]) from error
    return settings, problems


def _yaml_problem(error: Exception, source: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{source}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}"
    return f"{source}: not valid YAML: {' '.join(str(error).split())}"


def _read_override(override: str, keys: Mapping[str, Key]) -> tuple[str, _Setting]:
    name, equals, raw = override.partition("=")
    if not name or not equals:
        raise ConfigError(f"{override}: expected key=value (command line)")
    if not raw:
        # A shell variable that is not set must not pass for null.
        raise ConfigError(f"{name}: no value after =; write {name}=null to leave it unset (command line)")
    key = keys.get(name)
    if key is None or (key.is_text and raw != "null"):
        return name, _Setting(raw, "command line")
    try:
        return name, _Setting(_Loader(raw).get_single_data(), "command line")
    except _YAML_ERRORS as error:
        raise ConfigError(f"{name}: expected {key.expected}, got {show(raw)} (command line)") from error


def keys_of(model: type[BaseModel]) -> dict[str, Key]:
    """Every key of ``model`` by its dotted name, those of sections after the others."""
    schema = model.model_json_schema()
    keys: dict[str, Key] = {}
    sections: dict[str, Key] = {}
    for name, entry in schema["properties"].items():
        if "$ref" not in entry:
            keys[name] = _key(entry, name in schema.get("required", ()), entry.get("default"))
            continue
        section = schema["$defs"][entry["$ref"].rpartition("/")[2]]
        for leaf, leaf_entry in section["properties"].items():
            if "default" in entry:
                required, default = False, entry["default"][leaf]
            else:
                required, default = leaf in section.get("required", ()), leaf_entry.get("default")
            sections[f"{name}.{leaf}"] = _key(leaf_entry, required, default)
    return keys | sections


_KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "array": "list [text, ...]",
}


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _key(entry: dict[str, Any], required: bool, default: object) -> Key:
    constraints = entry["anyOf"][0] if "anyOf" in entry else entry  # [the type, null]
    choices = list(constraints.get("enum", ()))
    expected = f"one of {', '.join(choices)}" if choices else _KINDS[constraints["type"]]
    if constraints.get("items", {}).get("type") == "number":
        expected = "list [number, ...]"
    if "minItems" in constraints:
        expected += f" of at least {constraints['minItems']}"
    bounds = [f"{sign} {constraints[name]}" for name, sign in _BOUNDS.items() if name in constraints]
    if bounds:
        expected += f" {' and '.join(bounds)}"
    if "pattern" in constraints:
        expected += f" matching {constraints['pattern']}"
    return Key(
        expected=f"{expected} or null" if "anyOf" in entry else expected,
        choices=choices,
        is_text=constraints["type"] == "string",
        is_required=required,
        default=default,
        example=entry["examples"][0] if "examples" in entry else "",
        description=entry["description"],
    )


def sections_of(keys: Mapping[str, Key]) -> list[str]:
    """Names of the sections that the keys are in."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys if "." in key))


def _names(section: str, keys: Mapping[str, Key]) -> str:
    return ", ".join(key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section)


def suggest_key(unknown: str, keys: Mapping[str, Key]) -> str:
    """Say which key may have been meant, or which there are."""
    section, _, leaf = unknown.rpartition(".")
    by_leaf: dict[str, list[str]] = {}
    for key in keys:
        by_leaf.setdefault(key.rpartition(".")[2], []).append(key)
    # The right leaf in a wrong or misspelt section first, then a misspelt key, then both wrong.
    same_leaf = by_leaf.get(leaf, [])
    similar = difflib.get_close_matches(unknown, same_leaf, n=1, cutoff=0.8) or same_leaf
    similar = similar or difflib.get_close_matches(unknown, keys, n=1, cutoff=0.75)
    for leaf_match in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75):
        similar = similar or by_leaf[leaf_match]
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    if section in sections_of(keys):
        return f"the keys of {section} are {_names(section, keys)}"
    return f"the keys are {_names('', keys)} and those of the sections {', '.join(sections_of(keys))}"


def _describe(error: ValidationError, keys: Mapping[str, Key], settings: Mapping[str, _Setting]) -> Iterator[str]:
    """One line per problem that the model found."""
    for detail in error.errors(include_url=False):
        name = ".".join(part for part in detail["loc"] if isinstance(part, str))  # without the index in a list
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ConflictError):
            for conflict in cause.conflicts:
                involved = [".".join([*map(str, detail["loc"]), key]) for key in conflict.keys]
                origins = dict.fromkeys(settings[key].origin for key in involved if key in settings)
                yield f"{involved[0]}: {conflict.reason} ({', '.join(origins)})"
            continue
        key = keys[name]
        if name not in settings:
            example = f", for example {name}={key.example}" if key.example else ""
            yield f"{name}: required and not given; expected {key.expected}{example}"
            continue
        value, origin = settings[name]
        if cause is not None:
            yield f"{name}: {cause} ({origin})"
        else:
            yield f"{name}: expected {key.expected}, got {show(value)}{_hint(value, key)} ({origin})"


def _hint(value: object, key: Key) -> str:
    if isinstance(value, str):
        similar = difflib.get_close_matches(value.lower(), key.choices, n=1)
        return f"; did you mean {similar[0]}?" if similar else ""
    if key.is_text and isinstance(value, bool | int | float):
        return "; put it in quotes"
    return ""


def config_error(problems: Sequence[str]) -> ConfigError:
    """One error that lists all problems."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError("\n".join([f"{count} in the configuration (--help-all lists every key):", *problems]))
