"""Experiments as configuration: the grid is the paper's, Hydra runs what we expand, and texts from the hub are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from huggingface_hub import constants
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from pyarrow import parquet
from transformers import AutoTokenizer

from harness.build import CONF
from harness.data import Calibration
from harness.errors import UserError
from harness.models import ROOT, Model
from harness.published import AVERAGES, BENCHMARKS, reference
from harness.sweep import Sweep, expand

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
PAPER = {"uncompressed", "M-SMoE", "HC-SMoE", "Frequency", "EAN", "REAP"}


def expanded(experiment: str, *overrides: str) -> Sweep:
    return expand([f"experiment={experiment}", "dry_run=true", *overrides])


def rows_of(table: str, models: list[str]) -> pd.DataFrame:
    """What version 2 of the paper prints of these models in this table."""
    rows = reference()
    return rows[(rows["paper_version"] == "v2") & (rows["table"] == table) & rows["our_model"].isin(models)]


def params(*arguments: str) -> dict[str, list[str]]:
    """The grid that Hydra's own sweeper makes of a command line: values by setting."""
    try:
        hydra = Hydra.create_main_hydra2("test", create_config_search_path(str(CONF)))
        config = hydra.compose_config("config", list(arguments), RunMode.MULTIRUN, with_log_configuration=False)
        given = [*(f"{name}={value}" for name, value in config.hydra.sweeper.params.items()), *arguments]
    finally:
        GlobalHydra.instance().clear()
    return {
        override.key_or_group: [*override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.value()]
        for override in OverridesParser.create().parse_overrides(given)
    }


# ---- the grids


def test_what_a_model_can_be_tested_on_is_said_once_and_hydra_reads_it_as_we_do() -> None:
    """`domain: ${model.domains}` follows a model named on the command line."""
    assert params("experiment=reap_table2")["domain"] == ["coding", "creative", "math", "mc"]
    tiny = params("experiment=reap_table2", "model=tiny")
    assert tiny["domain"] == ["tiny_coding", "tiny_math", "tiny_mc"]
    assert tiny["seed"] == ["42", "11", "99"] and tiny["ratio"] == ["0.25", "0.5"]
    ours = expanded("reap_table2", "model=tiny", "method=none,reap", "seed=42", "ratio=0.5")
    suites = {(cell.calibration.name, *(task.name for task in cell.tasks)) for cell in ours.cells}
    assert suites == {("tiny_code", "tiny_code"), ("tiny_sums", "tiny_sums"), ("tiny_facts", "tiny_facts")}


def test_the_table_is_filled_by_the_embedded_model_under_the_experiments_name() -> None:
    sweep = expanded("reap_table2", "model=tiny", "seed=42", "ratio=0.5")
    assert sweep.name == "reap_table2"
    assert {cell.label for cell in sweep.cells} == PAPER
    sweep.check()
    for cell in sweep.cells:
        assert cell.calibration.name == cell.tasks[0].name, "each domain on its own text"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_the_papers_methods_ratios_and_models(experiment: str) -> None:
    grid = params(f"experiment={experiment}")
    labels = {"none": "uncompressed", "m_smoe": "M-SMoE", "hc_smoe": "HC-SMoE", "frequency": "Frequency"}
    labels |= {"ean": "EAN", "reap": "REAP"}
    models = grid.get("model", ["qwen3_30b_a3b"])
    rows = rows_of(experiment.removeprefix("reap_").removeprefix("table").upper(), models)
    assert set(rows["our_model"]) == set(models)
    assert set(rows["our_method"]) == {labels[name] for name in grid["method"]}
    assert set(rows["ratio"]) == {0.0, *map(float, grid["ratio"])}
    has_deviations = rows[rows["our_method"] != "uncompressed"]["std"].notna().mean() > 0.5
    several = has_deviations or experiment == "reap_table2"  # whose deviations Tables A6 and A7 print
    assert len(grid["seed"]) == (3 if several else 1)


def test_domains_pair_benchmarks_and_texts_as_the_paper_does() -> None:
    """Every benchmark of Tables 2 and 3 is either scored after the text that the paper calibrates it on, or absent."""
    for experiment, model, table in (("reap_table2", "qwen3_30b_a3b", "2"), ("reap_table3", "kimi_k2", "3")):
        sweep = expanded(experiment, f"model={model}", "seed=42", "ratio=0.5", "method=reap")
        scored = {
            (name, cell.calibration.name)
            for cell in sweep.cells
            for task in cell.tasks
            for (known, metric), name in BENCHMARKS.items()
            if known == task.name and metric in (getattr(task, "metrics", None) or (metric,))
        }
        rows = rows_of(table, [model])
        for benchmark, text in set(zip(rows["benchmark"], rows["our_calibration"], strict=True)):
            parts = AVERAGES["v2"].get(benchmark, (benchmark,))
            leaves = [leaf for part in parts for leaf in AVERAGES["v2"].get(part, (part,))]
            for leaf in leaves:
                absent = any(leaf.startswith(name) for name in sweep.absent)
                assert absent or not text or (leaf, text) in scored, (leaf, text)


