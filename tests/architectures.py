"""Which architectures go the whole way, from a checkpoint to the pruned one that an engine serves: found by trying.

python -m tests.architectures docs/architectures.md            # writes the table anew; some minutes
python -m tests.architectures docs/architectures.md mixtral    # only some of its rows

Every architecture is a random model of transformers' own class, a few layers of 8 experts, in float32.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from harness import checkpoint, serve
from harness.blocks import compress
from harness.calibrate import calibrate
from harness.decide import decide
from harness.errors import StageError, UserError, log_tail_of
from harness.masked import pruned
from harness.models import Model
from harness.plan import Plan
from harness.probe import probe_tokens
from harness.reference import expected
from harness.roles import TABLE, role
from harness.seam import hook_routers
from harness.served import Weights
from methods.reap import REAP
from tests.conftest import vllm
from tests.test_streaming import same, streamed
from tests.tiny_checkpoint import write_tokenizer

EXPERTS, KEPT, VOCABULARY = 8, 4, 320
# Every size that a config may have; each takes those it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "sliding_window": 64, "initializer_range": 0.15, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0,
    "num_experts": EXPERTS, "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1,
    "moe_num_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 1, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0],
    "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
}  # fmt: skip
FULL = "full_attention"
LATENT = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
}  # the one size of compressed attention that vLLM has kernels for
LINEAR = {
    "layer_types": ["linear_attention", FULL, "linear_attention"],
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
}  # fmt: skip
INDEXED = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
GEMMA = {
    "enable_moe_block": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "sliding_attention", FULL],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """An architecture. example: a released model of it, as the hub calls it. changes: to its tiny config."""

    example: str
    changes: Mapping[str, Any]


def _family(example: str, **changes: Any) -> Family:
    return Family(example, changes)


FAMILIES: dict[str, Family] = {
    "qwen3_moe": _family("Qwen/Qwen3-30B-A3B", norm_topk_prob=True),
    "qwen2_moe": _family("Qwen/Qwen1.5-MoE-A2.7B", decoder_sparse_step=1),
    "qwen3_next": _family("Qwen/Qwen3-Next-80B-A3B-Instruct", **LINEAR),
    "qwen3_5_moe_text": _family("Qwen/Qwen3.5-35B-A3B", **LINEAR),
    "qwen3_5_moe": _family("Qwen/Qwen3.5-35B-A3B", **LINEAR),
    "qwen3_vl_moe": _family("Qwen/Qwen3-VL-30B-A3B-Instruct"),
    "mixtral": _family("mistralai/Mixtral-8x7B-v0.1"),
    "deepseek_v2": _family("deepseek-ai/DeepSeek-V2-Lite", **LATENT),
    "deepseek_v3": _family("deepseek-ai/DeepSeek-V3", n_group=2, topk_method="noaux_tc", **LATENT),
    "deepseek_v32": _family("deepseek-ai/DeepSeek-V3.2-Exp", n_group=2, topk_method="noaux_tc"),
    "glm4_moe": _family("zai-org/GLM-4.5-Air", head_dim=32),
    "glm4_moe_lite": _family(
        "zai-org/GLM-4.7-Flash", first_k_dense_replace=1, topk_method="noaux_tc", **LATENT
    ),
    "glm_moe_dsa": _family("zai-org/GLM-5"),
    "glm4v_moe": _family(
        "zai-org/GLM-4.5V", head_dim=32, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3],
        },
    ),
    "gpt_oss": _family("openai/gpt-oss-20b"),
    "llama4": _family(
        "meta-llama/Llama-4-Scout-17B-16E", num_experts_per_tok=1, interleave_moe_layer_step=1,
        intermediate_size_mlp=64,
    ),
    "llama4_text": _family(
        "meta-llama/Llama-4-Scout-17B-16E", num_experts_per_tok=1, interleave_moe_layer_step=1,
        intermediate_size_mlp=64,
    ),
    "minimax": _family("MiniMaxAI/MiniMax-Text-01-hf"),
    "minimax_m2": _family("MiniMaxAI/MiniMax-M2", rotary_dim=32, scoring_func="sigmoid"),
    "ernie4_5_moe": _family("baidu/ERNIE-4.5-21B-A3B-PT", moe_layer_start_index=0),
    "olmoe": _family("allenai/OLMoE-1B-7B-0924", intermediate_size=32),
    "flex_olmo": _family("allenai/FlexOlmo-7x7B-1T", intermediate_size=32),
    "granitemoe": _family("ibm-granite/granite-3.1-3b-a800m-base", intermediate_size=32),
    "granitemoeshared": _family(
        "ibm-research/moe-7b-1b-active-shared-experts", intermediate_size=32, shared_intermediate_size=32
    ),
    "granitemoehybrid": _family(
        "ibm-granite/granite-4.0-h-tiny", intermediate_size=32, shared_intermediate_size=32,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=4, mamba_d_state=16, mamba_d_head=32,
    ),
    "phimoe": _family("microsoft/Phi-3.5-MoE-instruct", intermediate_size=32),
    "dots1": _family("rednote-hilab/dots.llm1.base"),
    "hunyuan_v1_moe": _family("tencent/Hunyuan-A13B-Instruct"),
    "nemotron_h": _family("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
    "jamba": _family(
        "ai21labs/Jamba-v0.1", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
        expert_layer_period=1, expert_layer_offset=0, use_mamba_kernels=False,
    ),
    "afmoe": _family("arcee-ai/Trinity-Mini", score_func="sigmoid", route_norm=True),
    "mimo_v2_flash": _family(
        "XiaomiMiMo/MiMo-V2-Flash", num_attention_heads=4, hybrid_layer_pattern=[0, 1, 1], layernorm_epsilon=1e-6
    ),
    "exaone_moe": _family("LGAI-EXAONE/K-EXAONE-236B-A23B"),
    "lfm2_moe": _family("LiquidAI/LFM2-8B-A1B", num_dense_layers=1, layer_types=["conv", FULL, FULL]),
    "kimi_linear": _family(
        "moonshotai/Kimi-Linear-48B-A3B-Instruct", linear_head_dim=32, linear_num_heads=2, q_lora_rank=None,
        layer_types=["linear_attention", FULL, "linear_attention"], mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "cohere2_moe": _family("CohereLabs/command-a-plus-05-2026"),
    "solar_open": _family("upstage/Solar-Open-100B"),
    "laguna": _family("poolside/laguna-XS.2"),
    "hy_v3": _family("tencent/Hy3-preview", first_k_dense_replace=1),
    "axk1": _family("skt/A.X-K1", **LATENT),
    "mellum": _family("JetBrains/Mellum2-12B-A2.5B-Base"),
    "gemma4": _family("google/gemma-4-26B-A4B-it", **GEMMA),
    "gemma4_text": _family("google/gemma-4-26B-A4B-it", **GEMMA),
    "mistral4": _family(
        "mistralai/Mistral-Small-4-119B-2603", kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, head_dim=128
    ),
    "deepseek_v4": _family("deepseek-ai/DeepSeek-V4-Flash-Base", mlp_layer_types=["moe"] * 3),
    "glm5_next": _family(
        "zai-org/GLM-5.3-Flash", qk_rope_head_dim=0, head_dim=0, linear_head_dim=32, linear_num_heads=2, index_topk=64,
        index_n_heads=2, index_head_dim=32, index_kpool=4, mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["linear_attention", "indexed_attention", "linear_attention"],
    ),
    "minimax_m3_vl": _family("MiniMaxAI/MiniMax-M3"),
    "qwen4_exp": _family("Qwen/Qwen4-Exp", **INDEXED, **LINEAR),
    "qwen4_exp_text": _family("Qwen/Qwen4-Exp", **INDEXED, **LINEAR),
    "hy_v4": _family("tencent/Hy4-preview"),
    "axk2": _family("skt/A.X-K2", **LATENT),
    "granitemoe_swa": _family("ibm-granite/granite-swash-3b-a600m", intermediate_size=32),
    "aria_text": _family("rhymes-ai/Aria"),
}  # fmt: skip

# Those that are not, and the words of the refusal.
REFUSED: dict[str, tuple[Family, str]] = {
    "inkling_text": (_family("thinkingmachines/Inkling"), "not one row for each of the 8 experts"),
    "zaya": (_family("Zyphra/ZAYA1-8B", num_experts_per_tok=1), "there is no router tensor"),
}


def tiny_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """The architecture's config with tiny sizes; of one that also sees, of both parts. changes: further fields."""
    usual = CONFIG_MAPPING[kind]()
    family = FAMILIES[kind] if kind in FAMILIES else REFUSED[kind][0]
    changes = {**family.changes, **changes}
    if "text_config" not in usual.sub_configs:
        return CONFIG_MAPPING[kind](**{**_known(usual, SIZES), **changes})
    text = {**_known(usual.get_text_config(), SIZES), **changes}
    seeing = usual.vision_config and _known(usual.vision_config, VISION)
    return CONFIG_MAPPING[kind](text_config=text, vision_config=seeing)


