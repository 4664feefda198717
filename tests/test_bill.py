"""The bill: sizes against the paper's and against real files, costs against hand calculation, and nothing touched."""

from __future__ import annotations

import json
import math
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from harness import bill, checkpoint, estimate, gather, run, stages
from harness.build import build
from harness.estimate import Estimate, Load, expected_plan
from harness.models import ROOT, Model, Outlined
from harness.plan import LayerPlan, Plan
from harness.spec import Cell
from harness.store import Store
from harness.sweep import expand
from tests.conftest import conf
from tests.tiny_checkpoint import write_checkpoint

# Table 1 of the paper: parameters in all and active, in 10^9.
PUBLISHED = {
    "ernie_4_5_21b": (21.9, 3),
    "qwen3_30b_a3b": (30.5, 3),
    "mixtral_8x7b": (46.7, 13),
    "glm_4_5_air": (106.9, 12),
    "llama_4_scout": (107.8, 17),
    "qwen3_coder_480b": (480.2, 35),
    "kimi_k2": (1026.4, 32),
}


def outlined(name: str) -> Outlined:
    made = build("model", conf(f"model/{name}.yaml")).outlined()
    assert made is not None
    return made


def cells(*overrides: str) -> list[Cell]:
    return list(expand([*overrides]).cells)


# ---- models that are not here


@pytest.mark.parametrize("name", PUBLISHED)
def test_outlines_have_the_published_sizes(name: str) -> None:
    """Total within 0.5 %. Whether the active count takes embeddings in differs by vendor, and it is rounded."""
    model = outlined(name)
    total, published = PUBLISHED[name]
    assert model.parameters / 1e9 == pytest.approx(total, rel=0.005)
    ends = sum(tensor.elements for name, tensor in model.tensors.items() if "embed" in name or "lm_head" in name)
    low, high = (estimate.active(model) - ends) / 1e9, estimate.active(model) / 1e9
    assert low - 0.5 < published < high + 0.5
    experts, top_k = {"ernie_4_5_21b": (64, 6), "mixtral_8x7b": (8, 2), "llama_4_scout": (16, 1)}.get(
        name, ({"qwen3_coder_480b": 160, "kimi_k2": 384}.get(name, 128), 8)
    )
    assert set(model.experts.values()) == {experts} and model.top_k == top_k


def test_an_outline_of_a_real_model_is_as_large_as_its_files() -> None:
    """The same numbers from config.json through transformers and from the files, whose experts are stored apart."""
    (tiny,) = {cell.model for cell in cells("model=tiny")}
    config = {k: v for k, v in tiny.config.items() if k not in ("architectures", "dtype", "transformers_version")}
    made = Outlined("tiny", "nowhere/nothing", outline={**config, "bytes": {"routed": 2, "rest": 2}})
    assert (made.parameters, made.nbytes, made.experts) == (tiny.parameters, tiny.nbytes, tiny.experts)
    assert estimate.routed(made) == estimate.routed(tiny)
    for keep in (8, 24, 32):
        plan = Plan({layer: LayerPlan.prune(range(keep), 32) for layer in range(4)})
        assert checkpoint.measure(made, plan) == checkpoint.measure(tiny, plan)


def test_bytes_are_those_of_the_published_form() -> None:
    fp8, int4 = outlined("qwen3_coder_480b"), outlined("kimi_k2")
    assert fp8.nbytes == fp8.parameters
    experts, nbytes = estimate.routed(int4)
    assert 0.5 < nbytes / experts < 0.53 and experts / int4.parameters > 0.98


def test_which_architectures_can_be_calibrated() -> None:
    assert all(outlined(name).is_observable for name in PUBLISHED)


def test_the_cache_of_a_token() -> None:
    """Grouped heads: 2 x layers x heads x size x 2 bytes; DeepSeek keeps one latent vector and the rotated part."""
    assert estimate.cache_bytes(outlined("qwen3_30b_a3b")) == 2 * 48 * 4 * 128 * 2
    assert estimate.cache_bytes(outlined("kimi_k2")) == 61 * (512 + 64) * 2


