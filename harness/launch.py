"""A sweep shared out among workers, which one of Hydra's launchers starts: processes, SLURM jobs or Ray tasks.

Every worker goes through the same cells and takes those that nobody is at (``harness/run.py``); what they have in
common is the store. Each writes what it says to a log of its own in the store, from where it is shown here.

./bench run sweep=demo workers=2                                       processes of this machine
./bench run sweep=demo workers=8 gpus_per_worker=1 hydra/launcher=slurm hydra.launcher.partition=gpu
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from harness import gpus
from harness.build import CONF
from harness.errors import DiskFullError, StageError, UserError
from harness.progress import Progress, was_abandoned
from harness.scoring import Failure, record
from harness.spec import Cell
from harness.store import Store, say
from harness.sweep import first_config
from harness.worker import STOP, Assignment, work

LOOK_S = 0.5  # between two looks at the workers' logs
DEATHS = 3  # of workers at a cell before it is given up
# Launchers that start processes on this machine and know nothing of GPUs: theirs are shared out here.
PLAIN = ("JoblibLauncher", "LocalLauncher")


@dataclass(frozen=True)
class Workers:
    """Who is to do the work. count: how many processes. gpus: that each of them sees. launcher: option of
    ``hydra/launcher``. settings: the command line's own settings of it. elsewhere: whether they may run on other
    machines than this one. plain: whether they are processes that we share the GPUs out to.
    """

    count: int
    gpus: int
    launcher: str
    settings: tuple[str, ...]
    elsewhere: bool
    plain: bool


def new_run() -> str:
    """Id of a run: when it was started, and something that no other has."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def workers(arguments: Sequence[str]) -> Workers | None:
    """Whom this command line asks for; None for this process alone. Raises UserError for what cannot be started."""
    config = first_config(tuple(arguments))
    count, asked = _whole("workers", config.workers, 1), config.gpus_per_worker
    chosen = config.hydra.runtime.choices["hydra/launcher"]
    if chosen == "basic":
        if count == 1:
            return None
        chosen = "local"
        config = first_config((*arguments, "hydra/launcher=local"))
    kind = _launcher_class(chosen, config.hydra.launcher)
    settings = tuple(config.hydra.overrides.hydra)
    if kind.__name__ == "JoblibLauncher":
        if count == 1:  # would be this process all the same
            return None
        settings += (f"hydra.launcher.n_jobs={count}",)
    plain = kind.__name__ in PLAIN
    elsewhere = not plain and OmegaConf.select(config, "hydra.launcher.ray.init.address") != "local"
    here = gpus.visible()
    each = min(1, len(here)) if asked is None else _whole("gpus_per_worker", asked, 0)
    if not elsewhere and each * count > len(here):
        possible = f"workers={len(here) // each}" if len(here) >= each else f"gpus_per_worker={len(here)} workers=1"
        raise UserError(
            f"workers={count} with gpus_per_worker={each} need {each * count} GPUs, and {len(here)} can be seen here. "
            f"Possible: {possible}."
        )
    return Workers(count, each, chosen, settings, elsewhere, plain)


def servers_here(asked: Workers | None) -> int:
    """How many servers run beside each other on this machine; 0 where they may run on others."""
    if asked is None:
        return 1
    return 0 if asked.elsewhere else asked.count


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value} is not a whole number from {least} up.")
    return value


def _launcher_class(chosen: str, config: DictConfig) -> type[Launcher]:
    """The launcher's class, which is not made yet. Raises UserError if it, or what it starts workers with, is not here.

    A launcher ``hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher`` is of the package hydra-ray-launcher and
    needs the package ray.
    """
    target = str(config.get("_target_"))
    found = re.match(r"hydra_plugins\.(hydra_(\w+)_launcher)\.", target)
    for needed in found.groups() if found else ():
        module = f"hydra_plugins.{needed}" if needed.startswith("hydra_") else needed
        if not _is_installed(module):
            raise UserError(
                f"hydra/launcher={chosen} needs the package {needed.replace('_', '-')}, which is not installed. "
                "./bench setup installs what requirements/ lists; hydra/launcher=local starts processes."
            )
    try:
        kind = get_class(target)
    except (HydraException, ImportError, ValueError) as error:
        raise UserError(f"hydra/launcher={chosen}: there is no class {target}: {error}") from error
    if not issubclass(kind, Launcher):
        raise UserError(f"hydra/launcher={chosen}: {target} is no launcher.")
    if kind.__name__ == "SlurmLauncher" and shutil.which("sbatch") is None:
        raise UserError(
            f"hydra/launcher={chosen} needs SLURM, and there is no sbatch on this machine. Give the command on a "
            "machine that submits jobs, or use hydra/launcher=local."
        )
    return kind


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what it is part of
        return False


