"""The documents of a file of calibration text: plain texts and chats, as data sets are published."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError

TOOLS = "tools"  # the column in which function-calling data sets say what could be called


@dataclass(frozen=True)
class Chat:
    """Messages, each with a role and what its template reads, and the tools that could be called: JSON schemas."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def calls_tools(self) -> bool:
        return any(message.get("tool_calls") or message["role"] == "tool" for message in self.messages)


Document = str | Chat


def documents_of(path: Path, columns: tuple[str, ...]) -> Iterator[Document]:
    """Each row's, read from the first of the columns that it has. Raises UserError with the line that is unreadable."""
    try:
        rows = list(_rows(path, columns))
    except (OSError, ValueError, EOFError, zlib.error, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    for number, row in rows:
        try:
            yield row if path.suffix == ".txt" else _document(_parsed(row), columns)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = " or ".join(columns)
            why = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(
                f"{path}, line {number}: not a JSON object with a {wanted} field{why}. calibration.columns=[<name>] "
                "says which field is read: a text, the messages of a chat, or two, as prompt+response."
            ) from error


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """The rows of a file, numbered from 1; a line of JSON is left as it stands."""
    if path.suffix == ".parquet":
        yield from enumerate(_table(path, columns), 1)
        return
    text = (
        gzip.decompress(path.read_bytes()).decode("utf-8-sig") if path.suffix == ".gz" else path.read_text("utf-8-sig")
    )
    if path.suffix == ".txt":
        yield from ((number, part) for number, part in enumerate(text.split("\n\n"), 1) if part.strip())
        return
    is_array = path.name.removesuffix(".gz").endswith(".json") and text.lstrip().startswith("[")
    rows = json.loads(text) if is_array else text.split("\n")
    yield from ((number, row) for number, row in enumerate(rows, 1) if not isinstance(row, str) or row.strip())


def _parsed(row: Any) -> Any:
    return json.loads(row) if isinstance(row, str) else row


def _table(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a Parquet file, with those of the columns that it has."""
    from pyarrow import parquet

    wanted = {TOOLS, *(name for column in columns for name in column.split("+"))}
    with parquet.ParquetFile(path) as file:
        return file.read([name for name in file.schema_arrow.names if name in wanted]).to_pylist()


def _document(row: Any, columns: tuple[str, ...]) -> Document:
    """What a row holds in the first of the columns that it has. Raises KeyError if it has none, TypeError for what is
    neither a text nor a chat, ValueError for a text of half characters, which no tokenizer takes.
    """
    if not isinstance(row, dict):
        raise TypeError(type(row))
    fitting = [names for column in columns if set(names := column.split("+")) <= row.keys()]
    if not fitting:
        raise KeyError(columns)
    values = [row[name] for name in fitting[0]]
    tools = _tools(row.get(TOOLS))
    if len(values) == 1 and (messages := _messages(values[0])) is not None:
        return Chat([_message(message) for message in messages], tools)
    if not all(isinstance(value, str) for value in values):
        raise TypeError(fitting[0])
    for value in values:
        value.encode()
    if len(values) == 1:
        return str(values[0])
    pairs = zip(("user", "assistant"), values, strict=True)
    return Chat([{"role": role, "content": text} for role, text in pairs], tools)


def _messages(value: Any) -> list[Any] | None:
    """A chat, given as a list or as JSON text of one; None for a plain text."""
    if isinstance(value, str) and value.lstrip().startswith('[{"') and '"role"' in value:
        with contextlib.suppress(ValueError):  # a text that only looks like one
            value = json.loads(value)
    return value if isinstance(value, list) else None


def _tools(value: Any) -> list[Any] | None:
    """Tools of a row, given as a list or as JSON text of one; None where there are none."""
    if isinstance(value, str) and value.strip():
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, list) and value else None


def _message(message: Any) -> dict[str, Any]:
    """A message of a chat as templates read it: arguments of calls as an object, content as one text. Raises TypeError
    or ValueError if it is none.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise TypeError(type(message))
    json.dumps(message, ensure_ascii=False).encode()
    made = {name: value for name, value in message.items() if value is not None}
    if isinstance(content := made.get("content"), list):
        made["content"] = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if calls := made.get("tool_calls"):
        made["tool_calls"] = [_call(call) for call in calls]
    return made


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    with contextlib.suppress(ValueError):  # left as the text that it is
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    return call
