"""Bad input, however it comes: one message that names it, exit status 2, nothing printed and nothing written.

Every case gives a real command a real file, folder, plan, text, address or setting. The commands run in this process; a
few are run as a shell would, to see that this is the same.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness import analyse, checkpoint, foreground, report, run, share, usage
from harness.build import CONF
from harness.commandline import before_work, readable
from harness.data import Calibration
from harness.errors import UserError
from harness.hf import Transformers
from harness.models import ROOT, Model
from harness.overrides import parsed
from harness.plan import LayerPlan, Plan, from_json, read, to_json
from harness.serve import VLLM
from harness.sweep import _sweep as of_configs
from harness.sweep import expand
from tasks.local_rows import check_alike, rows
from tests.conftest import write_model

COMMANDS = {"run": run, "table": report, "export": share, "serve": foreground, "usage": usage, "analyse": analyse}
SECRET = "hunter2-is-no-password"  # in the environment, and never in a message
LONG = "x" * 10_000


@dataclass(frozen=True)
class Attempt:
    """What a command did. changed: paths below its folder that came, went or were written to."""

    status: int
    out: str
    err: str
    changed: list[str]


def attempt(command: str, arguments: list[str], folder: Path) -> Attempt:
    """Run a command in an empty folder of its own below ``folder``, with its store beside that, by a relative path: so
    that command lines are the same in every folder.
    """
    here = folder / "cwd"
    here.mkdir(exist_ok=True)
    if not any(argument.lstrip("+").startswith("store=") for argument in arguments):
        arguments = [*arguments, "store=../results"]
    out, err, before = io.StringIO(), io.StringIO(), _tree(folder)
    with (
        patch.object(sys, "argv", [command, *arguments]),
        patch.object(Model, "load", _too_late),
        patch.object(VLLM, "serve", _too_late),
        patch.object(Transformers, "serve", _too_late),
        contextlib.chdir(here),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = COMMANDS[command].main()
    after = _tree(folder)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return Attempt(status, out.getvalue(), err.getvalue(), changed)


def _too_late(*arguments: object, **named: object) -> None:
    raise AssertionError("it was not refused before the work began")


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and folder."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (0 if path.is_dir() else about.st_size, about.st_mtime_ns)
    return found


def check_refused(found: Attempt, words: list[str]) -> None:
    assert found.status == 2, f"status {found.status}: {found.err[-2000:]}"
    assert found.err.startswith("error: ") and found.err.count("\n") == 1, found.err[:3000]
    assert found.err.endswith("\n") and len(found.err) < 2200 and "Traceback" not in found.err, found.err[:3000]
    assert found.out == "" and found.changed == []
    assert [word for word in words if word not in found.err] == [], found.err
    assert SECRET not in found.err


# What the cases speak of.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of sound and damaged models, texts, plans and benchmarks, and servers that answer nonsense."""
    folder = tmp_path_factory.mktemp("w")
    make_models(folder / "models")
    make_texts(folder / "texts")
    make_plans(folder / "plans")
    make_tasks(folder / "tasks")
    (folder / "file").write_text("a file in the way")
    (folder / "full").mkdir()
    (folder / "full" / "something").write_text("here")
    yield folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a server whose answer to <path>/v1/models the path says."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), Nonsense)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


class Nonsense(BaseHTTPRequestHandler):
    ANSWERS = {
        "html": b"<html><body>It works!</body></html>",
        "list": b"[1, 2]",
        "null": b'{"data": null}',
        "strings": b'{"data": ["m"]}',
        "other": b'{"data": [{"id": "another"}]}',
        "empty": b'{"data": []}',
        "binary": bytes(range(128, 256)),
    }

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        self.send_response(500 if kind == "broken" else 200)
        self.end_headers()
        self.wfile.write(self.ANSWERS.get(kind, b""))

    def log_message(self, *arguments: object) -> None:
        """Not on the tests' standard error."""


def make_models(folder: Path) -> None:
    """A random Qwen3-MoE of 8 experts with the embedded model's tokenizer, and what can happen to such a folder."""
    sound = folder / "sound"
    write_model("qwen3_moe", sound)
    for file in (ROOT / "tasks" / "tiny" / "model").glob("tokenizer*"):
        shutil.copy(file, sound / file.name)
    for name, damage in DAMAGES.items():
        shutil.copytree(sound, folder / name)
        damage(folder / name)
    (folder / "empty").mkdir()
    write_model("glm4_moe", folder / "grouped")
    _config(n_group=4, topk_group=2)(folder / "grouped")
    for file in sound.glob("tokenizer*"):
        shutil.copy(file, folder / "grouped" / file.name)


def _config(**changes: Any) -> Callable[[Path], None]:
    """Change fields of config.json; None takes one away."""

    def damage(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of the weights, which stay as they are."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        written = json.dumps(header if changed is None else changed).encode()
        file.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])

    return damage


def _without_an_expert(header: dict[str, Any]) -> None:
    name = next(name for name in header if ".experts.7." in name)
    header[name.replace(".experts.7.", ".lost.7.")] = header.pop(name)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no_config": _remove("config.json"),
    "config_no_json": _write("config.json", b'{"num_experts": 8,'),
    "config_a_list": _write("config.json", b"[1, 2, 3]"),
    "config_binary": _write("config.json", bytes(range(128, 256))),
    "config_nested_deep": _write("config.json", b"[" * 200_000),
    "config_two_counts": _config(num_local_experts=6),
    "config_count_too_small": _config(num_experts=6, num_local_experts=6),
    "config_count_a_word": _config(num_experts="eight", num_local_experts="eight"),
    "config_no_top_k": _config(num_experts_per_tok=None),
    "config_top_k_a_list": _config(num_experts_per_tok=[2]),
    "config_too_few_layers": _config(num_hidden_layers=1),
    "dense_config": _config(num_experts=None, num_local_experts=None),
    "no_weights": _remove("model.safetensors"),
    "weights_cut": _cut,
    "weights_empty": _write("model.safetensors", b""),
    "weights_text": _write("model.safetensors", b"this is not a checkpoint, but it is long enough to have a header"),
    "weights_pickle": _only_pickle,
    "weights_claim_too_much": _write("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "weights_header_list": _header(lambda header: [1, 2]),
    "weights_without_an_expert": _header(_without_an_expert),
    "weights_shape_a_word": _header(lambda header: header["lm_head.weight"].update(shape="wide")),
    "index_no_json": _write("model.safetensors.index.json", b"{"),
    "index_promises_more": _write(
        "model.safetensors.index.json", b'{"weight_map": {"lm_head.bias": "no.safetensors"}}'
    ),
    "no_tokenizer": _remove("tokenizer.json", "tokenizer_config.json"),
    "tokenizer_no_json": _write("tokenizer.json", b"{"),
}

FACTS = [{"text": f"Fact {number} is that {number} and {number} are {2 * number}."} for number in range(400)]


