"""The whole flow through the real vLLM, lm-eval and EvalPlus, on the embedded model and a taste of its tasks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from harness import gather, stages
from harness.store import Store
from harness.sweep import expand
from tests.runs import SWEEP, bench, servers, temporary_files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    store = tmp_path_factory.mktemp("store")
    return store, bench(store)


def test_ends_with_a_table_a_plot_and_complete_records(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    store, done = finished
    assert done.returncode == 0, done.stderr
    for word in (
        "tiny_sums exact_match (n=6 of 300)",
        "tiny_facts acc_norm",
        "tiny_code plus_pass@1",
        "run.csv",
        "run.png",
    ):
        assert word in done.stdout
    records = [json.loads(path.read_text()) for path in (store / "records").iterdir()]
    assert len(records) == 9
    for record in records:
        assert record["status"] == "done" and record["error"] is None
        assert all(metric["n"] == 6 and 0 <= metric["value"] <= 1 for metric in record["metrics"].values())
        assert set(record["seconds"]) == {"calibrate", "barriers", "plan", "recover", "export", "serve", "score"}
        assert record["provenance"]["versions"]["transformers"]
        assert record["task"] in ("tiny_sums", "tiny_facts", "tiny_code")
        assert record["calibration_tokens"] == (8 * 256 if record["label"] != "uncompressed" else 0)
        assert record["served_by"]["engine"] == "vllm"
    size = {record["label"]: record["size"] for record in records}
    assert size["REAP"]["experts"] == 16 and size["REAP"]["bytes"] < 0.6 * size["uncompressed"]["bytes"]
    assert size["HC-SMoE"]["experts"] == 32 and size["HC-SMoE"]["distinct"] == 16
    assert len(list((store / "samples").iterdir())) == 9


def test_leaves_no_checkpoint_and_no_process(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    store, _ = finished
    assert not list(store.rglob("checkpoints/*")), "plans are served from the original files"
    assert servers(finished[0]) == []
    assert temporary_files(store) == []


def test_the_same_command_again_is_cached_and_prints_the_same(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    store, done = finished
    again = bench(store)
    assert again.stdout == done.stdout
    lines = again.stderr.splitlines()
    assert len(lines) == 4 and all(line.endswith("cached") for line in lines[:3])
    assert "3 cells: 0 done, 0 failed, 3 cached" in lines[3]


def test_a_new_method_uses_the_statistics_that_are_there(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (cell,) = expand([*SWEEP[1:], "method=ean", f"store={finished[0]}"]).cells
    made = stages.plan(cell, gather.statistics(cell, Store(finished[0])), Store(finished[0]))
    assert made.layers
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith("calibrate") and line.endswith("cached") for line in said)


@pytest.mark.slow
def test_recovered_and_sliced_models_go_through_the_same_flow(tmp_path: Path) -> None:
    """Trained routers and a width slice: checkpoints that one engine turns to; searched counts beside them."""
    store = tmp_path / "store"
    quick = ["recovery.text.sequences=16", "recovery.text.held_out=2", "calibration.held_out=2", "suite=tiny_sums"]
    done = bench(store, "method=reap", "recovery=router,elastic_width", *quick)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (store / "records").iterdir()]
    assert {record["label"].split(" (")[0] for record in records} == {"REAP + router KD", "elastic width"}
    for record in records:
        assert record["status"] == "done" and record["served"]["how"] == "swap"
        assert record["served"]["difference"] < 0.3
        recovery = record["recovery"]
        assert recovery["tokens"] == 16 * 256 and recovery["kl_before"] > 0 and recovery["kl_after"] > 0
        assert record["size"]["bytes"] < 0.6 * record["original"]["bytes"]
    assert "recovery tokens" in done.stdout and "held-out KL before" in done.stdout
    assert temporary_files(store) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (["serve=hf", "serve.startup_timeout_s=0.5"], "startup_timeout_s"),
        (["serve.extra_args=[--no-such-argument]"], "no-such-argument"),
    ],
    ids=["transformers", "vllm"],
)
def test_a_cell_that_fails_becomes_a_failed_record_and_the_others_go_on(
    tmp_path: Path, fault: list[str], words: str
) -> None:
    store = tmp_path / "store"
    done = bench(store, "method=none", *fault)
    assert done.returncode == 1
    assert "✗" in done.stdout and words in done.stdout
    records = [json.loads(path.read_text()) for path in (store / "records").iterdir()]
    assert {record["status"] for record in records} == {"failed"} and len(records) == 3
    assert not any("metrics" in record for record in records)
    assert servers(store) == [] and temporary_files(store) == []