# ---- sizes of plans


def test_expected_plans_are_as_large_as_the_methods_own(tmp_path: Path) -> None:
    """Pruning and both kinds of merging, planned for real on the embedded model."""
    sweep = expand(
        ["method=reap,hc_smoe,m_smoe", "calibration.sequences=4", "calibration.held_out=0", f"store={tmp_path}"]
    )
    for cell in sweep.cells:
        cell = replace(cell, collect=frozenset(sweep.extras))
        made = stages.plan(cell, gather.statistics(cell, sweep.store), sweep.store)
        real, guessed = (checkpoint.measure(cell.model, plan) for plan in (made, expected_plan(cell)))
        assert guessed.distinct_bytes == pytest.approx(real.distinct_bytes, rel=1e-3)
        assert guessed.bytes == pytest.approx(real.bytes, rel=1e-3)
        assert guessed.experts == real.experts
        assert estimate.known_plan(cell, sweep.store) == made


def test_methods_say_themselves_whether_they_keep_router_rows() -> None:
    grid = cells("method=reap,ean,hope,frozen_gate,random,partial_preserve,ream,hybrid,hc_smoe,m_smoe")
    assert {cell.label for cell in grid if estimate.keeps_rows(cell.method)} == {"HC-SMoE", "M-SMoE"}


def test_weights_in_memory_depend_on_how_they_are_served() -> None:
    def served(*overrides: str) -> float:
        (cell,) = cells("ratio=0.5", *overrides)
        made = Estimate.of(cell, Store(ROOT / "nowhere"))
        assert made is not None
        return made.served_bytes

    (cell,) = cells("method=none")
    whole = cell.model.nbytes
    assert served("method=none") == whole
    assert served("method=reap") == served("method=reap", "serve=checkpoint") < 0.6 * whole
    assert served("method=hc_smoe") < 0.6 * whole < served("method=hc_smoe", "serve=checkpoint") == whole
    assert served("method=reap", "serve=mask") == served("method=reap", "serve=hf") == whole
    assert served("method=none", "serve.dtype=float32") == 2 * whole


# ---- work and hours


def test_tokens_of_a_suite_are_items_times_requests() -> None:
    (cell,) = cells("suite=mc", "method=none")
    load = Load.of(cell.tasks)
    assert load.generated == load.most == 0
    assert load.prompt == sum(w.items * w.requests * w.prompt for w in (estimate.WORK[t.name] for t in cell.tasks))
    (taste,) = cells("suite=mc", "method=none", "limit=1")
    assert Load.of([task for task in taste.tasks if task.name == "mmlu"]).prompt == 57 * 4 * 109
    (code,) = cells("suite=reap_code", "method=none")
    assert Load.of(code.tasks).most == (164 + 378) * 16384


def test_facts_of_the_embedded_tasks_are_those_of_their_files() -> None:
    (tiny,) = {cell.model for cell in cells("model=tiny")}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    rows = [json.loads(line) for line in (ROOT / "tasks/tiny/data/tiny_code.jsonl").read_text().splitlines()]
    work = estimate.WORK["tiny_code"]
    assert work.items == len(rows)
    assert work.prompt == pytest.approx(
        sum(len(tokenizer(r["prompt"])["input_ids"]) for r in rows) / len(rows), abs=0.5
    )


def test_hours_by_hand() -> None:
    """Qwen3-30B, uncompressed, HumanEval alone: two readings, 164 prompts of 170 tokens, 164 answers of 85."""
    (cell,) = cells("model=qwen3_30b_a3b", "method=none", "suite=code", "serve.max_num_seqs=1")
    made = Estimate.of(replace(cell, tasks=cell.tasks[:1]), Store(ROOT / "nowhere"))
    assert made is not None
    reading = 2 * 61.06e9 / estimate.READING
    prompts = 2 * 3.353e9 * 164 * 170 / (estimate.PREFILL * estimate.PEAK_FLOPS)
    # one sequence at a time reads 8 of 128 experts, the rest, and its own cache
    step = 61.06e9 - 57.98e9 * (1 - 8 / 128) + 255 * 98304
    answers = 164 * 85 * step / (estimate.DECODE * estimate.BANDWIDTH)
    assert made.gpus == 1
    assert made.hours * 3600 == pytest.approx(reading + prompts + answers, rel=1e-3)