def make_texts(folder: Path) -> None:
    folder.mkdir()
    whole = "".join(json.dumps(row) + "\n" for row in FACTS).encode()
    texts = {
        "sound.jsonl": whole,
        "empty.jsonl": b"",
        "blank.txt": b"\n\n  \n\n",
        "short.jsonl": whole[:200].rpartition(b"\n")[0],
        "latin1.jsonl": '{"text": "Zürich"}\n'.encode("latin-1"),
        "latin1.txt": "Zürich".encode("latin-1"),
        "binary.jsonl": bytes(range(256)) * 8,
        "binary.txt": bytes(range(256)) * 8,
        "binary.parquet": bytes(range(256)) * 8,
        "binary.jsonl.gz": bytes(range(256)) * 8,
        "cut.jsonl.gz": gzip.compress(whole)[:-40],
        "prose.jsonl": b"Once upon a time there was a file.\n",
        "other_field.jsonl": b'{"content": "a"}\n',
        "number.jsonl": b'{"text": 5}\n',
        "null.jsonl": b'{"text": null}\n',
        "list.jsonl": b'{"text": [1, 2]}\n',
        "row_a_list.jsonl": b"[1, 2]\n",
        "half_characters.jsonl": b'{"text": "\\ud800"}\n',
        "one_bad_line.jsonl": whole + b'{"text": \n',
        "deep.jsonl": b"[" * 200_000 + b"\n",
        "messages.jsonl": b'{"messages": [{"content": "who speaks?"}]}\n',
    }
    for name, content in texts.items():
        (folder / name).write_bytes(content)


def sound_plan() -> dict[str, Any]:
    """A plan of the embedded model, as JSON: half of the experts pruned, two of the last layer merged."""
    layers = {layer: LayerPlan.prune(range(16), 32) for layer in range(4)}
    layers[3] = LayerPlan.absorb({0: [0, 31], **{expert: [expert] for expert in range(1, 16)}}, [1.0] * 31 + [3.0])
    about = {"model": "tiny", "label": "REAP", "ratio": 0.5, "seed": 0, "seconds": 0.1}
    return dict(json.loads(to_json(Plan(layers, about))))


def make_plans(folder: Path) -> None:
    folder.mkdir()
    (folder / "sound.json").write_text(json.dumps(sound_plan()))
    for name, change in PLANS.items():
        plan = sound_plan()
        changed = change(plan)
        (folder / f"{name}.json").write_text(json.dumps(plan if changed is None else changed))
    (folder / "no_json.json").write_text('{"schema": 1, "layers"')
    (folder / "binary.json").write_bytes(bytes(range(256)))
    (folder / "empty.json").write_text("")
    (folder / "deep.json").write_text("[" * 200_000)
    another = json.dumps(sound_plan()["layers"]["3"])
    (folder / "twice.json").write_text(json.dumps(sound_plan()).replace('"layers": {', f'"layers": {{"0": {another}, '))
    with (folder / "huge.json").open("wb") as file:
        file.truncate(2**30)  # a hole: it takes no space
    os.mkfifo(folder / "pipe.json")


def _pruned(kept: int, experts: int) -> Any:
    return json.loads(to_json(Plan({layer: LayerPlan.prune(range(kept), experts) for layer in range(4)})))


def _in_layer(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda plan: change(plan["layers"]["2"]) and None


PLANS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a_list": lambda plan: [plan],
    "a_number": lambda plan: 7,
    "another_schema": lambda plan: plan.update(schema=2),
    "no_schema": lambda plan: plan.pop("schema") and None,
    "no_layers": lambda plan: plan.pop("layers") and None,
    "layers_a_list": lambda plan: plan.update(layers=[1, 2]),
    "no_provenance": lambda plan: plan.pop("provenance") and None,
    "provenance_a_word": lambda plan: plan.update(provenance="mine"),
    "ratio_a_word": lambda plan: plan["provenance"].update(ratio="half"),
    "layer_missing": lambda plan: plan["layers"].pop("1") and None,
    "layer_too_many": lambda plan: plan["layers"].update({"4": plan["layers"]["0"]}),
    "layer_a_word": lambda plan: plan["layers"].update({"first": plan["layers"].pop("0")}),
    "layer_spelt_otherwise": lambda plan: plan["layers"].update({"00": plan["layers"].pop("0")}),
    "layer_null": lambda plan: plan["layers"].update({"0": None}),
    "expert_out_of_range": _in_layer(lambda layer: layer["slots"][0].__setitem__(0, [32, 1.0])),
    "expert_negative": _in_layer(lambda layer: layer["slots"][0].__setitem__(0, [-1, 1.0])),
    "expert_a_fraction": _in_layer(lambda layer: layer["slots"][0].__setitem__(0, [0.5, 1.0])),
    "expert_a_word": _in_layer(lambda layer: layer["slots"][0].__setitem__(0, ["0", 1.0])),
    "weight_nan": _in_layer(lambda layer: layer["slots"][0].__setitem__(0, [0, float("nan")])),
    "weight_infinite": _in_layer(lambda layer: layer["slots"][0].__setitem__(0, [0, float("inf")])),
    "weight_a_word": _in_layer(lambda layer: layer["slots"][0].__setitem__(0, [0, "1.0"])),
    "weight_not_one": _in_layer(lambda layer: layer["slots"][0].__setitem__(0, [0, 0.5])),
    "weight_negative": _in_layer(lambda layer: layer["slots"].__setitem__(0, [[0, 2.0], [20, -1.0]])),
    "source_twice": _in_layer(lambda layer: layer["slots"].__setitem__(0, [[0, 0.5], [0, 0.5]])),
    "source_of_three": _in_layer(lambda layer: layer["slots"][0].__setitem__(0, [0, 1.0, 2.0])),
    "slot_empty": _in_layer(lambda layer: layer["slots"].__setitem__(0, [])),
    "slot_without_route": _in_layer(lambda layer: layer["routes"].__setitem__(0, None)),
    "route_to_nowhere": _in_layer(lambda layer: layer["routes"].__setitem__(0, 99)),
    "route_a_fraction": _in_layer(lambda layer: layer["routes"].__setitem__(1, 1.0)),
    "route_true": _in_layer(lambda layer: layer["routes"].__setitem__(1, True)),
    "routes_missing": _in_layer(lambda layer: layer.pop("routes")),
    "align_a_word": _in_layer(lambda layer: layer.update(align="yes")),
    "unknown_field": _in_layer(lambda layer: layer.update(masks=[1])),
    "another_model": lambda plan: _pruned(8, 16),
    "too_few_experts": lambda plan: _pruned(3, 32),
}

FACT_TASK = (ROOT / "tasks" / "tiny" / "tiny_facts.yaml").read_text()


