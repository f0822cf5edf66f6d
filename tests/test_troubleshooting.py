"""The page of error messages is true to the code: each message that it quotes is still raised, word for word."""

from __future__ import annotations

import ast
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
VALUE = "…"


def quoted() -> list[str]:
    page = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return [line.removeprefix("> ") for line in page.splitlines() if line.startswith("> ")]


def texts_of_the_code() -> list[str]:
    """Every text in the package, with `VALUE` for what is filled in."""
    found = []
    for path in sorted((PROJECT / "bbopd").rglob("*.py")):
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_every_message_that_is_quoted_is_one_of_the_code():
    texts = texts_of_the_code()
    messages = quoted()
    assert len(messages) >= 20
    assert len(set(messages)) == len(messages)
    gone = [message for message in messages if not any(message in text for text in texts)]
    assert not gone, f"docs/troubleshooting.md quotes messages that the code does not have: {gone}"
