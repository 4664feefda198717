"""Write docs/methods.md: every method, allocation and recovery of conf/, as its docstring says it.

python -m harness.method_docs          (a test compares the file with what this makes)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from hydra.utils import get_class
from omegaconf import OmegaConf

from harness.build import CONF, build, option
from harness.models import ROOT
from harness.stats import BARRIERS, EXTRAS, MEASURES, OF_OUTPUTS, PAIRWISE, ROUTED, WEIGHTS
from methods import Method, ScoreMethod, SequentialMethod

FILE = ROOT / "docs" / "methods.md"

HEAD = """# Methods

Made by `python -m harness.method_docs` from the docstrings in `methods/`. Everywhere below, f_j(x) is expert j's output
before the gate, g_j(x) the gate that the model multiplied it with, X_j the N_j calibration tokens routed to j, and E
the number of experts. One calibration pass (`harness/stats.py`) serves all methods and ratios but `ream`, which
observes each layer behind those it has compressed already, and so anew for every ratio. `routing=paper` fills the sums
with the experts and gates that REAP's published code takes instead of the model's own.

**Reads**: *routed* sums cost nothing beyond a forward pass; *pairs* are E x E matrices of what the pass sees; *all
experts* runs every expert on every token, E / top-k times the experts' share of a forward pass; *weights* reads no
text; *barriers* measure, on the first 2,048 tokens, what merging two or three experts would change; *held-out error* is
the reconstruction error of a plan, measured on tokens that are in no sum; *search* measures whole plans on the model,
masked in place. **Nested**: the
experts kept at a higher ratio are among those kept at a lower one (merging: clusters are unions of the lower ratio's).
**Model at planning**: most plans follow from the statistics alone, in seconds on a CPU; these need the model once more.

Of experts that nothing tells apart the one with the lowest index stays. An expert that no token was routed to scores 0.
A sum that is not finite is refused.
"""


def names() -> list[str]:
    """Every method: the two baselines, those that prune by a score, and the others."""
    made = {path.stem: method(path) for path in sorted((CONF / "method").glob("*.yaml"))}
    rank = {"none": 0, "random": 1}
    return sorted(made, key=lambda name: (rank.get(name, 2 if isinstance(made[name], ScoreMethod) else 3), name))


def method(path: Path) -> Method:
    config = OmegaConf.create({"seed": 0, "method": OmegaConf.load(path)})
    fields = dict(OmegaConf.to_container(config.method, resolve=True))  # type: ignore[arg-type]
    fields.pop("label")
    made: Method = build("method", fields)
    return made


def reads(needs: frozenset[str]) -> str:
    """The kinds of statistics among a method's needs, the dearest last."""
    kinds = {
        "weights": set(WEIGHTS),
        "routed": set(EXTRAS) - set(PAIRWISE) - set(OF_OUTPUTS) | set(ROUTED),
        "pairs": set(PAIRWISE),
        "all experts": set(OF_OUTPUTS),
        "barriers": set(BARRIERS),
        "held-out error": {"reconstruction"},
        "search": {"search"},
    }
    return ", ".join(kind for kind, members in kinds.items() if needs & members) or "nothing"


def page() -> str:
    made = {name: method(CONF / "method" / f"{name}.yaml") for name in names()}
    sections = (line for name, here in made.items() for line in section(name, here))
    return "\n".join([HEAD, *overview(made), *sections, *protection(), *others("allocation"), *others("recovery")])


def overview(made: dict[str, Method]) -> Iterator[str]:
    yield "| `method=` | idea | reads | nested | model at planning |"
    yield "|:--|:--|:--|:--|:--|"
    for name, here in made.items():
        needs_model = isinstance(here, SequentialMethod) or bool(here.needs & set(MEASURES))
        idea = " ".join(inspect.cleandoc(type(here).__doc__ or "").split("\n\n")[0].split())
        nested = "yes" if here.nested else "no"
        yield f"| `{name}` | {idea} | {reads(here.needs)} | {nested} | {'yes' if needs_model else 'no'} |"
    yield ""


def section(name: str, here: Method) -> Iterator[str]:
    module = inspect.getmodule(type(here))
    yield f"## `{name}`"
    yield f"\n*{inspect.cleandoc(module.__doc__ or '')}*" if module else ""
    yield f"\n{inspect.cleandoc(type(here).__doc__ or '')}\n"
    yield f"Reads {', '.join(f'`{need}`' for need in sorted(here.needs)) or 'no statistics'}.\n"


def protection() -> Iterator[str]:
    from methods.super_experts import ProtectSuperExperts

    yield "## `protect=super_experts`"
    yield f"\n{inspect.cleandoc(ProtectSuperExperts.__doc__ or '')}\n"


INTRODUCTION = {
    "allocation": "How many experts each layer keeps, given how many the model keeps. With every method that prunes.",
    "recovery": "What makes new weights of the plan's model: training, more zeros, or slices of a sorted model.",
}


def others(group: str) -> Iterator[str]:
    """Each class of a group once, under all its files."""
    files: dict[str, list[str]] = {}
    for path in sorted((CONF / group).glob("*.yaml")):
        files.setdefault(option(group, path.stem)["_target_"], []).append(path.stem)
    yield f"# {group.capitalize()}\n\n{INTRODUCTION[group]}\n"
    for name, stems in files.items():
        yield "## " + ", ".join(f"`{group}={stem}`" for stem in stems)
        yield f"\n{inspect.cleandoc(get_class(name).__doc__ or '')}\n"


def main() -> None:
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(page())


if __name__ == "__main__":
    main()