def make_tasks(folder: Path) -> None:
    """Benchmarks with a damaged row among sound ones: code in EvalPlus's schema, questions for lm-eval."""
    folder.mkdir()
    data = ROOT / "tasks" / "tiny" / "data"
    for kind, file in (("code", "tiny_code.jsonl"), ("facts", "tiny_facts.jsonl")):
        sound = (data / file).read_text().splitlines()[:3]
        for name, change in ROWS[kind].items():
            damaged = change(json.loads(sound[1]))
            line = damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode()
            content = b"\n".join([sound[0].encode(), line, sound[2].encode()])
            (folder / f"{kind}_{name}.jsonl").write_bytes(b"" if name == "nothing" else content)
            if kind == "facts":
                (folder / f"facts_{name}.yaml").write_text(FACT_TASK.replace("data/tiny_facts", f"facts_{name}"))
    (folder / "facts_lost.yaml").write_text(FACT_TASK)
    (folder / "no_yaml.yaml").write_text("task: [")
    (folder / "no_task.yaml").write_text("a: 1")


def _without(field: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {name: value for name, value in row.items() if name != field}


def _with(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {**row, **fields}


ROWS: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "code": {
        "no_json": lambda row: b'{"task_id": ',
        "binary": lambda row: bytes(range(128, 256)),
        "a_list": lambda row: [1, 2],
        "a_number": lambda row: 5,
        "without_prompt": _without("prompt"),
        "id_twice": lambda row: {
            **row,
            "task_id": json.loads((ROOT / "tasks/tiny/data/tiny_code.jsonl").open().readline())["task_id"],
        },
        "prompt_a_number": _with(prompt=5),
        "inputs_a_word": _with(base_input="none"),
        "atol_a_word": _with(atol="small"),
        "nothing": lambda row: row,
    },
    "facts": {
        "no_json": lambda row: b'{"question": ',
        "binary": lambda row: bytes(range(128, 256)),
        "a_list": lambda row: [1, 2],
        "without_question": _without("question"),
        "without_gold": _without("gold"),
        "question_a_number": _with(question=5),
        "choices_null": _with(choices=None),
        "nothing": lambda row: row,
    },
}


# The cases: what is asked of which command, and words that the message must hold.

Case = tuple[str, list[str], list[str]]
QUICK = ["suite=tiny_facts"]  # no sandbox to look for
TINY_TEXT = ["calibration.sequences=4", "calibration.length=32", "calibration.held_out=1"]


def settings_cases() -> dict[str, Case]:
    """Names, values and types of single settings."""
    of_run = {
        "ratio of no number": (["ratio=nan"], ["ratio=nan"]),
        "ratio without end": (["ratio=inf"], ["ratio=inf"]),
        "ratio beyond floating point": (["ratio=1e999"], ["ratio=inf"]),
        "ratio of 400 digits": ([f"ratio={'9' * 400}"], ["ratio=999", "characters"]),
        "ratio of 5000 digits": ([f"ratio={'9' * 5000}"], ["ratio=999"]),
        "ratio yes": (["ratio=true"], ["ratio=True", "number"]),
        "ratio in a list": (["ratio=[0.5]"], ["[0.5]", "number"]),
        "ratio in a mapping": (["ratio={a:1}"], ["'a': 1", "number"]),
        "ratio of nothing": (["ratio="], ["ratio="]),
        "ratio null": (["ratio=null"], ["ratio=None"]),
        "ratio missing": (["ratio=???"], ["ratio"]),
        "ratio in other digits": (["ratio='٠٫٥'"], ["ratio=٠٫٥", "number"]),
        "ratio just below one": (["ratio=0.9999999"], ["Largest usable ratio"]),
        "seed of one half": (["seed=0.5"], ["seed=0.5"]),
        "seed beyond 32 bits": (["seed=4294967296"], ["seed=4294967296", "4294967295"]),
        "seed beyond 64 bits": (["seed=99999999999999999999"], ["seed=99999999999999999999"]),
        "seed yes": (["seed=true"], ["seed=True"]),
        "seed null": (["seed=null"], ["seed=None"]),
        "seed of a method": (["method=random", "method.seed=-1"], ["method.seed=-1"]),
        "seed of a text": (["calibration.seed=-3"], ["calibration.seed=-3"]),
        "seed of a recovery": (["recovery=router", "recovery.seed=-1"], ["recovery.seed=-1"]),
        "no problems": (["limit=0"], ["limit=0"]),
        "fewer than no problems": (["limit=-3"], ["limit=-3"]),
        "problems yes": (["limit=true"], ["limit=True"]),
        "problems without end": (["limit=inf"], ["limit=inf"]),
        "model null": (["model=null"], ["model=null", "tiny"]),
        "method null": (["method=null"], ["method=null", "reap"]),
        "suite null": (["suite=null"], ["suite=null", "conf/suite/"]),
        "serve null": (["serve=null"], ["serve=null", "vllm"]),
        "calibration null": (["calibration=null"], ["calibration=null", "tiny"]),
        "allocation null": (["allocation=null"], ["allocation=null", "uniform"]),
        "recovery null in a grid": (["recovery=null,router"], ["recovery=null,router", "leave"]),
        "unknown calibration": (["calibration=wikipedia"], ["wikipedia", "tiny_code"]),
        "unknown serve": (["serve=tgi"], ["tgi", "vllm"]),
        "unknown recovery": (["recovery=rest"], ["rest", "router"]),
        "unknown allocation": (["allocation=greedy"], ["greedy", "evoesap"]),
        "unknown system": (["system=best"], ["best", "hodgecover"]),
        "unknown sweep": (["sweep=everything"], ["everything", "demo"]),
        "unknown experiment": (["experiment=table9"], ["table9", "reap_table2"]),
        "unknown protection": (["protect=all"], ["all", "super_experts"]),
        "an option above its group": (["method=../model/tiny"], ["../model/tiny"]),
        "an added setting": (["+ration=0.5"], ["ration", "ratio"]),
        "an added group": (["+domains.tiny=1"], ["domains"]),
        "an added suite setting": (["+suite.limit=3"], ["limit", "tasks"]),
        "tasks that are a number": (["suite.tasks=5"], ["5", "tasks"]),
        "tasks that are words": (["suite.tasks=[tiny_sums]"], ["tiny_sums"]),
        "a task without a class": (["suite.tasks=[{name:a}]"], ["'name': 'a'"]),
        "names that are numbers": (["collect=[1]"], ["[1]", "collect"]),
        "names that are no list": (["collect=logit_gram"], ["logit_gram", "list"]),
        "names null": (["collect=null"], ["collect=None"]),
        "absent that is a word": (["absent=much"], ["absent=much"]),
        "dry run perhaps": (["dry_run=perhaps"], ["perhaps", "true"]),
        "dry run of one": (["dry_run=1"], ["dry_run=1"]),
        "routing in a list": (["routing=[actual]"], ["actual"]),
        "files that are a word": (["calibration.files=a.jsonl"], ["a.jsonl", "tuple"]),
        "files that are numbers": (["calibration.files=[1,2]"], ["1, 2"]),
        "columns of three": (["+calibration.columns=[a+b+c]"], ["a+b+c"]),
        "columns of nothing": (["+calibration.columns=[]"], ["columns"]),
        "sequences of one token": (["calibration.length=1"], ["1 tokens"]),
        "batches of none": (["calibration.batch_size=0"], ["batches of 0"]),
        "sequences of half": (["calibration.sequences=2.5"], ["2.5"]),
        "a quintillion of sequences": (["calibration.sequences=1000000000000000000"], ["1000000000000000000"]),
        "more sequences than 64 bits": (["calibration.sequences=99999999999999999999"], ["99999999999999999999"]),
        "a hub file without a path": (["calibration.files=[hub:owner/name]"], ["hub:owner/name"]),
        "a model without a name": (["model.name=''"], ["model.name"]),
        "a model named by a list": (["model.name=[a]"], ["a"]),
        "a name of 10,000 letters": ([f"model.name={LONG}"], ["xxxx", "model.name", "10,0"]),
        "a name of 300 wide letters": ([f"model.name='{'語' * 100}'"], ["語", "bytes"]),
        "a method of 10,000 letters": ([f"method={LONG}"], ["xxxx", "10,0"]),
        "a setting of 10,000 letters": ([f"{LONG}=1"], ["xxxx", "10,0"]),
        "a label of a list": (["method.label=[a,b]"], ["label"]),
        "an unknown how": (["serve.how=magic"], ["magic", "swap"]),
        "no time to start": (["serve.startup_timeout_s=0"], ["startup_timeout_s=0"]),
        "a negative cache": (["serve.kv_cache_gib=-4"], ["kv_cache_gib=-4"]),
        "a length of none": (["serve.max_model_len=0"], ["max_model_len=0"]),
        "no requests at once": (["serve.max_num_seqs=-1"], ["max_num_seqs=-1"]),
        "more than a whole GPU": (["serve.gpu_memory_utilization=1.5"], ["1.5", "share"]),
        "arguments that are numbers": (["serve.extra_args=[1]"], ["extra_args"]),
        "arguments that the harness sets": (["serve.extra_args=['--port=1']"], ["--port=1"]),
        "batches of no requests": (["serve=hf", "serve.batch=0"], ["batch=0"]),
        "an unknown data folder": (["suite=mc", "data_dir=./no-data"], ["no-data"]),
        "a learning rate of no number": (["recovery=all", "recovery.learning_rate=nan"], ["learning_rate=nan"]),
        "a penalty without end": (
            ["method=barrier_merge", "method.penalty=inf"],
            ["method.penalty=inf"],
        ),
        "shares that are words": (["recovery=elastic_width", "recovery.shares=[a,b,c]"], ["shares"]),
        "half a step": (["method=rco", "method.steps=1.5"], ["1.5"]),
        "no steps": (["method=rco", "method.steps=0"], ["steps=0"]),
        "a temperature that rises": (["method=rco", "method.tau_end=2"], ["tau_end=2"]),
        "more elites than plans": (["allocation=evoesap", "allocation.elites=99"], ["elites=99"]),
        "no generations": (["allocation=evoesap", "allocation.generations=0"], ["generations=0"]),
    }
    return {
        name: ("run", [*QUICK, *asked] if "suite=mc" not in asked else asked, words)
        for name, (asked, words) in of_run.items()
    }


def syntax_cases() -> dict[str, Case]:
    """The command line itself: refused before a config is composed of it."""
    of_run = {
        "half a list": (["ratio=[0.5"], ["ratio=[0.5"]),
        "half a quotation": (["ratio='0.5"], ["ratio='0.5"]),
        "no name": (["=0.5"], ["=0.5"]),
        "two equals signs": (["ratio=0.5=0.25"], ["ratio=0.5=0.25"]),
        "a comma alone": (["ratio=,"], ["ratio=,"]),
        "a trailing comma": (["ratio=0.25,"], ["ratio=0.25,"]),
        "an empty choice": (["ratio=choice()"], ["choice()"]),
        "an empty range": (["seed=range(0,0)"], ["range(0,0)", "no value"]),
        "a range without steps": (["seed=range(0,3,0)"], ["range(0,3,0)"]),
        "an interval": (["ratio=interval(0,1)"], ["interval(0,1)"]),
        "a pattern": (["method=glob(*)"], ["glob(*)"]),
        "a shuffled range": (["seed=shuffle(range(0,1000000000))"], ["shuffle"]),
        "a range of a billion": (["seed=range(0,1000000000)"], ["10,000"]),
        "a range without an end": (["seed=range(0,inf)"], ["range(0,inf)"]),
        "a grid of a million": (["seed=range(0,1000)", "ratio=range(0,0.9,0.0009)"], ["1,000 x 1,001"]),
        "an unknown function": (["ratio=half(1)"], ["half"]),
        "help": (["--help"], ["--help"]),
        "a short flag": (["-x"], ["-x"]),
        "Hydra's flag": (["--cfg=job"], ["--cfg=job"]),
        "a setting taken away": (["~ratio"], ["~ratio", "Leave it out"]),
        "a group taken away": (["~method"], ["~method", "Leave it out"]),
        "a value taken away": (["~seed=0"], ["~seed=0"]),
        "Hydra's folder": (["hydra.run.dir=elsewhere"], ["hydra.run.dir=elsewhere", "store="]),
        "Hydra's sweeper": (["hydra/sweeper=basic"], ["hydra/sweeper=basic"]),
        "Hydra's parameters": (["hydra.sweeper.params={ratio:1}"], ["hydra.sweeper.params"]),
        "Hydra's search path": (["hydra.searchpath=[/tmp]"], ["hydra.searchpath"]),
        "a line break": (["model.name='a\nb'"], ["a\\nb"]),
        "a terminal's escape": (["model.name='\x1b[2Ja'"], ["\\x1b[2Ja"]),
        "a line break in the store": (["store='a\nb'"], ["a\\nb"]),
        "text turned round": (["model.name='a\u202eb'"], ["\\u202e"]),
        "a secret as the ratio": (["ratio=${oc.env:BENCH_SECRET}"], ["${oc.env:BENCH_SECRET}"]),
        "a secret as a name": (["model.name=${oc.env:BENCH_SECRET}"], ["${oc.env:BENCH_SECRET}"]),
        "a secret as an option": (["method=${oc.env:BENCH_SECRET}"], ["${oc.env:BENCH_SECRET}"]),
        "a secret in a path": (["model.path=/${oc.env:BENCH_SECRET}/x"], ["oc.env"]),
        "a secret behind a name": (["+a=oc.env", "model.name=${${a}:BENCH_SECRET}"], ["${${a}:BENCH_SECRET}"]),
        "a secret in a mapping": (["+method.label={a:'${oc.env:BENCH_SECRET}'}"], ["oc.env"]),
        "a secret decoded": (["model.name=${oc.decode:${oc.env:BENCH_SECRET}}"], ["oc.decode"]),
    }
    return {name: ("run", [*QUICK, *asked], words) for name, (asked, words) in of_run.items()}


def target_cases() -> dict[str, Case]:
    """Grids of nonsense, settings that do not resolve, and classes that are not what they are put for."""
    of_run = {
        "an empty sweep of lists": (["ratio=[],[]"], ["[]"]),
        "one bad method in a grid": (["method=reap,none,reep"], ["reep"]),
        "two stores": (["ratio=0.25,0.5", "store=a,b"], ["store=a"]),
        "a setting added twice": (["+ratio=0.5"], ["ratio"]),
        "an unknown launcher": (["hydra/launcher=nonsense"], ["nonsense"]),
        "a reference to itself": (["ratio=${ratio}"], ["ratio"]),
        "a reference to nothing in the store": (["store=${nothing}"], ["nothing"]),
        "a class of the system": (["method._target_=os.system"], ["os.system", "methods"]),
        "a process": (["method._target_=subprocess.Popen"], ["subprocess.Popen"]),
        "a module of the folder": (["method._target_=evil.Method"], ["evil.Method"]),
        "a function of the project": (["method._target_=methods.highest"], ["methods.highest"]),
        "a class that is no dataclass": (["method._target_=methods.LayerMethod"], ["methods.LayerMethod"]),
        "a model as a method": (
            ["method={_target_:harness.models.Model,name:a,path:b}"],
            ["method"],
        ),
        "a method as a task": (["suite.tasks=[{_target_:methods.reap.REAP}]"], ["methods.reap.REAP", "suite"]),
        "a method as a server": (["serve._target_=methods.reap.REAP"], ["REAP"]),
        "a class within a class": (
            ["method=partial_preserve", "method.importance._target_=os.system"],
            ["os.system"],
        ),
    }
    return {name: ("run", [*QUICK, *asked], words) for name, (asked, words) in of_run.items()}


def combination_cases() -> dict[str, Case]:
    """Settings that are sound each by itself: refused before any work, where they were once refused after hours."""
    of_run = {
        "copies that would be trained apart": (["method=hc_smoe", "recovery=all"], ["copied", "recovery=router"]),
        "copies that adapters would change": (["method=m_smoe", "recovery=lora"], ["copied", "parameters=lora"]),
        "merged experts that are searched over": (["method=hc_smoe", "allocation=evoesap"], ["HCSMoE merges"]),
        "groups that are searched over": (["method=m_smoe", "allocation=rco_counts"], ["MSMoE merges"]),
        "absorbed experts that are searched over": (
            ["method=partial_preserve", "allocation=evoesap"],
            ["PartialPreserve merges"],
        ),
        "an order that merges": (
            [
                "method=reap",
                "allocation=evoesap",
                "allocation.order={_target_:methods.m_smoe.MSMoE,align:null,reference_compat:false}",
            ],
            ["order"],
        ),
        "no score to rank by": (["method=hc_smoe", "allocation=global_score"], ["HCSMoE gives no score"]),
        "chance to rank by": (["method=random", "allocation=global_score"], ["Random gives no score"]),
        "protected scores to rank by": (
            ["method=reap", "protect=super_experts", "allocation=global_score"],
            ["gives no score"],
        ),
        "a search on more than the text": (
            ["method=reap", "allocation=evoesap", "calibration.sequences=8"],
            ["allocation.sequences=16", "has 8"],
        ),
        "a descent on more than the text": (
            ["method=rco", "method.sequences=500"],
            ["method.sequences=500", "has 128"],
        ),
        "counts on more than the text": (
            ["allocation=rco_counts", "allocation.sequences=129"],
            ["allocation.sequences=129", "has 128"],
        ),
        "own counts in a stock checkpoint": (["allocation=evoesap", "serve=checkpoint"], ["one for all", "serve=plan"]),
        "a total in a stock checkpoint": (["method=rco", "serve=checkpoint"], ["one for all", "RCO"]),
        "own counts among groups of experts": (
            [
                "serve=hf",
                "model.path={world}/models/grouped",
                "allocation=global_score",
                "ratio=0",
                "calibration.length=64",
            ],
            ["n_group"],
        ),
        "groups that the ratio breaks": (
            ["serve=hf", "model.path={world}/models/grouped", "ratio=0.25", "calibration.length=64"],
            ["groups"],
        ),
        "recovery of nothing cut": (["method=none", "+recovery.drop_layers=1"], ["drop_layers"]),
        "all blocks dropped": (["recovery=all", "recovery.drop_layers=4"], ["drop_layers=4", "4 blocks"]),
        "a recovery text that is missing": (["recovery=all", "recovery.text.files=[gone.jsonl]"], ["gone.jsonl"]),
        "a recovery text that is short": (
            ["recovery=all", "recovery.text.files=[{world}/texts/short.jsonl]"],
            ["Largest usable number"],
        ),
        "a dense model compressed": (["serve=hf", "model.path={world}/models/dense_config"], ["dense", "method=none"]),
        "mask with compilation": (["serve=mask", "serve.enforce_eager=false"], ["enforce_eager"]),
        "a server and a method": (
            ["serve=server", "serve.url=http://127.0.0.1:9", "serve.model=m", "method=hc_smoe"],
            ["127.0.0.1:9", "method=none"],
        ),
        "an order for elastic experts": (["recovery=elastic_experts", "method=m_smoe"], ["no one order"]),
    }
    return {name: ("run", [*QUICK, *asked], words) for name, (asked, words) in of_run.items()}


def file_cases() -> dict[str, Case]:
    """Folders and files: models, texts, benchmarks, the store."""
    cases: dict[str, Case] = {
        f"model: {name}": (
            "run",
            [*QUICK, *TINY_TEXT, "serve=hf", "model.path={world}/models/" + name, f"model.name={name}"],
            [name],
        )
        for name in [*DAMAGES, "empty", "gone"]
    }
    texts = [
        *("empty.jsonl", "blank.txt", "short.jsonl", "latin1.jsonl", "latin1.txt", "binary.jsonl", "binary.txt"),
        *("binary.parquet", "binary.jsonl.gz", "cut.jsonl.gz", "prose.jsonl", "other_field.jsonl", "number.jsonl"),
        *("null.jsonl", "list.jsonl", "row_a_list.jsonl", "half_characters.jsonl", "one_bad_line.jsonl", "deep.jsonl"),
        *("gone.jsonl", ""),
    ]
    short = {"empty.jsonl": "hold 0", "blank.txt": "hold 0", "short.jsonl": "Largest usable"}
    cases |= {
        f"text: {name or 'a folder'}": (
            "run",
            [*QUICK, "calibration.files=[{world}/texts/" + name + "]"],
            [short.get(name, name or "texts")],
        )
        for name in texts
    }
    cases["text: a message without a speaker"] = (
        "run",
        [*QUICK, "calibration.files=[{world}/texts/messages.jsonl]", "+calibration.columns=[messages]"],
        ["messages.jsonl, line 1"],
    )
    cases |= {
        f"code: {name}": (
            "run",
            ["suite=tiny_code", "suite.tasks.0.problems={world}/tasks/code_" + name + ".jsonl"],
            [f"code_{name}.jsonl"],
        )
        for name in [*ROWS["code"], "gone"]
    }
    cases |= {
        f"task: {name}": (
            "run",
            [*QUICK, "suite.tasks.0.task_file={world}/tasks/" + name + ".yaml"],
            [name if not name.startswith("facts_lost") else "tiny_facts.jsonl"],
        )
        for name in [*(f"facts_{name}" for name in ROWS["facts"]), "facts_lost", "no_yaml", "no_task", "gone"]
    }
    places = {
        "a file in the way": ("{world}/file", "file"),
        "a file above": ("{world}/file/results", "file"),
        "a device": ("/dev/null", "/dev/null"),
        "no name": ("", "store="),
        "blanks": ("'  '", "store="),
        "null": ("null", "store=None"),
        "a number": ("5", "store=5"),
        "a list": ("[a]", "store="),
        "missing": ("???", "store"),
        "a name of 10,000 letters": (LONG, "store=xxx"),
        "a path too long": ("/".join(["a" * 200] * 30), "store=aaa"),
    }
    cases |= {f"store: {name}": ("run", [*QUICK, f"store={path}"], [word]) for name, (path, word) in places.items()}
    cases["model: a path of 10,000 letters"] = ("run", [*QUICK, f"model.path={LONG}"], ["xxxx"])
    cases["model: a name too long for the system"] = ("run", [*QUICK, f"model.path=/{'y' * 300}"], ["yyyy"])
    cases["text: a name too long for the system"] = ("run", [*QUICK, f"calibration.files=[{'z' * 300}]"], ["zzzz"])
    return cases


def plan_cases() -> dict[str, Case]:
    """Plans in files, and where an export goes."""
    bad = [*PLANS, "no_json", "binary", "empty", "deep", "twice", "huge", "pipe", "gone"]
    cases: dict[str, Case] = {
        f"plan: {name}": ("export", ["plan={world}/plans/" + name + ".json", "to=new"], [f"plans/{name}.json"])
        for name in bad
    }
    sound = "plan={world}/plans/sound.json"
    cases |= {
        "plan: a folder": ("export", ["plan={world}/plans", "to=new"], ["plans"]),
        "plan: a device": ("serve", ["plan=/dev/zero"], ["/dev/zero"]),
        "plan: nothing": ("serve", ["plan="], ["plan="]),
        "plan served: not JSON": ("serve", ["plan={world}/plans/no_json.json"], ["no_json.json"]),
        "plan served: another model's": (
            "serve",
            [sound, "serve=hf", "model.path={world}/models/sound"],
            ["another model"],
        ),
        "plan served: from a checkpoint": ("serve", [sound, "serve=checkpoint"], ["serve=plan"]),
        "plan served: with its method": ("serve", [sound, "method=ean"], ["taken as it is", "method"]),
        "plan served: with a method's option": ("serve", [sound, "+method.alpha=1"], ["taken as it is", "method"]),
        "plan served: at a ratio": ("serve", [sound, "ratio=0.25"], ["taken as it is", "ratio"]),
        "plan served: with recovery": ("serve", [sound, "recovery=router"], ["Leave recovery out"]),
        "plan served: too large a cache": ("serve", [sound, "serve.kv_cache_gib=100000"], ["100000", "are free"]),
        "plan served: a grid": ("serve", ["method=reap,ean"], ["2 cells"]),
        "plan served: a bill": ("serve", ["method=reap", "dry_run=true"], ["dry_run"]),
        "export: nowhere": ("export", ["method=reap"], ["to=<folder>"]),
        "export: to nothing": ("export", ["method=reap", "to="], ["to=<folder>"]),
        "export: to a full folder": ("export", [sound, "to={world}/full"], ["full", "not empty"]),
        "export: to a file": ("export", [sound, "to={world}/file"], ["file"]),
        "export: below a file": ("export", [sound, "to={world}/file/new"], ["file"]),
        "export: to a name too long": ("export", [sound, f"to={LONG}"], ["xxxx"]),
        "export: to no repository": ("export", [sound, "to=new", "push=a/b/c"], ["push=a/b/c", "owner/name"]),
        "export: to a nameless repository": ("export", [sound, "to=new", "push="], ["push=", "owner/name"]),
        "export: to an odd repository": ("export", [sound, "to=new", "push=me/--x--"], ["push=me/--x--"]),
        "export: a grid": ("export", ["ratio=0.25,0.5", "to=new"], ["2 cells"]),
        "export: own counts": ("export", ["allocation=evoesap", "to=new"], ["one for all"]),
        "export: a short text": (
            "export",
            ["method=reap", "to=new", "calibration.files=[{world}/texts/short.jsonl]"],
            ["Largest usable number"],
        ),
        "export: a missing model": ("export", ["method=reap", "to=new", "model.path=./gone"], ["gone"]),
        "export: a bill": ("export", ["method=reap", "to=new", "dry_run=true"], ["dry_run"]),
        "usage: one text": ("usage", ["calibration=tiny_code"], ["several calibration sets"]),
        "usage: two models": ("usage", ["calibration=tiny,tiny_code", "model.name=a,b"], ["one model"]),
        "usage: a dense model": (
            "usage",
            ["calibration=tiny,tiny_code", "model.path={world}/models/dense_config"],
            ["dense"],
        ),
        "usage: a short text": ("usage", ["calibration=tiny,tiny_code", "calibration.sequences=900000"], ["900000"]),
        "usage: a missing text": (
            "usage",
            ["calibration=tiny,tiny_code", "calibration.files=[gone.txt]"],
            ["gone.txt"],
        ),
        "usage: a bill": ("usage", ["calibration=tiny,tiny_code", "dry_run=true"], ["dry_run"]),
        "usage: a flag": ("usage", ["--all"], ["--all"]),
        "analyse: no texts": ("analyse", ["method=reap", "n=0"], ["n=0"]),
        "analyse: fewer than no texts": ("analyse", ["method=reap", "n=-1"], ["n=-1"]),
        "analyse: a word of texts": ("analyse", ["method=reap", "n=many"], ["n=many"]),
        "analyse: a square of texts": ("analyse", ["method=reap", "n=²"], ["n=²"]),
        "analyse: texts without end": ("analyse", ["method=reap", f"n={'9' * 5000}"], ["n=999"]),
        "analyse: nothing compressed": ("analyse", ["method=none"], ["compresses nothing"]),
        "analyse: nothing held out": ("analyse", ["method=reap", "calibration.held_out=0"], ["held_out=0"]),
        "analyse: nothing run": ("analyse", ["method=reap"], ["plans"]),
        "table: versus nothing": ("table", ["--vs"], ["--vs reference"]),
        "table: versus something": ("table", ["--vs", "paper", "method=reap"], ["--vs reference"]),
        "table: a flag": ("table", ["--all"], ["--all"]),
        "table: an unknown sweep": ("table", ["sweep=all"], ["all", "demo"]),
        "table: a missing model": ("table", ["model.path=./gone"], ["gone"]),
        "table: a missing text": ("table", ["calibration.files=[gone.txt]"], ["gone.txt"]),
    }
    return cases


def address_cases() -> dict[str, Case]:
    """Servers that are none, or not the one that is meant."""
    addresses = {
        "a word": ("somewhere", "somewhere"),
        "nothing": ("''", "serve.url="),
        "no host": ("http://", "http://"),
        "a file": ("file:///etc/passwd", "file:///etc/passwd"),
        "another scheme": ("ftp://127.0.0.1", "ftp://127.0.0.1"),
        "a port beyond all": ("'http://127.0.0.1:99999'", "99999"),
        "a port of letters": ("'http://127.0.0.1:http'", "127.0.0.1:http"),
        "half an address": ("'http://[::1'", "http://[::1"),
        "a number": ("8000", "8000"),
        "a host that is not": ("http://no-such-host.invalid", "no-such-host.invalid"),
        "a closed port": ("{closed}", "127.0.0.1"),
        "a page": ("{server}/html", "/html"),
        "a list": ("{server}/list", "/list"),
        "no models": ("{server}/empty", "nothing"),
        "null models": ("{server}/null", "/null"),
        "models that are words": ("{server}/strings", "/strings"),
        "another model": ("{server}/other", "another"),
        "bytes": ("{server}/binary", "/binary"),
        "an error": ("{server}/broken", "/broken"),
    }
    cases: dict[str, Case] = {
        f"address: {name}": (
            "run",
            [*QUICK, "serve=server", f"serve.url={url}", "serve.model=m", "method=none"],
            [word],
        )
        for name, (url, word) in addresses.items()
    }
    password = f"serve.url='http://me:{SECRET}@127.0.0.1:9'"
    cases["address: with a password"] = (
        "run",
        [*QUICK, "serve=server", password, "serve.model=m", "method=none"],
        ["127.0.0.1", "password"],
    )
    return cases


SYNTAX = syntax_cases()
CASES = {
    **SYNTAX,
    **settings_cases(),
    **target_cases(),
    **combination_cases(),
    **file_cases(),
    **plan_cases(),
    **address_cases(),
}


def marked() -> Iterator[Any]:
    """Composing a config takes a fifth of a second: of the cases that need one of their own, every sixth runs by
    default and the others with -m slow. Command lines that are none, and damaged plans, all run.
    """
    others = 0
    for name in CASES:
        cheap = name in SYNTAX or name.startswith("plan: ")
        others += not cheap
        yield pytest.param(name, marks=() if cheap or others % 6 == 1 else pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra makes the same config of the same command line; here it is asked once for each."""
    compose_config, known = Hydra.compose_config, {}

    def once(self: Hydra, config_name: str, overrides: list[str], *rest: object, **more: object) -> DictConfig:
        asked = json.dumps([config_name, overrides, str(rest), str(more)])
        if asked not in known:
            known[asked] = compose_config(self, config_name, overrides, *rest, **more)
        return copy.deepcopy(known[asked])

    with patch.object(Hydra, "compose_config", once):
        yield


@pytest.mark.parametrize("case", marked())
def test_bad_input_is_one_message_and_status_2(
    case: str, world: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_SECRET", SECRET)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command, arguments, words = CASES[case]
    before = _tree(world)
    places = {"{world}": str(world), "{server}": server, "{closed}": f"http://127.0.0.1:{closed_port()}"}
    found = attempt(command, [filled(argument, places) for argument in arguments], tmp_path)
    check_refused(found, words)
    assert _tree(world) == before


def filled(argument: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        argument = argument.replace(name, value)
    return argument


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_there_are_hundreds_of_cases_no_two_ask_the_same_and_a_hundred_run_by_default() -> None:
    asked = [(command, tuple(arguments)) for command, arguments, _ in CASES.values()]
    assert len(set(asked)) == len(asked) >= 300
    assert sum(not param.marks for param in marked()) >= 100


def test_sound_input_is_not_refused(world: Path, tmp_path: Path) -> None:
    """The same driver can tell: what the damaged files were made of gets as far as the work."""
    for arguments in (
        ["calibration.files=[{world}/texts/sound.jsonl]", *TINY_TEXT],
        ["model.path={world}/models/sound", "serve=hf", *TINY_TEXT],
        ["serve=server", "serve.url=http://127.0.0.1:9", "serve.model=m", "method=none", "dry_run=true"],
    ):
        filled_in = [filled(argument, {"{world}": str(world)}) for argument in arguments]
        expand([*QUICK, *filled_in]).check()
    with pytest.raises(AssertionError, match="before the work began"):
        attempt("serve", [f"plan={world}/plans/sound.json", "serve=hf"], tmp_path)
    assert from_json((world / "plans" / "sound.json").read_text()).provenance["label"] == "REAP"


IN_A_SHELL = {
    "a ratio": ("harness.run", ["ratio=1.5"], "ratio=1.5"),
    "a secret": ("harness.run", ["model.name=${oc.env:BENCH_SECRET}"], "oc.env"),
    "a plan": ("harness.share", ["plan=no-plan.json", "to=new"], "no-plan.json"),
    "a plan to serve": ("harness.foreground", ["plan=no-plan.json"], "no-plan.json"),
    "a text": ("harness.run", ["suite=tiny_facts", "calibration.files=[README.md]"], "README.md, line 1"),
    "too little text": ("harness.run", ["suite=tiny_facts", "calibration.sequences=90000"], "90000"),
    "a model": ("harness.run", ["model.path=conf"], "conf"),
    "a closed port": (
        "harness.run",
        ["serve=server", "serve.url=http://127.0.0.1:9", "serve.model=m", "method=none", "suite=tiny_facts"],
        "127.0.0.1:9",
    ),
    "a module of the folder": ("harness.run", ["method._target_=evil.Method"], "evil.Method"),
    "one text": ("harness.usage", ["calibration=tiny"], "several"),
    "no plans": ("harness.analyse", ["method=reap"], "plans"),
    "an unknown sweep": ("harness.report", ["sweep=all"], "demo"),
}


@pytest.mark.slow  # each starts an interpreter; tests/test_config.py has one that always runs
@pytest.mark.parametrize("case", IN_A_SHELL)
def test_a_shell_sees_the_same(case: str, tmp_path: Path) -> None:
    module, arguments, word = IN_A_SHELL[case]
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (tmp_path / "README.md").write_text("# A file of another kind\n")
    before = _tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, "store=results"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "BENCH_SECRET": SECRET, "HF_HUB_OFFLINE": "1"},
    )
    after = {name: about for name, about in _tree(tmp_path).items() if "__pycache__" not in name}
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    check_refused(Attempt(done.returncode, done.stdout, done.stderr, changed), [word])


# Whatever is typed, and whatever is done to a file: it is taken as what it says, or refused with the one exception.

ANYTHING = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
FEW = settings(ANYTHING, max_examples=25)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=8), parts, max_size=3),
    max_leaves=4,
)
TYPED = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"[-+]?[0-9._e]{1,25}", fullmatch=True),
    st.integers().map(str),
    st.floats().map(str),
    JSON.map(json.dumps),
    st.sampled_from(["null", "true", "[]", "{}", "???", "''", "nan", "${seed}", "${oc.env:BENCH_SECRET}", LONG]),
)
SETTINGS = (
    *("ratio", "seed", "limit", "routing", "store", "dry_run", "collect", "keep_checkpoints", "absent", "data_dir"),
    *(
        "calibration.sequences",
        "calibration.files",
        "calibration.seed",
        "calibration.dtype",
        "model.name",
        "model.path",
    ),
    *("serve.max_model_len", "serve.extra_args", "serve.dtype", "suite.tasks", "method.label", "method._target_"),
)


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=QUICK)


@settings(ANYTHING, max_examples=80)
@given(name=st.sampled_from(SETTINGS), text=TYPED)
def test_any_text_as_a_setting_is_taken_or_refused(name: str, text: str, composed: DictConfig) -> None:
    with patch.dict(os.environ, {"BENCH_SECRET": SECRET}), patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        try:
            (override,) = parsed([f"{name}={text}"])
            if override.is_sweep_override():
                return
            config = copy.deepcopy(composed)
            OmegaConf.update(config, name, override.value(), merge=True)
            sweep = of_configs("run", [config])
            if name != "store":
                with before_work():
                    sweep.check()
        except (UserError, OmegaConfBaseException) as error:  # `expand` makes UserErrors of OmegaConf's
            assert SECRET not in str(error)


@settings(ANYTHING, max_examples=100)
@given(text=st.text(max_size=60) | TYPED)
def test_any_argument_is_read_or_refused(text: str) -> None:
    try:
        for override in parsed([text]):
            assert override.key_or_group and not override.is_delete()
    except UserError as error:
        assert len(readable(str(error))) < 2100


@settings(ANYTHING, max_examples=200)
@given(text=st.text(max_size=400) | st.text(max_size=20).map(lambda part: part * 500))
def test_a_message_is_one_line_of_a_length_to_read(text: str) -> None:
    shown = readable(text)
    assert shown.isprintable() and "\n" not in shown and len(shown) < 2100
    if text.isprintable() and text == " ".join(text.split()) and len(text) <= 300:
        assert shown == text


@FEW
@given(text=st.text(max_size=30))
def test_any_text_as_a_method_is_refused(text: str) -> None:
    if text not in {path.stem for path in (CONF / "method").glob("*.yaml")}:
        with pytest.raises(UserError):
            expand([f"method={text}", "method.alpha=1"])


def places(value: Any, within: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every part of nested JSON."""
    yield within
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[name], (*within, name))


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """The document with one part replaced by other JSON, dropped, doubled, or given another name."""
    changed = copy.deepcopy(document)
    path = draw(st.sampled_from([path for path in places(document) if path]))
    holder = changed
    for name in path[:-1]:
        holder = holder[name]
    what = draw(st.sampled_from(["replace", "drop", "add"]))
    if what == "replace":
        holder[path[-1]] = draw(JSON | st.sampled_from([0, 1, 2, 0.5, 1.0, -1, True]))
    elif what == "drop":
        holder.pop(path[-1])
    elif isinstance(holder, list):
        holder.append(holder[path[-1]])
    else:
        holder[draw(st.text(max_size=8) | st.sampled_from(["5", "align", "slots"]))] = holder[path[-1]]
    return changed


@settings(ANYTHING, max_examples=200)
@given(document=mutated(sound_plan()))
def test_a_changed_plan_is_taken_as_what_it_says_or_refused(document: Any) -> None:
    try:
        made = from_json(json.dumps(document))
    except UserError:
        return
    assert said(json.loads(to_json(made))) == said(document), "nothing of it was dropped or read as something else"
    with contextlib.suppress(UserError):
        made.validate(dict.fromkeys(range(4), 32), 4)


def said(document: Any) -> str:
    """A plan's JSON in one spelling: shares as decimal fractions, no alignment left out."""
    layers = {
        index: {
            "slots": [[[expert, float(share)] for expert, share in slot] for slot in layer["slots"]],
            "routes": layer["routes"],
            "align": layer.get("align", False),
        }
        for index, layer in document["layers"].items()
    }
    return json.dumps({**document, "layers": layers}, sort_keys=True)


@ANYTHING
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_no_plan(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UserError):
        read(tmp_path / "plan.json")


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return dict(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))


