"""A calibration pass in shards, layer by layer, or killed and gone on with, finds what one pass in memory finds."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import gather, memory, one_pass, only_calibrate, room, routed, stages, stats
from harness.errors import StageError, UserError
from harness.models import ROOT, Model
from harness.room import GIB, MaxMemory, need, parked
from harness.spec import Cell
from harness.stats import EXTRAS, MAXIMA, Stats
from harness.store import Store
from harness.sweep import expand
from tests.conftest import write_model
from tests.test_streaming import same

TEXT = ["calibration.sequences=6", "calibration.length=64", "calibration.held_out=0", "calibration.batch_size=2"]
EVERYTHING = f"collect=[{','.join(EXTRAS)}]"


def cell_of(store: Path, *overrides: str) -> Cell:
    (cell,) = expand([*TEXT, f"store={store}", *overrides]).cells
    return cell


def gathered(store: Path, *overrides: str) -> Stats:
    return gather.statistics(cell_of(store, *overrides), Store(store))


def assert_equal_sums(one: Stats, other: Stats) -> None:
    """But for the order in which float64 numbers were added."""
    assert one.layers.keys() == other.layers.keys() and one.names == other.names
    for index, layer in one.layers.items():
        assert layer.tokens == other.layers[index].tokens
        for name, value in layer.sums.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(other.layers[index][name], value, rtol=1e-12, atol=1e-12 * scale, err_msg=name)
        for name in {*MAXIMA, "count", "coactivation"} & layer.sums.keys():
            np.testing.assert_array_equal(other.layers[index][name], layer[name])


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_add_up_to_one_run(tmp_path: Path, shards: int) -> None:
    """Also where every expert runs on some of the tokens only, and the border is inside a shard."""
    asked = [EVERYTHING, "calibration.all_expert_tokens=100"]
    whole = gathered(tmp_path / "one", *asked)
    parts = gathered(tmp_path / "many", *asked, f"calibration.shards={shards}")
    assert_equal_sums(whole, parts)
    assert parts.provenance["number_of_tokens"] == whole.provenance["number_of_tokens"] == 384
    assert parts.provenance["shards"] == shards and parts.provenance["seconds"] > 0
    assert len(list((tmp_path / "many" / "stats").glob("*.safetensors"))) == shards + 1


def test_shards_make_the_plan_of_one_run(tmp_path: Path) -> None:
    cells = [cell_of(tmp_path / name, f"calibration.shards={name}", "method=reap") for name in ("1", "3")]
    assert cells[0].identity() == cells[1].identity()
    one, three = (
        stages.plan(cell, gather.statistics(cell, Store(tmp_path / name)), Store(tmp_path / name))
        for cell, name in zip(cells, ("1", "3"), strict=True)
    )
    assert one.layers == three.layers


def test_what_the_store_has_of_a_text_is_not_lost_when_shards_are_asked_for_more(tmp_path: Path) -> None:
    gathered(tmp_path, "collect=[coactivation]")
    more = gathered(tmp_path, "collect=[logit_sum]", "calibration.shards=2")
    assert {"coactivation", "logit_sum"} <= more.names
    assert_equal_sums(gathered(tmp_path / "other", "collect=[coactivation,logit_sum]"), more)


def test_every_expert_runs_on_the_first_tokens_only(tmp_path: Path) -> None:
    """The others' sums are of all tokens; a method that reads none of these sums keeps its plan's name."""
    some = gathered(tmp_path / "some", EVERYTHING, "calibration.all_expert_tokens=128")
    few = gathered(tmp_path / "few", EVERYTHING, "calibration.sequences=2")
    many = gathered(tmp_path / "all", EVERYTHING)
    for index, layer in some.layers.items():
        for name in ("all_output_sum", "all_gated_output_sum"):
            np.testing.assert_allclose(layer[name], few.layers[index][name], rtol=1e-12)
        assert layer["gate_norm"].tobytes() == many.layers[index]["gate_norm"].tobytes()
    changes = ["calibration.all_expert_tokens=128"]
    for method, changed in (("reap", False), ("hc_smoe", True)):
        plain, bounded = (cell_of(tmp_path, f"method={method}", *more) for more in ([], changes))
        assert (plain.identity() != bounded.identity()) == changed


@pytest.mark.parametrize("shards, asked", [(1, [100] * 4), (3, [0] * 8 + [100] * 4)])
def test_tokens_beyond_the_first_cost_nothing_in_every_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, asked: list[int]
) -> None:
    """Three batches in four layers; once where a shard has none of these tokens, so that its sums are there."""
    seen: list[int] = []

    def sums(experts: Any, hidden: Any, gate: Any, real: Callable[..., Any] = routed.sums_over_tokens) -> Any:
        seen.append(len(hidden))
        return real(experts, hidden, gate)

    monkeypatch.setattr(routed, "sums_over_tokens", sums)
    found = gathered(tmp_path, EVERYTHING, "calibration.all_expert_tokens=100", f"calibration.shards={shards}")
    assert sorted(seen) == asked and found.layers[0]["all_output_sum"].any()


@pytest.mark.parametrize("shards", [1, 2])
def test_the_same_tokens_in_another_length_are_another_text(tmp_path: Path, shards: int) -> None:
    """Cut elsewhere they see other neighbours, though a text is one row of tokens."""
    shapes = [(8, 32), (2, 128)]
    for sequences, length in shapes:
        changes = [f"calibration.sequences={sequences}", f"calibration.length={length}", f"calibration.shards={shards}"]
        changes += ["calibration.batch_size=1"]
        found = gathered(tmp_path / "one", *changes)
        assert same(gathered(tmp_path / f"{sequences}", *changes), found) and found.layers[0].tokens == 256
    assert len(list((tmp_path / "one" / "stats").iterdir())) == len(shapes) * (1 if shards == 1 else 3)


def test_two_processes_share_the_shards(tmp_path: Path) -> None:
    """Each is made by one of them, and both end with the sums of all."""
    arguments = [*TEXT, f"store={tmp_path}", "method=reap", "calibration.shards=3"]
    command = [sys.executable, "-m", "harness.only_calibrate", *arguments]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    made = [line for words in said for line in words.splitlines() if " tokens" in line and "calibrate " in line]
    assert sorted(line.rpartition(", ")[2] for line in made) == [*["128 tokens"] * 3, "384 tokens"], said
    assert_equal_sums(gathered(tmp_path / "alone"), gathered(tmp_path, "method=reap"))


def test_a_model_that_does_not_fit_is_read_layer_by_layer(tmp_path: Path, monkeypatch, capsys) -> None:
    """With the bytes of the pass in memory, and hidden states on disk where there is no room for them."""
    whole = gathered(tmp_path / "whole", EVERYTHING)
    assert whole.provenance["layers"] == "all"
    cell = cell_of(tmp_path / "layers", EVERYTHING)
    monkeypatch.setattr(room, "KEPT", 0)  # larger than the embedded model
    needed = need(cell.model, "float32", 2 * 64)
    for left in (needed.one_layer, needed.one_layer + 1.5 * needed.hidden, needed.whole - 1):
        monkeypatch.setattr(MaxMemory, "ram_left", lambda self, left=left: left)
        store = Store(tmp_path / f"{left}")
        layers = gather.statistics(cell, store)
        assert layers.provenance["layers"] == "one at a time" and same(whole, layers)
        assert not list(store.root.glob("unfinished/*")) and not list(store.root.glob("work/*"))
        assert layers.provenance["peak_memory"]["ram"] > 0


def test_a_layer_that_does_not_fit_is_refused_with_what_would_do(tmp_path: Path, monkeypatch) -> None:
    cell = cell_of(tmp_path)
    monkeypatch.setattr(room, "KEPT", 0)  # larger than the embedded model
    needed = need(cell.model, "float32", 128)
    monkeypatch.setattr(MaxMemory, "ram_left", lambda self: needed.one_layer - 1)
    with pytest.raises(StageError, match=r"max_memory\.ram=0\.5 does not hold one layer of tiny.* a batch of 128 tok"):
        parked(cell.model, "float32", 128, MaxMemory(ram=0.5))
    assert needed.layer < needed.weights / 3 and needed.rest < needed.weights, "sizes of the embedded model's layers"


def test_gpus_that_a_model_fills_to_the_brim_take_it_layer_by_layer(tmp_path: Path, monkeypatch) -> None:
    """A layer is not split, and each GPU computes: two that could hold the weights are not yet enough."""
    cell = cell_of(tmp_path)
    monkeypatch.setattr(room, "KEPT", 0)
    needed = need(cell.model, "float32", 128)
    enough = needed.on_each_of(2)
    for free, fits in (
        ([0.55 * needed.weights] * 2, False),
        ([enough] * 2, True),
        ([enough, enough - 1], False),
        ([10 * needed.weights, enough - 1], False),
    ):
        monkeypatch.setattr(MaxMemory, "gpus_left", lambda self, free=free: free)
        assert (parked(cell.model, "float32", 128, MaxMemory()) is None) == fits
    assert parked(cell.model, "float32", 128, MaxMemory()).parking(tmp_path).spare > 0, "of what others take"
    assert needed.on_each_of(1) == needed.whole + max(needed.layer, needed.rest)


def test_errors_of_a_model_that_does_not_fit_are_those_of_the_whole(tmp_path: Path, monkeypatch) -> None:
    more = ["calibration.held_out=4", "method=hc_smoe"]
    found = []
    monkeypatch.setattr(room, "KEPT", 0)
    for left in (np.inf, None):
        cell = cell_of(tmp_path / str(left), *more)
        store = Store(tmp_path / str(left))
        made = stages.plan(cell, gather.statistics(cell, store), store)
        enough = need(cell.model, "float32", 128).one_layer if left is None else left
        monkeypatch.setattr(MaxMemory, "ram_left", lambda self, enough=enough: enough)
        with monkeypatch.context() as patched:
            if left is None:
                patched.setattr(Model, "load", lambda *_: pytest.fail("the whole model was loaded"))
            stages.reconstruct(cell, made, store)
        found.append(store.read_json("errors", cell.errors_name)["layers"])
    assert found[0] == found[1] and min(found[0].values()) > 0


@pytest.mark.parametrize("value", ["0", "-1", "much", "true", ".nan", "[1]"])
def test_memory_is_a_number_of_gib(value: str) -> None:
    with pytest.raises(UserError, match="max_memory.ram"):
        expand([f"max_memory.ram={value}"])


def test_allowed_memory_is_what_is_left_of_it(monkeypatch) -> None:
    assert 0 < MaxMemory().ram_left() < 64 * 1024 * GIB
    assert MaxMemory(ram=1000).ram_left() == pytest.approx(MaxMemory().ram_left(), rel=0.1)
    used = MaxMemory(ram=3).ram_left()
    assert 0 < used < 3 * GIB, "what the process has already is not left"


@pytest.mark.parametrize("method", ["ream", "hodgecover", "hybrid"])
def test_what_needs_the_whole_model_is_refused_where_it_does_not_fit(method: str, tmp_path: Path, monkeypatch) -> None:
    from harness.commandline import check_whole_models

    monkeypatch.setattr(memory, "free", lambda: 1000)
    with pytest.raises(UserError, match="whole of tiny would have to be in memory"):
        check_whole_models([cell_of(tmp_path, f"method={method}")])
    check_whole_models([cell_of(tmp_path, "method=reap")])
    with pytest.raises(StageError, match="0.0 GiB are free"):
        cell_of(tmp_path).model.load("float32")


def calibrated(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["calibrate", *TEXT, *arguments])
    return only_calibrate.main()


def test_only_statistics_are_gathered(tmp_path: Path, monkeypatch) -> None:
    assert calibrated(monkeypatch, f"store={tmp_path}", "method=reap,hc_smoe,random", "ratio=0.25,0.5") == 0
    (file,) = (tmp_path / "stats").glob("*.safetensors")
    assert "all_output_sum" in stats.load(file).names and not (tmp_path / "plans").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["method=random"], "No method of these reads statistics"),
        (["method=reap", "calibration.shards=4"], "6 sequences in batches of 2 make 1 to 3 shards"),
        (["method=reap", "dry_run=true"], "this command has no bill"),
        (["max_memory.ram=0.1"], "max_memory.ram=0.1 does not hold one layer of tiny"),
        (["calibration.length=2048"], "longer than the 1024 positions that model 'tiny' has"),
        (["calibration.columns=[messages]"], "not a JSON object with a messages field"),
        (["calibration.weights=[1,2]"], "for each of the 4 files"),
        (["calibration.tools=nowhere.json"], "no file 'nowhere.json'"),
    ],
)
def test_what_cannot_be_gathered_is_refused(arguments: list[str], message: str, tmp_path, monkeypatch, capsys) -> None:
    assert calibrated(monkeypatch, f"store={tmp_path / 'store'}", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_what_a_pass_may_take_is_of_no_interest_where_there_is_none(tmp_path: Path, monkeypatch) -> None:
    asked = [f"store={tmp_path}", "method=reap"]
    assert calibrated(monkeypatch, *asked) == 0
    assert calibrated(monkeypatch, *asked, "max_memory.ram=0.1") == 0
    assert calibrated(monkeypatch, *asked, "max_memory.ram=0.1", "calibration.sequences=7") == 2


KILLED = """
import os, signal, sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
import harness.calibrate as calibrate
from harness import unfinished
from harness.models import Model
from tests.test_one_pass import layer_by_layer