def launch(asked: Workers, cells: Sequence[Cell], store: Store, run: str) -> None:
    """Start the workers, show what they say, and return when every cell has been tried.

    A cell whose worker dies is taken over by another; where none is left they are started again. A cell that `DEATHS`
    of them were at becomes a failed record. Raises StageError if cells are left nevertheless, and what a worker raises.
    After Ctrl-C the workers of this machine have ended when KeyboardInterrupt is raised; others end by themselves,
    within seconds or when they start.
    """
    logs = store.path("logs", run)
    logs.mkdir(parents=True, exist_ok=True)
    here = gpus.visible()
    shares = [",".join(here[asked.gpus * n : asked.gpus * (n + 1)]) for n in range(asked.count)]
    assignment = Assignment(
        tuple(cells), store, run, str(Path.cwd()), logs, (os.getpid(), psutil.Process().create_time()),
        tuple(shares) if asked.plain and asked.gpus else (), asked.elsewhere,
    )  # fmt: skip
    os.environ.setdefault("TQDM_DISABLE", "1")  # workers write to files
    if not asked.elsewhere and asked.count > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // asked.count)))
    progress = Progress(cells, store, run)
    left, deaths = progress.left(), Counter[Cell]()
    while left:
        problem = _launch_once(asked, assignment, progress)
        if isinstance(problem, UserError | DiskFullError):
            raise problem
        died = [cell for cell in progress.left() if was_abandoned(cell, run, store)]
        deaths.update(died)
        for cell in died:
            if deaths[cell] == DEATHS:
                _give_up(cell, store, run)
        before, left = left, progress.left()
        said = _words(problem) if problem else "They ended as if all was done"
        if left and not died and len(left) == len(before):
            raise StageError(f"No worker is left, and {len(left)} cells are. {said}. Logs: {logs}")
        if problem or left:
            say("failed", "worker", said + (f"; started again for {len(left)} cells" if left else ""))


def _give_up(cell: Cell, store: Store, run: str) -> None:
    """Record that a cell has no score because of what became of the workers that were at it."""
    words = f"{DEATHS} workers died that were at this cell, or beside one that was (out of memory, or killed)."
    for task in cell.tasks:
        record(cell, None, None, task, Failure("worker", words, None), store, run)


def _words(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}".rstrip(". ")


def _launch_once(asked: Workers, assignment: Assignment, progress: Progress) -> Exception | None:
    """Have the launcher start all workers and wait until they have ended; what went wrong."""
    problems: list[Exception] = []
    relay = Relay(assignment.logs)

    def goes_on() -> bool:
        # A launcher may give up on all workers when one of them dies, and the others work on.
        return thread.is_alive() or (bool(problems) and progress.running())

    def wait() -> None:
        # Inherited by what is started here: Ctrl-C at the terminal is for this process, which tells the workers.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _launcher(asked, assignment) as launcher:
                for job in launcher.launch([[]] * asked.count, 0):
                    _ = job.return_value  # raises what the worker raised
        except Exception as problem:
            problems.append(problem)

    thread = threading.Thread(target=wait, daemon=True, name="launcher")
    thread.start()
    try:
        relay.show_while(goes_on)
    except KeyboardInterrupt:
        (assignment.logs / STOP).touch()
        if asked.elsewhere:
            say(
                "stop", "workers", f"end within seconds; jobs in a queue when they start, or with {_cancel(assignment)}"
            )
        else:
            relay.show_while(goes_on)
        raise
    return problems[0] if problems else None


def _cancel(assignment: Assignment) -> str:
    return f"scancel --name={_job_name(assignment)}"


def _job_name(assignment: Assignment) -> str:
    return f"bench-{assignment.run}"


@contextmanager
def _launcher(asked: Workers, assignment: Assignment) -> Iterator[Launcher]:
    """Hydra's launcher, which writes nothing but into the folder of the run's logs."""
    folder = str(assignment.logs.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    overrides = [
        *asked.settings,
        *(f"workers={asked.count}", f"gpus_per_worker={asked.gpus}", f"hydra.job.name={_job_name(assignment)}"),
        *(f"hydra.sweep.dir='{folder}'", "hydra.sweep.subdir=.", "hydra.output_subdir=null"),
        *("hydra/job_logging=none", "hydra/hydra_logging=none"),
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=overrides, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        task = functools.partial(work, assignment)
        yield Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)


class Relay:
    """Shows on standard error what workers write to their logs, each line with the number of its worker."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._shown = {path: path.stat().st_size for path in logs.glob("worker-*.log")}

    def show_while(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            self._show()
            time.sleep(LOOK_S)
        self._show()

    def _show(self) -> None:
        for path in sorted(self._logs.glob("worker-*.log")):
            with path.open("rb") as file:
                file.seek(self._shown.get(path, 0))
                text = file.read()
            text = text[: text.rfind(b"\n") + 1]
            self._shown[path] = self._shown.get(path, 0) + len(text)
            number = path.stem.rpartition("-")[2]
            for line in text.decode(errors="replace").splitlines():
                print(f"[{number}] {line}", file=sys.stderr, flush=True)