@FEW
@given(data=st.data())
def test_a_changed_header_of_weights_is_taken_or_refused(data: st.DataObject, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world / "models" / "sound", folder)
    changed = data.draw(mutated(header_of(folder / "model.safetensors")))
    _header(lambda header: changed)(folder)
    with contextlib.suppress(UserError):
        checkpoint.check_structure(Model("changed", str(folder)))


@FEW
@given(
    name=st.sampled_from(["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"]),
    content=st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()),
)
def test_any_bytes_in_a_model_are_taken_or_refused(name: str, content: bytes, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world / "models" / "sound", folder)
    (folder / name).write_bytes(content)
    model = Model("changed", str(folder))
    text = Calibration("sound", (str(world / "texts" / "sound.jsonl"),), 2, 16, 0, 0)
    with contextlib.suppress(UserError):
        checkpoint.check_structure(model)
        assert text.tokens(model).shape == (2, 16)


SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".jsonl.gz", ".json.gz", "")


@ANYTHING
@given(
    suffix=st.sampled_from(SUFFIXES),
    content=st.binary(max_size=200)
    | st.lists(mutated({"text": "a fact", "more": [{"role": "user", "content": "b"}]}), max_size=4).map(
        lambda lines: "\n".join(map(json.dumps, lines)).encode()
    ),
)
def test_any_bytes_as_a_text_are_read_or_refused(suffix: str, content: bytes, world: Path, tmp_path: Path) -> None:
    file = tmp_path / f"text{suffix}"
    file.write_bytes(content)
    text = Calibration("any", (str(file),), 1, 4, 0, 0, columns=("text", "more"))
    with contextlib.suppress(UserError):
        text.check()
        assert text.tokens(Model("sound", str(world / "models" / "sound"))).shape == (1, 4)


@ANYTHING
@given(
    content=st.binary(max_size=200)
    | st.lists(JSON, max_size=4).map(lambda lines: "\n".join(map(json.dumps, lines)).encode())
)
def test_any_bytes_as_a_benchmark_are_rows_or_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    try:
        found = rows("any", file)
        check_alike("any", file, found, {name for row in found for name in row})
    except UserError as error:
        assert "rows.jsonl" in str(error)
    else:
        given_fields = {frozenset(name for name, value in row.items() if value is not None) for row in found}
        assert len(given_fields) == 1, "every row has the same fields"