def _known(config: PreTrainedConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    names = {*vars(config), *(getattr(config, "attribute_map", None) or {})}
    return {name: value for name, value in sizes.items() if name in names}


def write_model(kind: str, folder: Path, **changes: Any) -> Model:
    """A random one on disk, whose greedy answers vary; with these fields of its config changed."""
    torch.manual_seed(0)
    config = tiny_config(kind, **changes)
    is_text = "text_config" not in config.sub_configs and type(config) in AutoModelForCausalLM._model_mapping
    group = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    model = group.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.2)
            elif name.endswith(TABLE):
                buffer.copy_(torch.rand(len(buffer), EXPERTS).argsort(dim=1)[:, : buffer.shape[1]])
    folder.mkdir()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return Model(kind, str(folder))


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two of [2, 24] random bytes."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 257, (2, 24), generator=generator) for _ in range(2)]
    return [(one, torch.ones_like(one)) for one in ids]


class Trial:
    """The steps of one architecture, each on what the one before it made."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.model = write_model(kind, folder / "model")

    @property
    def stored(self) -> str:
        """How the checkpoint holds experts."""
        kinds = {role(name, tensor.shape, self.model.experts).kind for name, tensor in self.model.tensors.items()}
        return "one by one" if "expert" in kinds else "fused"

    def calibrate(self) -> None:
        """Statistics with the whole model in memory, of every router and all experts."""
        self.check_routers()
        extras = frozenset({"logit_gram", "coactivation", "all_output_sum"})
        self.whole = calibrate(self.model.load("auto"), batches(), extras)
        assert self.whole.layers.keys() == self.model.experts.keys(), "every MoE layer"
        self.whole.check_finite()
        assert all(layer["count"].sum() == layer.tokens * self.model.top_k for layer in self.whole.layers.values())

    @torch.no_grad()
    def check_routers(self) -> None:
        """What is taken for a router's raw logits is its matrix times its input, plus a bias where it has one."""
        model, seen = self.model.load("auto"), []

        def note(router: nn.Module, logits: Tensor) -> None:
            seen.append((router, logits))

        inputs: dict[nn.Module, Tensor] = {}
        hooks = list(hook_routers(model, note, "this test needs."))
        for module in model.modules():
            hooks.append(
                module.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]}) if args else None)
            )
        model(input_ids=batches()[0][0], use_cache=False)
        for hook in hooks:
            hook.remove()
        assert len(seen) == len(self.model.experts)
        for router, logits in seen:
            weight = next(p for p in router.parameters() if p.shape == (EXPERTS, SIZES["hidden_size"]))
            raw = inputs[router].reshape(-1, weight.shape[1]).float() @ weight.float().T
            biases = [p for n, p in router.named_parameters() if n.endswith("bias") and p.shape == (EXPERTS,)]
            assert any(torch.allclose(logits.float(), raw + bias, atol=1e-3) for bias in (0, *biases))

    def stream(self) -> None:
        """The same layer by layer, to the last bit."""
        extras = self.whole.names & {"logit_gram", "coactivation", "all_output_sum"}
        assert same(self.whole, streamed(self.model, self.folder, extras, 0, batches=batches()))

    def plan(self) -> None:
        """Half of the experts pruned by REAP."""
        keep = dict.fromkeys(self.model.experts, KEPT)
        self.plan_ = Plan(decide(REAP(), self.whole, keep))
        self.plan_.validate(self.model.experts, self.model.top_k)

    def export(self) -> None:
        """Written, and checked as every export is."""
        out = self.folder / "pruned"
        out.mkdir()
        checkpoint.export(self.model, self.plan_, out)
        checkpoint.verify(out, self.model)
        self.pruned = Model("pruned", str(out))

    def reload(self) -> None:
        """transformers reads it, and its logits are those of the plan in memory and of the masked original."""
        reloaded = self.logits(self.pruned.load("auto"))
        original = self.model.load("auto")
        if not self.kind.startswith("llama4"):  # its experts are masked by no one
            rows = {layer: plan.kept_rows for layer, plan in self.plan_.layers.items()}
            with pruned(original, rows):
                torch.testing.assert_close(reloaded, self.logits(original), rtol=1e-4, atol=1e-4)
        compress(original, self.plan_.layers)
        assert torch.equal(reloaded, self.logits(original))

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        return model(input_ids=batches()[0][0], use_cache=False).logits

    def serve(self) -> str:
        """What vLLM's CPU build makes of the exported checkpoint; if it differs, of the original too."""
        found = self._served(self.pruned)
        return f"{found}; unpruned, {self._served(self.model)}" if found.startswith("differs") else found

    def _served(self, model: Model) -> str:
        known = expected(model.load("auto"), Plan({}), probe_tokens(str(model.folder)))
        weights = Weights(model.folder, expected=known)
        found = ""
        for dtype, name in (("float32", "equal"), ("bfloat16", "equal in 16 bits")):
            try:
                engine = vllm(dtype=dtype, max_model_len=256, how="checkpoint")
                with engine.serve(weights, "tiny", self.folder / "log"):
                    return name
            except (StageError, UserError) as error:
                apart = re.search(r"log-probabilities of a known text are ([\d.]+) nats", str(error))
                found = f"differs by {apart[1]} nats" if apart else f"no: {reason(error)}"
            finally:
                serve.release()
        return found