def test_web_text_against_code_keeps_the_benchmarks() -> None:
    grid = params("experiment=reap_a8")
    assert (grid["calibration"], grid["domain"]) == (["c4", "evol_codealpaca"], ["coding", "mc"])
    sweep = expanded("reap_a8", "model=qwen3_30b_a3b", "method=reap", "ratio=0.5")
    found = {(cell.calibration.name, len(cell.tasks)) for cell in sweep.cells}
    assert found == {(text, number) for text in ("c4", "evol_codealpaca") for number in (2, 8)}


def test_expanding_needs_neither_weights_nor_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model's files were asked for")

    monkeypatch.setattr(Model, "_fetch", refuse)
    monkeypatch.setattr("harness.data._fetched", refuse)
    sweep = expand(["model=qwen3_30b_a3b,mixtral_8x7b", "domain=coding,mc", "method=none,reap"])
    assert len(sweep.cells) == 8


def test_cells_that_differ_may_not_share_a_row_though_no_model_is_here() -> None:
    for two in ("calibration.sequences=8,16", "limit=1,2", "model.path=a/b,c/d", "serve.dtype=float32,bfloat16"):
        with pytest.raises(UserError, match="share the table row"):
            expand(["model=qwen3_30b_a3b", "calibration=c4", "suite=mc", "method=reap", two])
    assert len(expand(["method=reap", "calibration.batch_size=1,2"]).cells) == 2, "changes no number"


def test_a_domain_without_a_suite_is_refused_alone_and_left_out_beside_others() -> None:
    with pytest.raises(UserError, match="WildBench creative writing: .*gpt-4o"):
        expand(["domain=creative", "method=none"])
    sweep = expand(["domain=creative,tiny_math", "method=none"])
    assert [task.name for cell in sweep.cells for task in cell.tasks] == ["tiny_sums"]
    assert list(sweep.absent) == ["WildBench creative writing"]
    with pytest.raises(UserError, match="no tasks"):
        expand(["suite.tasks=[]"]).check()


# ---- calibration text


