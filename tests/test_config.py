"""Every YAML in conf/ composes into a cell; a grid is what Hydra will run; bad input is one message and status 2."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from harness import run, sweep
from harness.errors import UserError
from harness.models import ROOT
from harness.spec import Cell, _modules, method_identity
from harness.sweep import expand
from methods.partial_preserve import PartialPreserve
from tests.conftest import SHARED, needs_shared, write_model

GROUPS = {
    group.name: sorted(option.stem for option in group.glob("*.yaml"))
    for group in sorted((ROOT / "conf").iterdir())
    if group.is_dir()
}
# Options that need something said besides their name.
MORE = {
    ("serve", "server"): ["serve.url=http://127.0.0.1:9", "serve.model=m", "method=none"],
    ("model", "smol_dense"): ["method=none"],
    ("suite", "code"): [f"data_dir={SHARED / 'data'}"],
    ("suite", "reap_code"): [f"data_dir={SHARED / 'data'}"],
    ("sweep", "systems"): ["seed=0", "ratio=0.5"],
    ("sweep", "zoo"): ["seed=0", "ratio=0.5"],
    ("sweep", "domains"): ["seed=0"],
}
EMPTY = ("agents", "creative")  # suites of the paper's benchmarks that are not offered: conf/domain/ says why


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in GROUPS.items() for o in options])
def test_every_option_composes(group: str, option: str) -> None:
    if option in ("code", "reap_code"):
        needs_shared("data/evalplus")
    if (group, option) == ("model", "smol_dense") and not (ROOT / "results" / "models" / option).exists():
        pytest.skip("smol_dense is not built in this checkout (./bench smol)")
    few = ["seed=42", "ratio=0.5", "method=reap"] if group == "experiment" else MORE.get((group, option), [])
    found = expand([f"{group}={option}", *few, "dry_run=true"])
    assert all(isinstance(cell, Cell) for cell in found.cells)
    assert all(cell.label and (cell.tasks or option in EMPTY) for cell in found.cells)
    assert found.cells or found.absent, "what has no benchmark says why"
    is_here = all(cell.model.is_here and not cell.calibration.absent for cell in found.cells)
    if is_here and option not in EMPTY and group != "domain":
        found.check()  # what the hub has not given this machine is a line of the bill: tests/test_bill.py


def test_the_demo_is_five_methods_at_two_ratios_and_the_uncompressed_model() -> None:
    cells = expand(["sweep=demo"]).cells
    assert len({cell.label for cell in cells if cell.compresses}) == 5
    assert {cell.ratio for cell in cells if cell.compresses} == {0.25, 0.5}
    assert any(not cell.compresses for cell in cells)
    assert {len(cell.tasks) for cell in cells} == {3}


def test_a_sweep_gathers_what_all_its_methods_need_in_one_pass() -> None:
    assert expand(["method=reap"]).extras == []
    assert expand(["method=reap,hc_smoe,m_smoe"]).extras == ["all_output_sum", "logit_gram"]


def test_a_grid_on_the_command_line() -> None:
    cells = expand(["method=reap,random", "ratio=0.25,0.5", "seed=0,1,2"]).cells
    assert {(c.label, c.ratio, c.seed) for c in cells} == set(
        itertools.product(["REAP", "random"], [0.25, 0.5], [0, 1, 2])
    )
    assert len({cell.record_name(cell.tasks[0]) for cell in cells}) == 12


@pytest.mark.parametrize(
    "varied",
    [
        [
            ["method=reap", "method=hc_smoe"],
            ["ratio=0.25", "ratio=0.5"],
            ["calibration.files=[a,b]", "calibration.files=[c]"],
        ],
        [["ratio=0.25", "ratio=0.5"], ["+method.more=1", "+method.more=2"]],
        [["ratio=0.25", "ratio=0.5"], ["hydra/launcher=slurm"], ["hydra.launcher.partition=gpu"]],
        [["seed=1", "seed=2"], ["method.reference_compat=true", "method={reference_compat:true}"], ["method=m_smoe"]],
    ],
    ids=["files and values", "additions", "a launcher", "mappings"],
)
def test_where_values_alone_differ_a_cell_is_as_hydra_composes_it(varied: list[list[str]]) -> None:
    jobs = [list(job) for job in itertools.product(*varied)]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job, config in zip(jobs, sweep._composed(jobs), strict=True):
            assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(compose("config", overrides=job))


def test_the_command_line_overrides_an_axis_of_a_sweep() -> None:
    assert {cell.ratio for cell in expand(["sweep=demo", "ratio=0.75"]).cells if cell.compresses} == {0.75}


def test_the_uncompressed_model_has_one_record_whatever_ratio_and_seed() -> None:
    cells = expand(["method=none", "ratio=0.25,0.5", "seed=0,1"]).cells
    assert len({cell.record_name(cell.tasks[0]) for cell in cells}) == 1


def test_a_methods_options_show_in_its_label() -> None:
    def labels(*overrides: str) -> list[str]:
        return [cell.label for cell in expand(list(overrides)).cells]

    assert labels("method=hc_smoe", "method.linkage=average,ward") == ["HC-SMoE", "HC-SMoE (linkage=ward)"]
    assert labels("method=m_smoe", "method.align=weights", "method.reference_compat=true") == [
        "M-SMoE (align=weights, reference_compat=True)"
    ]
    assert labels("method=random", "seed=3") == ["random"]
    assert labels("method=hybrid", "method.merge.preserved=0.8") == ["hybrid (merge.preserved=0.8)"]
    assert labels("method=hybrid", "method.prune._target_=methods.ean.EAN,methods.reap.REAP") == [
        "hybrid (prune=EAN)",
        "hybrid",
    ]
    assert labels("method=hybrid", "method.merge.importance._target_=methods.ean.EAN") == [
        "hybrid (merge.importance=EAN)"
    ]
    assert labels("method=hc_smoe", "method.linkage=ward", "method.label=mine") == ["mine"]
    assert labels("method=reap,none", "protect=super_experts") == ["REAP + super experts", "uncompressed"]
    assert labels("method=reap", "protect=super_experts", "protect.quantile=0.9") == [
        "REAP + super experts (quantile=0.9)"
    ]


def test_protection_works_with_every_score() -> None:
    for cell in expand(["method=frequency,ean,reap,man,easy_ep,aimer", "protect=super_experts"]).cells:
        cell.check()
        assert "output_max" in cell.method.needs and cell.calibrates


def test_how_statistics_were_routed_names_a_row_and_its_record() -> None:
    actual, paper = expand(["method=reap", "routing=actual,paper"]).cells
    assert (actual.row.routing, paper.row.routing) == ("actual", "paper")
    assert actual.record_name(actual.tasks[0]) != paper.record_name(paper.tasks[0])
    plain, same = expand(["method=random", "routing=actual,paper"]).cells
    assert plain.row == same.row and plain.row.routing == "none"


def test_only_what_reads_the_text_calibrates() -> None:
    reads = {
        name: expand([f"method={name}"]).cells[0].calibrates for name in ("none", "random", "aimer", "reap", "ream")
    }
    assert reads == {"none": False, "random": False, "aimer": False, "reap": True, "ream": True}


def test_a_method_is_identified_by_its_parts_and_by_what_it_takes_from_others() -> None:
    inner, other = (
        method_identity(cell.method)
        for cell in expand(
            ["method=partial_preserve", "method.importance._target_=methods.reap.REAP,methods.ean.EAN"]
        ).cells
    )
    assert inner["parameters"]["importance"]["class"] == "methods.reap.REAP"
    assert inner != other
    borrowing = ModuleType("methods.borrowing")
    borrowing.partial_preserve = PartialPreserve  # type: ignore[attr-defined]
    assert [module.__name__ for module in _modules(borrowing)] == [
        "methods",
        "methods.borrowing",
        "methods.partial_preserve",
    ]


def test_what_a_sequence_gathers_for_itself_is_not_gathered_for_all() -> None:
    assert expand(["method=reap,ream"]).extras == []
    assert expand(["method=reap,hope"]).extras == ["coactivation", "gated_norm_gram"]


def test_records_are_named_by_what_determines_them() -> None:
    def name(*overrides: str) -> str:
        (cell,) = expand(overrides).cells
        return cell.record_name(cell.tasks[0])

    plain = name("method=reap")
    assert plain == name("method=reap", "calibration.batch_size=3"), "batch size changes no sum"
    assert plain == name("method=reap", "store=elsewhere")
    different = ["method=ean", "ratio=0.25", "seed=1", "calibration.sequences=5", "calibration.dtype=bfloat16"]
    names = {plain, *(name("method=reap", override) for override in different)}
    assert len(names) == len(different) + 1


# Bad input. Each case: what is asked, and words the one message must hold. Hundreds more: tests/test_bad_inputs.py.

CASES = {
    "unknown method": (["method=reep"], ["reep", "reap", "hc_smoe"]),
    "unknown model": (["model=gpt9"], ["gpt9", "tiny"]),
    "unknown suite": (["suite=all"], ["all", "tiny"]),
    "unknown setting": (["ration=0.5"], ["ration"]),
    "unknown parameter of a method": (["+method.alpha=2"], ["alpha", "parameters"]),
    "unknown flag": (["--fast"], ["--fast", "name=value"]),
    "not an override": (["reap"], ["reap"]),
    "ratio above one": (["ratio=1.5"], ["ratio=1.5", "below 1"]),
    "ratio of one": (["ratio=1"], ["below 1"]),
    "negative ratio": (["ratio=-0.1"], ["ratio=-0.1"]),
    "ratio is a word": (["ratio=half"], ["half", "number"]),
    "one bad ratio in a grid": (["ratio=0.25,0.5,7"], ["ratio=7"]),
    "fewer experts than top-k": (["ratio=0.95"], ["top_k", "Largest usable ratio for this model: 0.875"]),
    "seed is a word": (["seed=x"], ["seed=x"]),
    "negative seed": (["seed=-1"], ["seed=-1"]),
    "missing model folder": (["model.path=./nowhere"], ["nowhere", "config.json"]),
    "missing calibration file": (["calibration.files=[no.jsonl]"], ["no.jsonl", "text"]),
    "more calibration than text": (["calibration.sequences=9000000"], ["9000000", "Largest usable number"]),
    "no sequences": (["calibration.sequences=0"], ["at least 1"]),
    "unknown dtype": (["calibration.dtype=int3"], ["int3", "float32"]),
    "a word for a number": (["calibration.sequences=abc"], ["abc", "int"]),
    "a word for a limit": (["limit=abc"], ["abc", "int"]),
    "half a problem": (["limit=2.5"], ["2.5", "int"]),
    "a word for a size": (["serve.kv_cache_gib=lots"], ["lots", "int"]),
    "no calibration files": (["calibration.files=[]"], ["no files"]),
    "no tasks": (["suite.tasks=[]"], ["no tasks"]),
    "neither true nor false": (["keep_checkpoints=maybe"], ["maybe", "true"]),
    "a path that is no name": (["model.path=models/"], ["models/"]),
    "a sweep whose rows would be mixed up": (["calibration.sequences=8,16"], ["share the table row"]),
    "unknown routing": (["routing=softmax"], ["softmax", "actual", "paper"]),
    "unknown option of a method": (["method=hc_smoe", "method.linkage=nearest"], ["nearest", "average"]),
    "options that exclude each other": (
        ["method=hc_smoe", "method.linkage=ward", "method.distance=cosine"],
        ["method.distance=euclidean"],
    ),
    "a method to protect from itself": (["method=hc_smoe", "protect=super_experts"], ["HCSMoE", "ScoreMethod"]),
    "a name for a method inside a method": (["method=hybrid", "method.prune=frequency"], ["prune=frequency"]),
    "a name for a score inside a method": (["method=partial_preserve", "method.importance=ean"], ["importance=ean"]),
    "something else inside a method": (
        ["method=hybrid", "method.prune._target_=methods.random.Random", "+method.prune.seed=1"],
        ["Random", "LayerMethod"],
    ),
    "groups of no expert": (["method=ream", "method.group_size=0"], ["group_size=0"]),
    "more than all preserved": (["method=partial_preserve", "method.preserved=2"], ["preserved=2"]),
    "a quantile above one": (["method=reap", "protect=super_experts", "protect.quantile=2"], ["quantile=2"]),
    "no held-out tokens for a method that measures": (
        ["method=hybrid", "calibration.held_out=0"],
        ["hybrid", "calibration.held_out"],
    ),
    "held out less than nothing": (["calibration.held_out=-1"], ["held out"]),
    "a class without a module": (["method._target_=nothing"], ["nothing"]),
    "a sum of the weights is not for the pass": (["collect=[weight_abs]"], ["weight_abs"]),
    "an unknown class inside a method": (
        ["method=hybrid", "method.prune._target_=methods.nothing.No"],
        ["methods.nothing.No"],
    ),
    "unknown extra statistic": (["collect=[entropy]"], ["entropy", "logit_gram"]),
    "a server without its address": (["serve=server", "method=none"], ["serve.url"]),
    "a server that is not there": (
        ["serve=server", "serve.url=http://127.0.0.1:9", "serve.model=m", "method=none"],
        ["9"],
    ),
    "a sweep on a server that serves one model": (
        ["serve=server", "serve.url=http://127.0.0.1:9", "serve.model=m", "method=reap"],
        ["method=none", "serve=vllm"],
    ),
    "more cache than memory": (["serve.kv_cache_gib=100000"], ["100000", "are free"]),
    "missing interpolation": (["ratio=${nothing}"], ["nothing"]),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input_is_one_message_and_status_2(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = CASES[case]
    refused(arguments, words, tmp_path, monkeypatch, capsys)


def refused(arguments: list[str], words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    """These arguments end with status 2 and one message that holds the words; nothing is written."""
    monkeypatch.setattr(sys, "argv", ["run", *arguments, f"store={tmp_path / 'results'}"])
    assert run.main() == 2
    printed = capsys.readouterr()
    messages = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and printed.out == "" and "Traceback" not in printed.err, printed.err
    assert [word for word in words if word not in messages[0]] == []
    assert not (tmp_path / "results").exists()


def test_the_exit_status_reaches_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness.run", "method=reep", f"store={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_unexpanded_options_raise_here_too() -> None:
    with pytest.raises(UserError):
        expand(["method=reap", "ratio=2"])


def test_copies_of_a_model_are_the_same_model(tmp_path: Path) -> None:
    first = write_model("qwen3_moe", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert first.digest == type(first)("other", str(tmp_path / "b")).digest