STEPS = ("calibrate", "stream", "plan", "export", "reload")


def reason(error: Exception) -> str:
    """The last words of an engine's log that say what went wrong, or the error's own."""
    text = f"{log_tail_of(error) or ''}\n{error}"
    found = [words for words in re.findall(r"((?:\w+Error|Exception): [^\n]{4,})", text) if "Engine core" not in words]
    return re.sub(r"\s+", " ", found[-1] if found else str(error)).partition(". So ")[0][:100].strip().replace("|", "/")


def row(kind: str, with_engine: bool) -> dict[str, str]:
    """The table's row. A step that fails ends it."""
    found = {"architecture": kind, "a model of it": FAMILIES[kind].example}
    with tempfile.TemporaryDirectory(prefix="arch-", dir="/tmp") as folder:
        trial = Trial(kind, Path(folder))
        found["experts in files"] = trial.stored
        for step in STEPS:
            getattr(trial, step)()
            found[step] = "yes"
        if with_engine:
            found["vLLM CPU"] = trial.serve()
    return found


MARK, END = "<!-- table: python -m tests.architectures docs/architectures.md -->", "<!-- end of table -->"


def table(text: str) -> dict[str, dict[str, str]]:
    """The rows of the table in a document, by architecture."""
    lines = text.partition(MARK)[2].partition(END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cell[0]: dict(zip(cells[0], cell, strict=True)) for cell in cells[2:]}


def write_table(file: Path, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Put these rows into the document, in the order of `FAMILIES`."""
    head, _, rest = file.read_text().partition(MARK)
    frame = pd.DataFrame([rows[kind] for kind in FAMILIES if kind in rows])
    made = frame.to_markdown(index=False, disable_numparse=True)
    file.write_text(f"{head}{MARK}\n{made}\n{END}{rest.partition(END)[2]}")


def main(arguments: Sequence[str]) -> None:
    file, kinds = Path(arguments[0]), arguments[1:] or [*FAMILIES]
    rows = table(file.read_text())
    for kind in kinds:
        rows[kind] = row(kind, with_engine=True)
        print(" | ".join(rows[kind].values()), flush=True)
        write_table(file, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
