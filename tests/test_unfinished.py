"""What is kept of a pass that goes layer by layer leads it on, whenever it was cut short, and never astray."""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from harness import gather, one_pass, only_calibrate, room, stats, unfinished
from harness.errors import DiskFullError
from harness.models import Model
from harness.parking import write
from harness.room import MaxMemory, need
from harness.stats import Stats
from harness.store import Store, _own
from harness.streaming import FORM, Passes, Streamed
from harness.unfinished import forget, highest
from tests.architectures import batches
from tests.architectures import write_model as architecture
from tests.conftest import write_model
from tests.test_one_pass import cell_of, gathered
from tests.test_streaming import same, streamed

NONE = frozenset[str]()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_model("qwen3_moe", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return streamed(model, tmp_path_factory.mktemp("whole"), NONE)


@pytest.fixture
def layered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model goes layer by layer, and hidden states are kept before each layer."""
    monkeypatch.setattr(room, "KEPT", 0)
    monkeypatch.setattr(unfinished, "SHARE", float("inf"))
    enough = need(cell_of(Path()).model, "float32", 128).one_layer
    monkeypatch.setattr(MaxMemory, "ram_left", lambda self: enough)


def cut_short(model: Model, folder: Path, layers: int) -> Path:
    """A pass that ends behind so many layers; the folder of the hidden states that it has kept."""

    def some(self: Passes, *given: Any, go_on: Callable[..., Any] = Passes.layers) -> Any:
        for index in go_on(self, *given):
            yield index
            if index + 1 == layers:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(unfinished, "SHARE", float("inf"))
        patched.setattr(Passes, "layers", some)
        streamed(model, folder, NONE)
    (states,) = (folder / "store" / "unfinished").glob("x-states-*")
    return states


def zeros(states: Path) -> None:
    file = states / "0.bin"
    file.write_bytes(bytes(file.stat().st_size))


def shorter(states: Path) -> None:
    (states / "1.bin").write_bytes(b"")


def without_form(states: Path) -> None:
    (states / FORM).unlink()


def sums_gone(states: Path) -> None:
    (states.parent / "x-layer-0000.safetensors").unlink()


def sums_cut(states: Path) -> None:
    file = states.parent / "x-layer-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [None, zeros, shorter, without_form, sums_gone, sums_cut])
def test_what_is_damaged_or_gone_is_made_again(
    model: Model,
    whole: Stats,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None] | None,
) -> None:
    states = cut_short(model, tmp_path, 2)
    if damage:
        damage(states)
    assert same(whole, streamed(model, tmp_path, NONE))
    assert ("begins again from tokens" in capsys.readouterr().err) == bool(damage)


def test_no_states_are_kept_behind_the_last_layer_where_nothing_can_go_on(
    model: Model, whole: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SHARE", float("inf"))
    for _ in range(2):
        assert same(whole, streamed(model, tmp_path, NONE))
        (states,) = (tmp_path / "store" / "unfinished").glob("x-states-*")
        assert int(states.name[-4:]) == len(model.experts) - 1
        assert len(json.loads((states / FORM).read_text())["checksums"]) == len(list(states.glob("*.bin")))


def test_killed_while_it_is_forgotten_the_rest_leads_nobody_astray(
    model: Model, whole: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(model, tmp_path, 2)
    left: list[str] = []
    removed = unfinished.remove

    def dying(path: Path) -> None:
        if left:
            raise KeyboardInterrupt
        left.append(path.name)
        removed(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(unfinished, "remove", dying)
        forget(Store(tmp_path / "store"), "x")
    assert "states" in left[0] and len(list((tmp_path / "store" / "unfinished").iterdir())) == 2
    assert same(whole, streamed(model, tmp_path, NONE))


@pytest.mark.usefixtures("layered")
def test_a_disk_that_is_full_for_the_sums_costs_no_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    put = Store.put

    def full(self: Store, kind: str, name: str, make: Callable[[Path], None], nbytes: float = 0) -> Path:
        def without_room(path: Path) -> None:
            make(path)
            raise OSError(errno.ENOSPC, "No space left on device")

        return put(self, kind, name, without_room if kind == "stats" else make, nbytes)

    with monkeypatch.context() as patched, pytest.raises(DiskFullError):
        patched.setattr(Store, "put", full)
        gathered(tmp_path)
    cell = cell_of(tmp_path)
    assert len(list(store.root.glob("unfinished/*-layer-*"))) == len(cell.model.experts)
    (states,) = store.root.glob("unfinished/*-states-*")
    seen: list[int] = []
    with monkeypatch.context() as patched:
        loaded = Streamed.loaded
        patched.setattr(Streamed, "loaded", lambda self, index: seen.append(index) or loaded(self, index))
        found = gather.statistics(cell, store)
    assert seen == [int(states.name[-4:])] and not list(store.root.glob("unfinished/*"))
    assert same(gathered(tmp_path / "whole"), found)


@pytest.mark.usefixtures("layered")
def test_what_was_found_of_it_in_another_way_goes_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupted pass for other statistics, or in other batches; of other tokens it stays."""
    found = gathered(tmp_path / "first")
    stem = next((tmp_path / "first" / "stats").iterdir()).stem
    folder = tmp_path / "unfinished"
    folder.mkdir()
    for name in (f"{stem}-{16 * 'a'}-layer-0000.safetensors", f"{16 * 'b'}-{16 * 'a'}-layer-0000.safetensors"):
        (folder / name).write_bytes(b"")
    assert same(found, gathered(tmp_path))
    assert [path.name[:16] for path in folder.iterdir()] == [16 * "b"]
    assert "layer by layer, 4 layers" in capsys.readouterr().err


@pytest.mark.usefixtures("layered")
def test_killed_before_it_is_forgotten_the_next_command_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(store: Store, name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(one_pass, "forget", killed)
        gathered(tmp_path)
    assert list((tmp_path / "unfinished").iterdir()) and list((tmp_path / "stats").iterdir())
    gathered(tmp_path)
    assert not list((tmp_path / "unfinished").iterdir()) and "cached" in capsys.readouterr().err


@pytest.mark.usefixtures("layered")
def test_what_was_thrown_away_is_in_no_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of the whole model goes on with nothing."""
    clock = itertools.count(step=1000)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(unfinished, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        patched.setattr(one_pass, "forget", lambda *_: None)
        patched.setattr(stats, "save", _after(2, stats.save))
        gathered(tmp_path)
    monkeypatch.setattr(MaxMemory, "ram_left", lambda self: float("inf"))
    found = gathered(tmp_path)
    assert found.provenance["layers"] == "all" and found.provenance["seconds"] < 1000
    assert not list((tmp_path / "unfinished").iterdir())


def _after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is interrupted after so many calls."""
    left = iter(range(calls))

    def call(*given: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*given)

    return call


@pytest.mark.usefixtures("layered")
def test_the_seconds_of_all_processes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_layers(made: Stats, path: Path) -> None:
        if len(made.layers) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(made, path)

    save, clock = stats.save, itertools.count(step=1000)
    with monkeypatch.context() as patched, pytest.raises(DiskFullError):
        patched.setattr(unfinished, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        patched.setattr(stats, "save", only_layers)
        gathered(tmp_path)
    found = gathered(tmp_path)
    assert found.provenance["seconds"] > 1000 * len(found.layers)


def test_nothing_goes_on_that_another_device_or_version_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = cell_of(tmp_path)
    part = one_pass.whole(cell, np.zeros((2, 8), np.int64))
    names = [one_pass._left(part, NONE, Store(tmp_path)).name]
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        names.append(one_pass._left(part, NONE, Store(tmp_path)).name)
    versions = importlib.metadata.version
    for changed in ("torch", "compressed-tensors"):
        with monkeypatch.context() as patched:
            patched.setattr(
                importlib.metadata, "version", lambda name, changed=changed: "9" if name == changed else versions(name)
            )
            names.append(one_pass._left(part, NONE, Store(tmp_path)).name)
    names.append(one_pass._left(part, frozenset({"coactivation"}), Store(tmp_path)).name)
    assert len(set(names)) == 5 and {name[:16] for name in names} == {part.stem}


def test_of_processes_with_and_without_a_gpu_the_higher_peaks_are_told() -> None:
    assert highest({"ram": 3, "gpu": 5}, {"ram": 4}) == {"ram": 4, "gpu": 5}
    assert highest({}, {"ram": 4}) == {"ram": 4}


def test_where_layers_leave_something_for_later_ones_no_states_are_kept(tmp_path: Path) -> None:
    """Gemma 4's last layers read keys and values that earlier ones put into a mapping: states alone are not enough."""
    kinds = ["sliding_attention", "full_attention"]
    model = architecture(
        "gemma4_text", tmp_path / "model", num_hidden_layers=4, layer_types=kinds * 2, num_kv_shared_layers=2
    )
    whole = streamed(model, tmp_path / "whole", NONE, batches=batches())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(unfinished, "SHARE", float("inf"))
        assert same(whole, streamed(model, tmp_path, NONE, batches=batches()))
        assert not list((tmp_path / "store" / "unfinished").glob("*-states-*"))
    assert same(whole, streamed(model, tmp_path, NONE, batches=batches()))


def test_a_full_disk_is_an_error_with_a_number(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        write(torch.ones(1 << 20), Path("/dev/full"))
    assert raised.value.errno == errno.ENOSPC


def test_what_killed_calibrations_parked_is_swept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "work" / _own().replace(f"-{os.getpid()}-", "-4194999-states")
    gone.mkdir(parents=True)
    (gone / "0.bin").write_bytes(b"parked")
    monkeypatch.setattr(
        "sys.argv", ["calibrate", "calibration.sequences=4", "calibration.held_out=0", f"store={tmp_path}"]
    )
    assert only_calibrate.main() == 0
    assert not gone.exists() and list((tmp_path / "stats").iterdir())