def test_a_larger_batch_makes_answers_cheaper_and_a_smaller_model_too() -> None:
    def hours(*overrides: str) -> float:
        (cell,) = cells("model=qwen3_30b_a3b", "suite=code", *overrides)
        made = Estimate.of(cell, Store(ROOT / "nowhere"))
        assert made is not None
        return made.hours - (estimate.LOADS - (not cell.compresses)) * made.cell.model.nbytes / estimate.READING / 3600

    assert hours("method=none", "serve.max_num_seqs=64") < hours("method=none", "serve.max_num_seqs=8")
    assert hours("method=reap", "ratio=0.5", "calibration.held_out=0") < hours("method=none")


def pass_of(*asked: str) -> estimate.Pass:
    sweep = expand([*asked, "calibration=evol_codealpaca"])
    (found,) = estimate.passes(sweep, [Estimate.of(cell, sweep.store) for cell in sweep.cells])
    return found


def test_the_pass_that_runs_every_expert_costs_more() -> None:
    tokens = 1024 * 2048
    routed, some, every = (
        pass_of("model=qwen3_30b_a3b", method, f"calibration.all_expert_tokens={count}")
        for method, count in (("method=reap", 65536), ("method=hc_smoe", 65536), ("method=hc_smoe", tokens))
    )
    assert {one.tokens for one in (routed, some, every)} == {tokens}
    assert routed.hours < some.hours < 1.2 * routed.hours and every.hours > 3 * routed.hours
    assert every.disk == some.disk > routed.disk


def test_a_model_of_any_size_is_calibrated_on_one_gpu() -> None:
    """In 16 bits Kimi-K2 takes 2 TB, and a layer of it 34 GB."""
    found = pass_of("model=kimi_k2", "method=reap")
    assert found.gpus == 1 and 2000e9 < found.memory.whole < 2200e9 and 30e9 < found.memory.one_layer < 60e9


@pytest.mark.parametrize(("nbytes", "count"), [(1, 1), (71e9, 1), (73e9, 2), (150e9, 4), (547e9, 8), (600e9, 16)])
def test_gpus_come_in_powers_of_two(nbytes: float, count: int) -> None:
    assert estimate.gpus(nbytes) == count


# ---- what is printed


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the network fails the test; serving's own look at free ports is local."""

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"the network was asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def printed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["run", *arguments, "dry_run=true"])
    assert run.main() == 0
    return capsys.readouterr().out


def test_absent_models_are_lines_of_the_bill(tmp_path: Path, monkeypatch, capsys, offline) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Model, "load", loaded)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = ["model=qwen3_30b_a3b,glm_4_5_air,llama_4_scout,smol_dense", "method=reap", "seed=1,2"]
    out = printed([*asked, "calibration=evol_codealpaca", f"store={tmp_path}/s"], monkeypatch, capsys)
    for words in (
        "Qwen/Qwen3-30B-A3B is not on this machine nor whole in the hub's cache; a download of about 61.1 GB",
        "evol-codealpaca-v1/train.jsonl not on this machine",
        "smol_dense",
    ):
        assert words in out
    assert not (tmp_path / "s").exists()
    (line,) = [line for line in out.splitlines() if line.startswith("| qwen3_30b_a3b | REAP")]
    columns = [part.strip() for part in line.split("|")]
    assert columns[6] == "2", "seeds together"


