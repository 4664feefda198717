"""Calibration text: what is held out is further text, and changes nothing of what is calibrated on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from harness.data import Calibration
from harness.documents import Chat, documents_of
from harness.errors import UserError
from harness.models import Model
from harness.sweep import expand

MODEL = expand(["model=tiny"]).cells[0].model


def calibration(file: Path, **changes: int) -> Calibration:
    return Calibration("text", (str(file),), **{"sequences": 4, "length": 16, "seed": 3, "held_out": 2, **changes})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents, each of one number said over and over."""
    path = tmp_path_factory.mktemp("text") / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": f" {number}" * 9}) + "\n" for number in range(100, 160)))
    return path


def test_held_out_sequences_come_after_and_change_nothing_before(file: Path) -> None:
    plain = calibration(file, held_out=0).tokens(MODEL)
    more = calibration(file).tokens(MODEL)
    assert plain.shape == (4, 16) and more.shape == (6, 16)
    np.testing.assert_array_equal(more[:4], plain)


def test_no_document_is_on_both_sides(file: Path) -> None:
    tokens = calibration(file, sequences=9, held_out=9).tokens(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL.folder)
    seen, held = (set(tokenizer.decode(part.flatten()).replace("<", " <").split()) for part in (tokens[:9], tokens[9:]))
    numbers = {str(number) for number in range(100, 160)}
    assert len(seen & numbers) >= 2 and len(held & numbers) >= 2
    assert not seen & held & numbers


def test_too_little_text_for_what_is_held_out_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match=r"4 \+ 900 sequences of 16"):
        calibration(file, held_out=900).tokens(MODEL)


def test_the_identity_of_the_text_does_not_depend_on_what_is_held_out(file: Path) -> None:
    assert calibration(file).identity() == calibration(file, held_out=9).identity()


CALL = {"type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
    {"role": "assistant", "content": "look", "tool_calls": [CALL], "thought": None},
]


def test_chats_are_read_as_data_sets_of_agents_hold_them(tmp_path: Path) -> None:
    """As a list or as JSON text of one; calls with their arguments as an object; the tools of a row with it."""
    rows = [{"messages": CHAT}, {"messages": json.dumps(CHAT), "tools": json.dumps([{"name": "bash"}])}]
    rows.append({"messages": "[plain text, no chat]"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = documents_of(tmp_path / "a.jsonl", ("messages",))
    assert isinstance(first, Chat) and isinstance(second, Chat)
    assert first.messages == second.messages and third == "[plain text, no chat]"
    system, assistant = first.messages
    assert system["content"] == "be brief" and "thought" not in assistant
    assert assistant["tool_calls"][0]["function"] == {"name": "bash", "arguments": {"command": "ls"}}
    assert (first.tools, second.tools) == (None, [{"name": "bash"}])


def test_tools_reach_the_template(tmp_path: Path) -> None:
    """Those of the row; else, of a chat that calls some, those of the file that the calibration names, which is part of
    its identity.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL.folder)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copy(MODEL.folder / "config.json", tmp_path / "model")
    model = Model("calls", str(tmp_path / "model"))
    rows = [{"messages": [{"role": "user", "content": "x" * 40}], "tools": [{"name": "own"}]}]
    rows.append({"messages": [{"role": "user", "content": "y" * 40}, {"role": "assistant", "tool_calls": [CALL]}]})
    rows.append({"messages": [{"role": "user", "content": "z" * 40}, {"role": "tool", "content": "done"}]})
    rows.append({"messages": [{"role": "user", "content": "v" * 40}, {"role": "assistant", "content": "no call"}]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    (tmp_path / "tools.json").write_text('[{"name": "shared"}]')
    made = replace(
        calibration(tmp_path / "a.jsonl", held_out=0, sequences=14),
        columns=("messages",),
        tools=str(tmp_path / "tools.json"),
    )
    text = tokenizer.decode(made.tokens(model).flatten())
    assert "own xxx" in text and "shared yyy" in text and "shared zzz" in text
    assert "vvv" in text and "shared vvv" not in text
    assert made.identity() != replace(made, tools=None).identity()
    for content in ("{}", "[broken"):
        (tmp_path / "tools.json").write_text(content)
        with pytest.raises(UserError, match="calibration.tools=.* cannot be read as JSON"):
            replace(made).check()


def test_a_mark_at_the_beginning_of_a_file_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"text": "one"}\n'), ("a.txt", "one")):
        (tmp_path / name).write_text(content, "utf-8-sig")
        assert list(documents_of(tmp_path / name, ("text",))) == ["one"]
    (tmp_path / "b.jsonl").write_text('{"text": "one\n')
    with pytest.raises(UserError, match=r"line 1: .*Unterminated string.* calibration.columns="):
        list(documents_of(tmp_path / "b.jsonl", ("text",)))


def test_tokens_that_the_model_has_not_are_refused(file: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    with pytest.raises(UserError, match=r"gives token \d+, and the model has embeddings of 20"):
        calibration(file).tokens(Model("another", str(folder)))


def test_one_long_document_is_refused_with_why_it_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line\n" * 400)
    with pytest.raises(UserError, match=r"in 1 documents .*begins with a document of its own.* held out: 0"):
        calibration(tmp_path / "a.txt").tokens(MODEL)


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL.folder)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }} {{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copy(MODEL.folder / "config.json", tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 200}]}) + "\n")
    made = replace(calibration(tmp_path / "a.jsonl", held_out=0, sequences=2), columns=("messages",))
    text = tokenizer.decode(made.tokens(Model("dated", str(tmp_path / "model"))).flatten())
    assert "01 January 2026 xxx" in text


def test_files_are_drawn_from_in_turn_by_their_weights(tmp_path: Path) -> None:
    """Until all are; within a file in an order of the seed."""
    for name, count in (("a", 6), ("b", 3)):
        (tmp_path / name).with_suffix(".txt").write_text("\n\n".join(f"{name}{index}" for index in range(count)))
    both = replace(calibration(tmp_path / "a.txt"), files=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt")))
    drawn = replace(both, weights=(1, 2))._shuffled()
    assert [str(document)[0] for document in drawn] == list("abbabaaaa")
    assert sorted(map(str, drawn)) == sorted(map(str, both._shuffled()))
    assert replace(both, weights=(1, 2), seed=4)._shuffled() != drawn
    assert both.identity() != replace(both, weights=(1, 2)).identity()
    for weights in ((1,), (1, 0)):
        with pytest.raises(UserError, match="one number of at least 1 for each of the 2 files"):
            replace(both, weights=weights).check()


@pytest.mark.parametrize("name", ["xlam", "swe_smith", "agentic", "agentic_reasoning"])
def test_presets_of_agents_name_their_columns_and_tools(name: str) -> None:
    (cell,) = expand([f"calibration={name}"]).cells
    made = cell.calibration
    assert made.name == name and (made.tools is not None) == (name != "xlam")
    assert made.weights is None or len(made.weights) == len(made.files)
    assert made.columns == {"xlam": ("query+answers",), "swe_smith": ("messages",)}.get(
        name, ("instruction+output", "query+answers", "messages")
    )
    if made.tools:
        assert [tool["function"]["name"] for tool in made._tools] == ["bash", "str_replace_editor", "submit"]
