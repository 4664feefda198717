"""200 plans of the embedded model through one store by two workers: nothing leaks. Its own command, because it takes
long: ./bench test -m soak -s
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.models import ROOT
from tests.runs import command, environment, servers, temporary_files
from tests.test_interrupted import ports_of

SEEDS, RATIOS, WORKERS = 100, (0.25, 0.5), 2
EVERY_S = 2.0
ENDING_S = 30  # what only watches the run, as joblib's tracker of shared files does, sees its end a moment later
SHARED_MEMORY = Path("/dev/shm")


def arguments() -> list[str]:
    seeds = ",".join(map(str, range(SEEDS)))
    ratios = ",".join(map(str, RATIOS))
    quick = ["suite=tiny_sums", "limit=2", "calibration.sequences=4", "calibration.held_out=2"]
    return ["method=random", f"seed={seeds}", f"ratio={ratios}", *quick, f"workers={WORKERS}"]


class Watch(threading.Thread):
    """What all processes of a run hold, over time: (records, processes, files, bytes resident without shared pages,
    ports that are listened on).
    """

    def __init__(self, pid: int, store: Path) -> None:
        super().__init__(daemon=True)
        self.run_, self.store = psutil.Process(pid), store
        self.seen: list[tuple[int, ...]] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(EVERY_S):
            processes = files = memory = ports = 0
            with contextlib.suppress(psutil.NoSuchProcess):
                alive = [self.run_, *self.run_.children(recursive=True)]
                ports = len(ports_of(alive))
                for process in alive:
                    with contextlib.suppress(psutil.Error):
                        memory += process.memory_full_info().uss
                        files += process.num_fds()
                        processes += 1
            self.seen.append((len(list(self.store.glob("records/*.json"))), processes, files, memory, ports))

    def between(self, first: int, last: int) -> list[tuple[int, ...]]:
        """What was seen while so many records were there."""
        return [seen for seen in self.seen if first <= seen[0] < last]


@pytest.mark.soak
@pytest.mark.timeout(6000)
def test_two_hundred_plans_leave_nothing_behind(tmp_path: Path) -> None:
    store = tmp_path / "store"
    plans = SEEDS * len(RATIOS)
    before, ports, shared = set(psutil.pids()), ports_of(psutil.process_iter()), set(SHARED_MEMORY.iterdir())
    start = time.monotonic()
    log = (tmp_path / "log").open("w")
    run = subprocess.Popen(command(store, *arguments()), cwd=ROOT, stdout=log, stderr=log, env=environment(store))
    watch = Watch(run.pid, store)
    watch.start()
    assert run.wait() == 0, (tmp_path / "log").read_text()[-4000:]
    watch.over.set()
    watch.join()
    minutes = (time.monotonic() - start) / 60

    records = [json.loads(path.read_text()) for path in store.glob("records/*.json")]
    assert len(records) == plans and {record["status"] for record in records} == {"done"}
    assert len({record["plan"] for record in records}) == plans, "no two seeds drew the same plan"
    kinds = {folder.name: len(list(folder.iterdir())) for folder in sorted(store.iterdir())}
    assert kinds["plans"] == kinds["scores"] == kinds["samples"] == kinds["records"] == plans
    assert kinds.get("locks", 0) == kinds.get("work", 0) == kinds.get("checkpoints", 0) == 0

    deadline = time.monotonic() + ENDING_S
    while left := [pid for pid in psutil.pids() if pid not in before and is_ours(pid, store)]:
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in left]
        time.sleep(0.2)
    assert servers(store) == []
    assert not ports_of(psutil.process_iter()) - ports, "nothing else may be started meanwhile"
    assert temporary_files(store) == []
    early, late = watch.between(plans // 5, 2 * plans // 5), watch.between(4 * plans // 5, plans)
    assert early and late
    most = {
        name: (max(seen[place] for seen in early), max(seen[place] for seen in late))
        for place, name in enumerate(("processes", "open files", "memory", "ports"), start=1)
    }
    print(f"\n{plans} plans, {WORKERS} workers, {minutes:.1f} min; files in the store: {kinds}")
    print(f"shared memory left: {len(set(SHARED_MEMORY.iterdir()) - shared)}; most held, second fifth -> last fifth:")
    print(", ".join(f"{name} {first} -> {last}" for name, (first, last) in most.items()))
    assert most["processes"][1] <= most["processes"][0] and most["ports"][1] <= most["ports"][0]
    assert most["open files"][1] <= most["open files"][0] + 8
    assert most["memory"][1] <= 1.1 * most["memory"][0]
    assert not set(SHARED_MEMORY.iterdir()) - shared


def is_ours(pid: int, store: Path) -> bool:
    """Whether a process was started by the run: it knows its folder for temporary files."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).environ().get("TMPDIR") == environment(store)["TMPDIR"]
    return False
