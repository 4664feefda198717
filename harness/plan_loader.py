"""vLLM load format ``plan``: a model under a plan, streamed straight from the original checkpoint.

    python -m vllm.entrypoints.openai.api_server --model <original> --load-format plan \\
        --model-loader-extra-config '{"plan": "<plan.json>"}'

vLLM finds it through the entry point ``vllm.general_plugins`` (pyproject.toml). No checkpoint is written, every layer
has the expert count that the plan gives it, and each distinct expert is stored once: a merged layer keeps its router
rows, and the experts that its router chooses are mapped to the slots they were merged into.

It knows no architecture. While vLLM builds a decoder layer, the config says that layer's counts; after loading, the
routers of merged layers get their map.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.layers.fused_moe import layer as fused_moe
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import get_model_architecture
from vllm.model_executor.models.utils import make_layers

from harness import plan as plans
from harness.errors import UserError
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.rewrite import Layout, Rewrite
from harness.roles import EXPERT_COUNT, layer_index, width_field

TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    "BOOL": torch.bool,
}


def register() -> None:
    """What vLLM calls in each of its processes."""
    register_model_loader("plan")(PlanLoader)


class PlanLoader(DefaultModelLoader):
    """Builds and fills a model by the plan that ``model_loader_extra_config["plan"]`` names; as it is, without one.

    ``model_loader_extra_config["folder"]``: a checkpoint made from the model, which takes its place: experts may be
    fewer or narrower there, and nothing else may have another shape.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(dataclasses.replace(load_config, model_loader_extra_config={}))
        self.file = load_config.model_loader_extra_config.get("plan")
        self.folder = load_config.model_loader_extra_config.get("folder")
        self.plan: Plan

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Raises UserError if the plan is another model's or this build of vLLM cannot map merged experts."""
        source = self._source(model_config)
        self.plan = Plan.identity(source.experts)
        if self.file is not None:
            self.plan = plans.from_json(Path(self.file).read_text())
        self.plan.validate(source.experts, source.top_k)
        if (field := width_field(source.config)) is not None:
            setattr(model_config.hf_text_config, field, source.config[field])
        with _counts_while_building(model_config, self.plan):
            model = super().load_model(vllm_config, model_config, prefix)
        for layer, runner in moe_layers(model).items():
            _map_rows_to_slots(runner, self.plan.layers[layer])
        return model

    def _source(self, model_config: ModelConfig) -> Model:
        return Model("original", self.folder or model_config.model)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors as the plan leaves them, in the order of the original files."""
        layouts = {index: Layout.slots(layer) for index, layer in self.plan.layers.items()}
        rewrite = Rewrite(self._source(model_config), self.plan, layouts)
        for jobs in rewrite.files.values():
            for job, data in zip(jobs, rewrite.contents(jobs), strict=True):
                kind = TYPES[job.entry.dtype]
                values = torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)
                yield job.entry.name, values.reshape(job.entry.shape)


def moe_layers(model: nn.Module) -> dict[int, MoERunner]:
    """vLLM's MoE modules by the index of their decoder layer."""
    return {layer_index(name): module for name, module in model.named_modules() if isinstance(module, MoERunner)}


@contextmanager
def _counts_while_building(model_config: ModelConfig, plan: Plan) -> Iterator[None]:
    """While a decoder layer is built, its counts: router rows in the config, stored experts where vLLM makes the MoE
    module. Everywhere else the config has the largest number of rows, so that the names of all experts are expected.
    """
    config = model_config.hf_text_config
    aliases = [alias for alias in EXPERT_COUNT if hasattr(config, alias)]
    rows, slots = plan.written_experts(), plan.distinct_experts()
    building: list[int] = []
    built: set[int] = set()

    def set_count(count: int) -> None:
        for alias in aliases:
            setattr(config, alias, count)

    def layer_by_layer(number: int, layer_fn: Callable[..., nn.Module], prefix: str) -> Any:
        def one(prefix: str) -> nn.Module:
            layer = layer_index(prefix)
            building[:] = [layer]
            built.add(layer)
            set_count(rows.get(layer, most))
            try:
                return layer_fn(prefix=prefix)
            finally:
                building.clear()
                set_count(most)

        return make_layers(number, one, prefix)

    counts = fused_moe.determine_expert_counts

    def stored(num_experts: int, *arguments: Any) -> tuple[int, int, int]:
        return counts(slots.get(building[0], num_experts) if building else num_experts, *arguments)

    most = max(rows.values(), default=0)
    set_count(most)
    get_model_architecture(model_config)  # imports the module of the model's class
    with ExitStack() as patches:
        patches.enter_context(patch.object(fused_moe, "determine_expert_counts", stored))
        for name, module in list(sys.modules.items()):
            if name.startswith("vllm.model_executor.models.") and vars(module).get("make_layers") is make_layers:
                patches.enter_context(patch.object(module, "make_layers", layer_by_layer))
        yield
    if not built and not plan.is_identity:
        raise UserError("vLLM builds this architecture's layers in a way of its own. Use serve=checkpoint.")


def _map_rows_to_slots(runner: MoERunner, plan: LayerPlan) -> None:
    """Let the router choose among its rows as ever, and send what it chose to the rows' slots. Two rows of one slot
    that a token chooses both are two entries of one expert, whose gates add up.
    """
    slots = [plan.routes[row] for row in plan.kept_rows]
    if slots == list(range(len(plan.slots))):
        return
    if runner.is_monolithic:
        raise UserError(
            "This build of vLLM routes inside its MoE kernel here, where merged experts cannot be mapped to their "
            "slots. Use serve=checkpoint, which stores a copy for each router row."
        )
    device = next(runner.parameters()).device
    slot_of = torch.tensor(slots, dtype=torch.int64, device=device)
    router: Any = runner.router
    choose = router._apply_eplb_mapping  # the last step of every router: from chosen ids to stored ones

    def mapped(ids: torch.Tensor) -> torch.Tensor:
        return slot_of[choose(ids).long()].to(ids.dtype)

    router._apply_eplb_mapping = mapped