def test_what_the_store_has_is_not_paid_again(tmp_path: Path, monkeypatch, capsys) -> None:
    """A plan and a score are there for one seed of two."""
    folder = write_checkpoint(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"number {n} is written here"}) + "\n" for n in range(60)))
    asked = [f"model.path={folder}", "model.name=small", f"calibration.files=[{text}]", "calibration.sequences=4"]
    asked += [
        "calibration.length=32",
        "calibration.held_out=0",
        "ratio=0.5",
        "seed=0,1",
        "method=reap",
        "suite=tiny_code",
    ]
    asked.append(f"store={tmp_path}/store")
    before = printed(asked, monkeypatch, capsys)
    assert not (tmp_path / "store").exists() and "0 of 2" in before
    sweep = expand(asked)
    cell = sweep.cells[0]
    stages.plan(cell, gather.statistics(cell, sweep.store), sweep.store)
    sweep.store.write_json("records", cell.record_name(cell.tasks[0]), {"status": "done"})
    files = sorted(sweep.store.root.rglob("*"))
    after = printed(asked, monkeypatch, capsys)
    assert sorted(sweep.store.root.rglob("*")) == files, "nothing is written"
    (line,) = [line for line in after.splitlines() if line.startswith("| small") and "REAP" in line]
    columns = [part.strip() for part in line.split("|")]
    assert columns[6:9] == ["2", "1", "1 of 2"]
    (calibrated,) = [
        line for line in after.splitlines() if line.startswith("| small") and "128" in line and "REAP" not in line
    ]
    assert [part.strip() for part in calibrated.split("|")][3:5] == ["2", "1"], "one pass of two is done"
    assert "1 of 2 scores to make" in after


def test_what_would_be_refused_is_a_line_and_bad_input_is_still_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    out = printed(["ratio=0.95", "serve.kv_cache_gib=100000"], monkeypatch, capsys)
    assert "Largest usable ratio for this model: 0.875" in out and "100000 cache" in out
    write_checkpoint(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").unlink()
    assert "no readable config.json" in printed([f"model.path={tmp_path}/broken"], monkeypatch, capsys)
    for wrong in (["method=reep"], ["ratio=7"], ["dry_run=maybe"]):
        monkeypatch.setattr(sys, "argv", ["run", "dry_run=true", *wrong])
        assert run.main() == 2
        assert capsys.readouterr().out == ""


def test_benchmarks_that_are_not_offered_are_named_with_the_reason(monkeypatch, capsys) -> None:
    out = printed(["domain=creative,tiny_math", "method=none"], monkeypatch, capsys)
    assert "WildBench creative writing is not offered" in out and "gpt-4o" in out and "tiny_sums" in out
    assert "WildBench" in printed(["domain=creative", "method=none"], monkeypatch, capsys)
    monkeypatch.setattr(sys, "argv", ["run", "domain=creative", "method=none"])
    assert run.main() == 2
    assert "WildBench" in capsys.readouterr().err


def test_a_checkpoint_is_paid_for_only_where_one_is_written() -> None:
    def disk(*overrides: str) -> float:
        sweep = expand(["method=reap,hc_smoe", "ratio=0.5", *overrides])
        known = [made for cell in sweep.cells if (made := Estimate.of(cell, sweep.store))]
        return bill._checkpoints(sweep, known)

    assert disk() == disk("keep_checkpoints=true") == 0
    one, both = disk("serve=checkpoint"), disk("serve=checkpoint", "keep_checkpoints=true")
    (cell,) = cells("method=none")
    assert one == cell.model.nbytes, "merged experts are copied: HC-SMoE's is as large as the original"
    assert one < both < 2 * one and not math.isclose(one, both)


def test_searches_and_training_are_paid_for() -> None:
    """More than uniform REAP takes, and more for more: of a search its plans, of a training its epochs."""

    def hours(*overrides: str) -> float:
        (cell,) = expand(["ratio=0.5", "store=no-such-folder", *overrides]).cells
        found = Estimate.of(cell, Store(Path("no-such-folder")))
        assert found is not None
        return found.hours

    plain = hours("method=reap")
    for system in ("evoesap", "rco", "rco_counts", "router", "elastic_width"):
        assert hours(f"system={system}") > plain, system
    assert hours("system=evoesap", "allocation.generations=50") > hours("system=evoesap")
    assert hours("system=rco", "method.steps=200") > hours("system=rco")
    assert hours("system=all", "recovery.epochs=2") > hours("system=all")
    assert hours("system=all") > hours("system=all_lm"), "a teacher runs beside the student"