folder, model, layer, batch, share = sys.argv[1:]
unfinished.SHARE = float(share)
seen, forward = [], calibrate.Observer.forward

def dying(self, experts, *given):
    seen.append(self.index_of[experts])
    if seen.count(int(layer)) == int(batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, experts, *given)

calibrate.Observer.forward = dying
layer_by_layer(Model("killed", model), Path(folder))
"""


def layer_by_layer(model: Model, folder: Path) -> Stats:
    from tests.test_streaming import streamed

    return streamed(model, folder, frozenset(EXTRAS))


@pytest.mark.parametrize(
    "share, family, layers",
    [
        pytest.param(-1, "qwen3_moe", [1], id="from tokens"),
        pytest.param(np.inf, "glm4_moe", [2], id="from states"),
        pytest.param(-1, "mixtral", [0, 1, 2], id="from tokens, in every layer", marks=pytest.mark.slow),
        pytest.param(np.inf, "qwen3_moe", [0, 1, 2], id="from states, in every layer", marks=pytest.mark.slow),
    ],
)
def test_killed_in_a_layer_it_goes_on_there_with_the_same_bytes(
    tmp_path: Path, share: float, family: str, layers: list[int]
) -> None:
    model = write_model(family, tmp_path / "model")
    whole = layer_by_layer(model, tmp_path / "whole")
    folder = tmp_path / "killed"
    for layer in layers:
        asked = [str(folder), str(model.folder), str(layer), "2", str(share)]
        done = subprocess.run([sys.executable, "-c", KILLED, *asked], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        kept = sorted(path.name for path in folder.glob("store/unfinished/x-layer-*"))
        assert len(kept) == sum(each < layer for each in whole.layers), kept
        assert bool(list(folder.glob("store/unfinished/x-states-*"))) == (share > 0 and layer > 0)
    assert same(whole, layer_by_layer(model, folder))


def test_processes_take_memory_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From looking at what is free to having it: else two would see the same and both take it."""
    met: list[str] = []

    def is_alone() -> bool:
        with Path(room.__file__).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            met.append(f"{name} {'alone' if is_alone() else 'beside others'}")
            return real(*arguments)

        return call

    monkeypatch.setattr(one_pass, "parked", noted("looks", one_pass.parked))
    monkeypatch.setattr(one_pass, "load", noted("loads", one_pass.load))
    gathered(tmp_path / "store")
    assert met == ["looks alone", "loads alone"]
