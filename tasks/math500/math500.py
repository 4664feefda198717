"""MATH-500: the worked examples and the judge of lm-eval's minerva_math500, in an environment that it refuses.

lm-eval's own module insists on antlr4 4.11 and Hydra needs 4.9, so it cannot be imported here. Its metric
``exact_match`` needs that version too and is left out; ``math_verify`` is the same call of the library of that name.
"""

import ast
from typing import Any

from math_verify import parse, verify

from tasks.lm_task import stock_folder


def worked_examples() -> list[dict[str, str]]:
    """The four examples of lm-eval's file, read from its source: problem, solution and the mark ``few_shot``."""
    source = stock_folder() / "minerva_math" / "utils.py"
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            (statement,) = node.body
            assert isinstance(statement, ast.Return) and statement.value is not None
            return list(ast.literal_eval(statement.value))
    raise LookupError(f"{source} no longer has the worked examples")


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Whether the last formula of the answer equals that of the reference solution."""
    return {"math_verify": int(verify(gold=parse(doc["solution"]), target=parse(results[0])))}
