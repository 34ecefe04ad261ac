"""Check KubeRay manifests against the schemas of KubeRay's resources, without a Kubernetes. Unknown fields are errors.

    python cluster/kuberay/validate.py cluster/kuberay/*.yaml

`schemas.json` holds what KubeRay 1.7.0 publishes as custom resource definitions, without descriptions and with every
part that repeats kept once. A newer KubeRay's are made from its files with

    python cluster/kuberay/validate.py --from-crds ray.io_rayclusters.yaml ray.io_rayjobs.yaml ray.io_raycronjobs.yaml
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).with_name("schemas.json")
_LEFT_OUT = {"description", "default", "format"}
_SHARED_FROM = 300  # characters of a part that is worth keeping once


def problems(manifest: dict[str, Any], schemas: dict[str, Any] | None = None) -> list[str] | None:
    """Return what is wrong with a manifest, or ``None`` if it is of a kind that is not KubeRay's.

    Args:
        manifest: one document.
        schemas: as in `SCHEMAS`.
    """
    schemas = schemas or json.loads(SCHEMAS.read_text())
    schema = schemas["kinds"].get(f"{manifest.get('apiVersion')}/{manifest.get('kind')}")
    if schema is None:
        return None
    validator = Draft202012Validator({**schema, "$defs": schemas["$defs"]})
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(manifest)]


def pod_problems(template: dict[str, Any], schemas: dict[str, Any] | None = None) -> list[str]:
    """Return what is wrong with a pod template, such as that of a CronJob."""
    schemas = schemas or json.loads(SCHEMAS.read_text())
    validator = Draft202012Validator({**schemas["pod_template"], "$defs": schemas["$defs"]})
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(template)]


def from_crds(definitions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make the schemas of custom resource definitions, in their newest version each."""
    kinds = {}
    for definition in definitions:
        spec = definition["spec"]
        version = next(version for version in spec["versions"] if version["storage"])
        schema = _strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}  # its own definition says no more
        kinds[f"{spec['group']}/{version['name']}/{spec['names']['kind']}"] = schema
    seen = Counter(text for schema in kinds.values() for text in _parts(schema))
    names: dict[str, str] = {}
    definitions_by_name: dict[str, Any] = {}

    def shared(part: Any) -> Any:
        if isinstance(part, list):
            return [shared(item) for item in part]
        if not isinstance(part, dict):
            return part
        text = json.dumps(part, sort_keys=True)
        inside = {key: shared(value) for key, value in part.items()}
        if seen[text] < 2 or len(text) < _SHARED_FROM or "type" not in part:
            return inside  # not worth it, or no schema but a table of them
        if text not in names:
            names[text] = f"part{len(names)}"
            definitions_by_name[names[text]] = inside
        return {"$ref": f"#/$defs/{names[text]}"}

    shared_kinds = {kind: shared(schema) for kind, schema in kinds.items()}
    template = kinds["ray.io/v1/RayCluster"]
    for name in ("spec", "headGroupSpec", "template"):
        template = template["properties"][name]
    return {"kinds": shared_kinds, "pod_template": shared(template), "$defs": definitions_by_name}


def _parts(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield json.dumps(part, sort_keys=True)
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _parts(value)


def _strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            result[key] = {name: _strict(inside) for name, inside in value.items()}
        elif key not in _LEFT_OUT and not key.startswith("x-kubernetes-"):
            result[key] = _strict(value)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    result.pop("nullable", None)
    if "properties" in schema:
        # The server fills in defaults before it checks what is required.
        required = [name for name in schema.get("required", []) if "default" not in schema["properties"].get(name, {})]
        result.pop("required", None)
        if required:
            result["required"] = required
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    return result


def main(argv: list[str]) -> int:
    """Check files, or make the schemas anew; return the exit code."""
    if argv[:1] == ["--from-crds"]:
        definitions = [yaml.safe_load(Path(path).read_text()) for path in argv[1:]]
        SCHEMAS.write_text(json.dumps(from_crds(definitions), separators=(",", ":"), sort_keys=True) + "\n")
        return 0
    if not argv or argv[0].startswith("-"):
        print(__doc__)
        return 2
    wrong = 0
    for path in argv:
        for manifest in yaml.safe_load_all(Path(path).read_text()):
            found = problems(manifest)
            print(f"{'not KubeRay' if found is None else 'wrong' if found else 'good':12}{path} {manifest.get('kind')}")
            for problem in found or []:
                print(f"            {problem}")
            wrong += bool(found)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
