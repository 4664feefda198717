"""What a vLLM worker can do beyond vLLM's own (``--worker-extension-cls harness.plan_worker.PlanWorker``).

``swap_plan`` makes the running engine another plan's, ``mask_plan`` closes the experts that a pruning plan drops,
``weight_bytes`` says what the weights take, ``expert_counts`` which experts are there. The harness calls them by
``POST /collective_rpc``, which vLLM offers on VLLM_SERVER_DEV_MODE=1; requests must not be in flight, and the prefix
cache must be reset afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config

from harness import plan as plans
from harness.errors import UserError
from harness.plan import LayerPlan
from harness.plan_loader import moe_layers
from harness.rewrite import CLOSED
from harness.served_experts import count_experts

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker
else:
    Worker = object


class PlanWorker(Worker):
    """Mixed into vLLM's worker class. Arguments and results are what JSON can carry."""

    def swap_plan(self, file: str, folder: str = "") -> None:
        """Rebuild the model by the plan in ``file`` (if that is empty, as the folder has it), or from the checkpoint in
        ``folder``, and keep everything else: cache memory, scheduler, connections.

        vLLM's own ``reload_weights`` is no way to do this: it keeps the expert count, and on CPUs its numbers are off.
        """
        compilation = self.vllm_config.compilation_config
        layers = compilation.static_forward_context
        attention = {name: layer for name, layer in layers.items() if hasattr(layer, "kv_cache")}
        layers.clear()
        compilation.static_all_moe_layers.clear()
        for holder in ("model", "_moe_model"):  # both models need not fit at once
            if hasattr(self.model_runner, holder):
                setattr(self.model_runner, holder, None)
        gc.collect()
        self.vllm_config.load_config.load_format = "plan"
        asked = {"plan": file, "folder": folder}
        self.vllm_config.load_config.model_loader_extra_config = {name: value for name, value in asked.items() if value}
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.load_model()
        assert {name for name, layer in layers.items() if hasattr(layer, "kv_cache")} == set(attention)
        for name, old in attention.items():
            _take_over(layers[name], old)

    def mask_plan(self, file: str) -> None:
        """Let routers choose only what the plan keeps; the weights stay. For plans that prune alone."""
        plan = plans.from_json(Path(file).read_text())
        if any(runner.is_monolithic for runner in moe_layers(self.model_runner.get_model()).values()):
            raise UserError("This build of vLLM routes inside its MoE kernel here, where no expert can be barred.")
        for layer, runner in moe_layers(self.model_runner.get_model()).items():
            _close(runner.router, plan.layers[layer], next(runner.parameters()).device)

    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers of this worker's share of the model, each storage counted once."""
        model = self.model_runner.get_model()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in [*model.parameters(), *model.buffers()]
        }
        return sum(storages.values())

    def expert_counts(self) -> dict[str, dict[str, Any]]:
        """Of each MoE layer that this worker holds: how many experts, router rows, and rows barred by a mask, from the
        tensors themselves (`harness.served_experts`).
        """
        model = self.model_runner.get_model()
        return {str(layer): count_experts(model, layer, runner) for layer, runner in moe_layers(model).items()}


def _take_over(new: Any, old: Any) -> None:
    """Give an attention layer its predecessor's cache, and what that was given after it was built."""
    new.kv_cache = old.kv_cache
    for name, value in vars(old).items():
        if name not in vars(new):
            setattr(new, name, value)
    for name, value in vars(old.impl).items():
        if name not in vars(new.impl):
            setattr(new.impl, name, value)


def _close(router: Any, plan: LayerPlan, device: torch.device) -> None:
    """Bar the router from dropped experts: by its logits, before any softmax, and by its correction bias if it has one
    (a sigmoid of minus infinity plus a bias could still win). Both are tensors changed in place.
    """
    if not hasattr(router, "closed"):
        _prepare(router, len(plan.routes), device)
    dropped = torch.tensor([route is None for route in plan.routes], device=device)
    router.closed.zero_().masked_fill_(dropped, float("-inf"))
    if router.open_bias is not None:
        router.e_score_correction_bias.copy_(router.open_bias).masked_fill_(dropped, CLOSED)


def _prepare(router: Any, experts: int, device: torch.device) -> None:
    """Give the router a mask that closes nothing yet."""
    router.closed = torch.zeros(experts, device=device)
    bias = getattr(router, "e_score_correction_bias", None)
    router.open_bias = None if bias is None else bias.detach()
    if bias is not None:
        router.e_score_correction_bias = bias.detach().clone()
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]] = router._compute_routing

    def masked(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return compute(hidden_states, router_logits + router.closed.to(router_logits.dtype), *args, **kwargs)

    router._compute_routing = masked
