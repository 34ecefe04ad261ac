"""Every refusal says what to do next: the messages of all errors that a user can cause, read from the source."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a message asks of its reader. Not every one of these words is a request everywhere, but a message with none of
# them asks for nothing.
_WORDS = (
    "add|allow|average|bring|change|check|choose|compare|continues?|copy|delete|draw|expected|fetch|fill|fit|give|install",
    "join|keep|leave|lower|make|mark|mend|move|name|needed|needs|put|raise|rate|remove|rename|run|save|separate|set|start",
    "submit|take|train|try|unpack|use|wait|wrap|writes?",
)
_ELSEWHERE = ("_ANEW", "hint", "reason", "way_out", "did you mean", "goes on")  # said by a constant or a variable
_REQUESTS = re.compile(rf"\b({'|'.join([*_WORDS, *_ELSEWHERE])})\b")


def messages() -> dict[str, str]:
    """Place and source text of the message of every error of ours that is raised."""
    trees = {
        path: ast.parse(path.read_text())
        for folder in ("ais", "jobs", "cluster")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    ours = {"AisError"}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while new := {node.name for node in classes if any(ast.unparse(base) in ours for base in node.bases)} - ours:
        ours |= new
    # Reasons of rows and of findings, which the job that lists them explains.
    ours -= {"ImageError", "ChangedError", "DamagedError"}
    found = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) in ours:
                found[f"{path.relative_to(ROOT)}:{node.lineno}"] = ast.unparse(node.exc)
    return found


def test_every_message_says_what_to_do_next() -> None:
    found = messages()
    assert len(found) > 100
    silent = [
        f"{place}: {text}"
        for place, text in found.items()
        if not _REQUESTS.search(text.partition("(")[2]) and "'" in text
    ]
    assert not silent, "\n".join(silent)