ROWS = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(40)]
CHATS = [
    {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
    for row in ROWS
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text(files: list[Path | str], columns: tuple[str, ...] = ("text",), **more: int) -> Calibration:
    numbers = {"sequences": 4, "length": 16, "seed": 3, "held_out": 2, **more}
    return Calibration("text", tuple(map(str, files)), columns=columns, **numbers)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """The embedded model's tokenizer, without and with a chat template."""
    source = Model("tiny", "tasks/tiny/model")
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    assert tokenizer.chat_template is None
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    return source, Model("chat", str(folder))


def write(folder: Path, rows: list[dict]) -> list[Path]:
    """The same rows in every form that is read."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    paths = [folder / name for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet")]
    paths[0].write_text(lines)
    paths[1].write_bytes(gzip.compress(lines.encode()))
    paths[2].write_text(json.dumps(rows, indent=1))
    paths[3].write_bytes(gzip.compress(lines.encode()))  # C4's: named json, a row per line
    parquet.write_table(pa.Table.from_pylist(rows), paths[4])
    return paths


def test_every_form_and_every_way_to_write_a_chat_gives_the_same_tokens(tmp_path: Path, models) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "chats").mkdir()
    pairs, chats = write(tmp_path / "pairs", ROWS), write(tmp_path / "chats", CHATS)
    for model in models:
        made = [text([path], ("instruction+output",)).tokens(model).tolist() for path in pairs]
        made += [text([path], ("messages",)).tokens(model).tolist() for path in chats]
        assert all(tokens == made[0] for tokens in made)


def test_a_chat_is_written_by_the_template_and_else_line_by_line(tmp_path: Path, models) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[7]) + "\n")
    written = []
    for model in models:
        tokens = text([tmp_path / "rows.jsonl"], ("instruction+output",), sequences=1, length=8, held_out=0).tokens(
            model
        )
        written.append(AutoTokenizer.from_pretrained(model.folder).decode(tokens[0]))
    assert "Say 7.\nIt is 7.".startswith(written[0].strip()) and written[0].startswith("Say 7")
    assert written[1].startswith("<user>Say")
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    stream = text([tmp_path / "many.jsonl"], ("instruction+output",), length=64).tokens(models[1]).flatten()
    said = AutoTokenizer.from_pretrained(models[1].folder).decode(stream)
    assert said.count("<user>") > 5
    assert 0 <= said.count("<user>") - said.count("<assistant>") <= 1, "no answer is asked for after the last message"


def test_the_first_column_that_a_row_has_is_read_so_files_may_be_mixed(tmp_path: Path, models) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"plain {n}"}) + "\n" for n in range(40)))
    mixed = text([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], ("instruction+output", "text"), length=64)
    seen = AutoTokenizer.from_pretrained(models[0].folder).decode(mixed.tokens(models[0]).flatten())
    assert "Say" in seen and "plain" in seen
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: not a JSON object with a instruction\+output field"):
        text([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], ("instruction+output",)).tokens(models[0])


def test_how_rows_are_read_is_part_of_the_identity_and_what_was_before_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "messages": "b"}) + "\n")
    plain = text([tmp_path / "a.jsonl"])
    assert set(plain.identity()) == {"documents", "sequences", "length", "seed"}
    others = [text([tmp_path / "a.jsonl"], columns).identity() for columns in (("messages",), ("text+messages",))]
    assert plain.identity() not in others and others[0] != others[1]


def test_a_chat_template_is_part_of_the_tokenizer(tmp_path: Path, models) -> None:
    before = Model("a", str(models[1].folder)).tokenizer_digest
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in models[1].folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert Model("b", str(copy)).tokenizer_digest == before
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + "!" if template.exists() else "!")
    assert Model("c", str(copy)).tokenizer_digest != before


BAD = {
    "a row that is no object": ("[1]\n", ("text",), "line 1"),
    "a column of numbers": ('{"text": 3}\n', ("text",), "line 1"),
    "a response that is no text": ('{"a": "x", "b": ["y"]}\n', ("a+b",), "line 1"),
    "broken json": ('{"text": "a"}\n{"text"\n', ("text",), "line 2"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_rows_that_cannot_be_read_are_named(case: str, tmp_path: Path, models) -> None:
    content, columns, words = BAD[case]
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        text([tmp_path / "a.jsonl"], columns).tokens(models[0])


def test_damaged_files_and_columns_that_cannot_be_are_refused(tmp_path: Path, models) -> None:
    for name in ("a.parquet", "a.jsonl.gz", "a.json"):
        (tmp_path / name).write_text("[no such thing")
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            text([tmp_path / name]).tokens(models[0])
    (tmp_path / "a.jsonl").write_text("{}")
    for column in ("a+b+c", "a+", ""):
        with pytest.raises(UserError, match="prompt\\+response"):
            text([tmp_path / "a.jsonl"], (column,)).check()


def test_a_template_that_refuses_a_chat_is_quoted(tmp_path: Path, models) -> None:
    model = Model("strict", str(tmp_path / "strict"))
    tokenizer = AutoTokenizer.from_pretrained(models[0].folder)
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    tokenizer.save_pretrained(tmp_path / "strict")
    (tmp_path / "a.jsonl").write_text(json.dumps(CHATS[0]) + "\n")
    with pytest.raises(UserError, match="only one turn"):
        text([tmp_path / "a.jsonl"], ("messages",)).tokens(model)


# ---- the hub


def test_a_file_in_the_hubs_cache_is_read_without_network(tmp_path: Path, monkeypatch, models) -> None:
    """The cache laid out as huggingface_hub keeps it."""
    place = tmp_path / "datasets--owner--name"
    snapshot = place / "snapshots" / "abc" / "data"
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    (snapshot / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "local.jsonl").write_bytes((snapshot / "rows.jsonl").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = text(["hub:owner/name/data/rows.jsonl"], ("instruction+output",))
    cached.check()
    local = text([tmp_path / "local.jsonl"], ("instruction+output",))
    assert cached.absent == [] and cached.identity() == local.identity()
    assert cached.tokens(models[0]).tolist() == local.tokens(models[0]).tolist()
    assert text(["hub:owner/name/data/other.jsonl"]).absent == ["hub:owner/name/data/other.jsonl"]


def test_what_the_hub_cannot_give_is_one_message_that_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"rows.jsonl of the data set owner/name .* calibration.files="):
        text(["hub:owner/name/rows.jsonl"]).check()
    with pytest.raises(UserError, match="hub:owner/name/path"):
        text(["hub:owner/name"]).check()


@pytest.mark.parametrize("name", ["evol_codealpaca", "c4", "writing_prompts", "tulu_math", "agentic"])
def test_the_papers_texts_are_named_with_their_columns(name: str) -> None:
    (cell,) = expand([f"calibration={name}"]).cells
    made = cell.calibration
    assert made.name == name and all(file.startswith("hub:") for file in made.files)
    paper = {row["our_calibration"]: row["calibration"] for _, row in reference().iterrows()}[name]
    if name != "agentic":
        assert made.files[0].removeprefix("hub:").startswith(paper)
        assert made.sequences * made.length == 2**21, "2.1 M tokens"
    assert (ROOT / "conf" / "calibration" / f"{name}.yaml").exists()
