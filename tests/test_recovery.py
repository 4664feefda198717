"""Recovery: what a remake writes, the depth cut, and that training brings a compressed model nearer to the original."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2MoeConfig

from harness import checkpoint, depth
from harness.blocks import compress
from harness.build import build, option
from harness.calibrate import calibrate, packed_batches
from harness.data import Calibration
from harness.errors import UserError
from harness.models import Model
from harness.packing import packed
from harness.plan import LayerPlan, Plan
from harness.recovery import Recovery
from harness.remake import Remaking, identity, on_disk, save
from harness.rewrite import decoded
from harness.stats import Stats
from harness.store import Store
from methods.none import NoCompression
from methods.reap import REAP
from tests.conftest import write_model
from tests.tiny_checkpoint import EXPERTS, FAMILIES, TOP_K, write_checkpoint

YAMLS = ("router", "lora", "all", "all_lm", "random_init")
KEPT = [0, 2, 3, 5, 7]


def options(name: str, **changes: Any) -> Recovery:
    """conf/recovery/<name>.yaml with these changes."""
    config = OmegaConf.create({"seed": 0, "recovery": option("recovery", name)})
    fields = dict(OmegaConf.to_container(config.recovery, resolve=True))  # type: ignore[arg-type]
    assert fields.pop("label")
    recovery: Recovery = build("recovery", fields)
    return replace(recovery, **changes)


def short(name: str, text: Calibration, **changes: Any) -> Recovery:
    return options(name, text=text, **{"batch_size": 2, "warmup": 1, **changes})


def remade(recovery: Any, model: Model, plan: Plan, work: Path) -> tuple[Model, dict[str, Any]]:
    folder = work / f"remade-{len(list(work.iterdir()))}"
    folder.mkdir()
    report = recovery.remake(Remaking(model, plan, Stats({}), 0.5, REAP(), Store(work / "store")), folder)
    assert json.loads(json.dumps(report, allow_nan=False))["tokens"] == report["tokens"]
    return Model("remade", str(folder)), report


def pruned(model: Model, kept: list[int] = KEPT) -> Plan:
    return Plan({layer: LayerPlan.prune(kept, count) for layer, count in model.experts.items()})


def absorbed(model: Model) -> Plan:
    """Merged experts, each behind one router row."""
    groups = {0: [0, 5], 2: [2, 3, 4], 6: [6], 7: [1, 7]}
    return Plan({layer: LayerPlan.absorb(groups, [1.0, 2, 3, 4, 5, 6, 7, 8]) for layer in model.experts})


def merged(model: Model) -> Plan:
    """Merged experts, copied to all their router rows."""
    clusters = [[0, 5], [1], [2, 3, 7], [4, 6]]
    return Plan({layer: LayerPlan.merge(clusters, [1.0, 2, 3, 4, 5, 6, 7, 8]) for layer in model.experts})


def exported(model: Model, plan: Plan, folder: Path) -> Model:
    folder.mkdir(parents=True)
    checkpoint.export(model, plan, folder)
    return Model("exported", str(folder))


def contents(model: Model) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (tensor.dtype, tensor.shape, tensor.read()) for name, tensor in model.tensors.items()}


def moved(before: Model, after: Model) -> set[str]:
    """Names of the tensors that differ; names, shapes and types do not."""
    old, new = contents(before), contents(after)
    assert {name: value[:2] for name, value in old.items()} == {name: value[:2] for name, value in new.items()}
    return {name for name in old if old[name] != new[name]}


def said(model: Model | PreTrainedModel) -> torch.Tensor:
    loaded = model.load("float32") if isinstance(model, Model) else model
    ids = torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return loaded(input_ids=ids, use_cache=False).logits


def with_blocks(folder: Path, family: str, blocks: int, **changes: Any) -> Model:
    """A random checkpoint of so many blocks, with the byte-level tokenizer."""
    write_checkpoint(folder, family=family)
    config = Model(family, str(folder)).load("float32").config
    if getattr(config, "layer_types", None):
        kinds = ["full_attention", "sliding_attention"] if family == "gpt_oss" else ["full_attention"]
        config.layer_types = [kinds[block % len(kinds)] for block in range(blocks)]
    for name, value in {"num_hidden_layers": blocks, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return Model(family, str(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Three blocks of 8 experts."""
    return with_blocks(tmp_path_factory.mktemp("deep"), "qwen3_moe", 3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Eight sequences of 32 tokens to learn from and four held out."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["ab", "bcd", "a", "dd", "cab"], 800)
    file.write_text("\n\n".join(" ".join(words[start : start + 10]) for start in range(0, 800, 10)))
    return Calibration("words", (str(file),), sequences=8, length=32, seed=0, held_out=4)


# What is written.


@pytest.mark.parametrize("family", [*FAMILIES, "ernie4_5_moe"])
def test_what_was_not_trained_is_written_as_the_export_writes_it_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Stored in bfloat16, trained in float32; pruned, and merged."""

    def stored_in_bfloat16(loaded: nn.Module) -> None:
        loaded.to(torch.bfloat16)

    model = Model(family, str(write_checkpoint(tmp_path / "model", stored_in_bfloat16, family)))
    for name, plan in (("pruned", pruned(model)), ("absorbed", absorbed(model))):
        student = model.load("float32")
        compress(student, plan.layers)
        (tmp_path / name).mkdir()
        save(student, model, plan, tmp_path / name)
        after, expected = Model("saved", str(tmp_path / name)), exported(model, plan, tmp_path / "export" / name)
        assert moved(expected, after) == set()
        assert {tensor.dtype for tensor in after.tensors.values()} <= {"BF16", "F32"}
        for file in expected.folder.iterdir():
            if file.suffix != ".safetensors":
                assert (after.folder / file.name).read_bytes() == file.read_bytes()


def test_trained_weights_are_read_back_as_they_were(model: Model, tmp_path: Path) -> None:
    student, plan = model.load("float32"), pruned(model)
    compress(student, plan.layers)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    save(student, model, plan, tmp_path)
    torch.testing.assert_close(said(Model("saved", str(tmp_path))), said(student), rtol=0, atol=0)


def test_a_checkpoint_of_several_files_stays_one(tmp_path: Path) -> None:
    source = write_model("qwen3_moe", tmp_path / "model", max_shard_size="60KB")
    student, plan = source.load("float32"), pruned(source)
    compress(student, plan.layers)
    (tmp_path / "out").mkdir()
    save(student, source, plan, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert moved(exported(source, plan, tmp_path / "export"), Model("saved", str(tmp_path / "out"))) == set()


def test_a_tied_output_layer_is_trained_as_one_with_the_embedding(tmp_path: Path, text: Calibration) -> None:
    source = with_blocks(tmp_path / "tied", "qwen3_moe", 2, tie_word_embeddings=True)
    assert "lm_head.weight" not in source.tensors
    after, _ = remade(short("all", text), source, pruned(source), tmp_path)
    assert "model.embed_tokens.weight" in moved(exported(source, pruned(source), tmp_path / "e"), after)
    loaded = after.load("float32")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", YAMLS)
def test_each_recovery_moves_the_weights_that_it_says(
    name: str, model: Model, text: Calibration, tmp_path: Path
) -> None:
    plan = absorbed(model)
    after, report = remade(short(name, text), model, plan, tmp_path)
    checkpoint.verify(after.folder, model)
    changed = moved(exported(model, plan, tmp_path / "export"), after)
    trained = {tensor: re.sub(r"\d+", "#", tensor).removeprefix("model.layers.#.") for tensor in after.tensors}
    routers = {tensor for tensor, short_name in trained.items() if short_name == "mlp.gate.weight"}
    experts = {tensor for tensor, short_name in trained.items() if "experts.#" in short_name}
    assert changed == {"router": routers, "lora": routers | experts}.get(name, set(after.tensors))
    assert (report["steps"], report["tokens"], report["blocks"]) == (4, 8 * 32, [0, 1, 2])
    assert report["held_out_tokens"] == 4 * 32
    assert (report["stages"][0]["active_parameters"]["teacher"] > 0) == (name != "all_lm")
    router_parameters = 3 * 4 * 64
    assert report["parameters_trained"] == {
        "router": router_parameters,
        "lora": router_parameters + 3 * 4 * options("lora").rank * (64 + 64 + 64 + 32),
    }.get(name, after.parameters)


def test_a_random_start_shares_only_the_shape_with_the_plan(model: Model, text: Calibration, tmp_path: Path) -> None:
    rate = {"learning_rate": 1e-30, "final_learning_rate": 0.0}
    text = replace(text, sequences=2)
    after, report = remade(short("random_init", text, **rate), model, pruned(model), tmp_path)
    again, _ = remade(short("random_init", text, **rate), model, pruned(model), tmp_path)
    other, _ = remade(short("random_init", text, **rate, seed=1), model, pruned(model), tmp_path)
    changed = moved(exported(model, pruned(model), tmp_path / "export"), after)
    assert changed == {name for name in after.tensors if "norm" not in name}  # which are ones in both
    assert moved(after, again) == set() and moved(after, other) == changed
    assert report["kl_before"] == report["kl_after"] > 0


@pytest.mark.parametrize("name", ["lora", "all"])
def test_the_same_seed_makes_the_same_weights_and_another_seed_others(
    name: str, model: Model, text: Calibration, tmp_path: Path
) -> None:
    plan, text = pruned(model), replace(text, sequences=4)
    torch.manual_seed(5)
    first, report = remade(short(name, text), model, plan, tmp_path)
    torch.rand(3)
    second, repeated = remade(short(name, text), model, plan, tmp_path)
    assert moved(first, second) == set()
    if name == "all":
        other, _ = remade(short(name, text, seed=1), model, plan, tmp_path)
        assert moved(first, other)
    assert {k: v for k, v in report.items() if k != "seconds"} == {k: v for k, v in repeated.items() if k != "seconds"}


# Recovery of the embedded model (Q9).


@pytest.fixture(scope="module")
def embedded() -> tuple[Model, Plan]:
    """The embedded model and REAP's plan for half of its experts."""
    model = Model("tiny", "tasks/tiny/model")
    text = options("all").text
    ids = replace(text, sequences=24, length=128, held_out=0).tokens(model)
    stats = calibrate(model.load("float32"), packed_batches(ids, 8))
    return model, Plan(REAP().plan(stats, dict.fromkeys(model.experts, 16)))


@pytest.mark.parametrize("name", ["router", "all"])
def test_a_short_training_brings_the_pruned_embedded_model_nearer_to_the_original(
    name: str, embedded: tuple[Model, Plan], tmp_path: Path
) -> None:
    text = replace(options(name).text, sequences=32, length=128, held_out=8)
    _, report = remade(options(name, text=text, batch_size=4, warmup=2), *embedded, tmp_path)
    assert report["steps"] == 8
    gained = 1 - report["kl_after"] / report["kl_before"]
    assert gained > {"router": 0.05, "all": 0.25}[name], report
    assert report["ce_teacher"] < report["ce_after"] < report["ce_before"]


# The depth cut (Q10).


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("qwen3_moe", [0, 1, 2]),
        ("qwen3_moe", [0, 2, 3]),
        ("mixtral", [1, 2, 3]),
        ("glm4_moe", [1, 2, 3]),
        ("gpt_oss", [0, 1, 2]),
        ("granitemoe", [0, 1, 3]),
    ],
)
def test_a_cut_model_is_the_original_without_those_blocks(family: str, blocks: list[int], tmp_path: Path) -> None:
    """Against the model in memory whose list of blocks is shortened."""
    source = with_blocks(tmp_path / "model", family, 4)
    cut = depth.cut(source, blocks, tmp_path / "cut")
    assert {int(found[1]) for name in cut.tensors if (found := re.search(r"layers\.(\d+)\.", name))} == {0, 1, 2}
    for name, tensor in cut.tensors.items():
        old = re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{blocks[int(found[1])]}.", name)
        assert tensor.read() == source.tensors[old].read()
    oracle = source.load("float32")
    oracle.model.layers = nn.ModuleList(oracle.model.layers[block] for block in blocks)
    if getattr(oracle.config, "layer_types", None):
        oracle.config.layer_types = [oracle.config.layer_types[block] for block in blocks]
    oracle.config.num_hidden_layers = 3
    torch.testing.assert_close(said(cut), said(oracle), rtol=0, atol=0)
    changed = {name for name in source.config if source.config[name] != cut.config[name]}
    assert changed <= {"num_hidden_layers", "layer_types", "mlp_layer_types", "first_k_dense_replace"}
    assert AutoTokenizer.from_pretrained(cut.folder).vocab_size


def test_a_cut_model_has_a_cache_of_the_same_layout_for_the_blocks_that_stay(model: Model, tmp_path: Path) -> None:
    cut = depth.cut(model, [0, 2], tmp_path / "cut")
    ids = torch.randint(1, 300, (1, 12))
    with torch.no_grad():
        caches = [loaded(input_ids=ids, use_cache=True).past_key_values for loaded in map(_loaded, (model, cut))]
        before, after = [[layer.keys.shape for layer in cache.layers] for cache in caches]
        assert after == before[:2] and len(before) == 3
        whole = _loaded(cut)(input_ids=torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1]
        stepwise = _loaded(cut)(input_ids=ids[:, :1], past_key_values=caches[1]).logits[:, -1]
    torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-5)


def _loaded(model: Model) -> PreTrainedModel:
    return model.load("float32")


def test_blocks_that_are_dense_by_a_step_stay_dense_under_other_numbers(tmp_path: Path) -> None:
    """Qwen2-MoE with experts in every second block: without block 1, those with experts have other numbers."""
    write_checkpoint(tmp_path / "model")
    config = Qwen2MoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    source = Model("stepped", str(tmp_path / "model"))
    assert sorted(source.experts) == [1, 5]
    cut = depth.cut(source, [0, 1, 3, 4, 5], tmp_path / "cut")
    assert sorted(cut.experts) == [1, 4]
    assert (cut.config["decoder_sparse_step"], cut.config["mlp_only_layers"]) == (1, [0, 2, 3])
    first = depth.cut(source, [0, 1, 2], tmp_path / "first")
    assert (first.config["decoder_sparse_step"], first.config["mlp_only_layers"]) == (2, [])
    oracle = _loaded(source)
    oracle.model.layers = nn.ModuleList(oracle.model.layers[block] for block in (0, 1, 3, 4, 5))
    oracle.config.num_hidden_layers = 5
    torch.testing.assert_close(said(cut), said(oracle), rtol=0, atol=0)


def test_the_block_that_does_nothing_has_the_least_influence(tmp_path: Path) -> None:
    """A planted block that adds nothing to the stream, and one that adds little; the rest by a loop over tokens."""

    def plant(loaded: nn.Module) -> None:
        for block, size in ((1, 0.0), (2, 0.02)):
            layer = loaded.model.layers[block]
            layer.self_attn.o_proj.weight.mul_(size)
            layer.mlp.experts.down_proj.mul_(size)

    source = with_blocks(tmp_path, "qwen3_moe", 4)
    loaded = _loaded(source)
    with torch.no_grad():
        plant(loaded)
    ids = np.random.default_rng(0).integers(1, 300, (5, 16))
    hooks = [len(block._forward_hooks) for block in loaded.model.layers]
    order = depth.by_influence(loaded, ids, 2)
    assert order[:2] == [1, 2]
    with torch.no_grad():
        assert [len(block._forward_hooks) for block in loaded.model.layers] == hooks
        hidden = loaded.model(input_ids=torch.from_numpy(ids), output_hidden_states=True).hidden_states
        cosine = [float(torch.cosine_similarity(hidden[b], hidden[b + 1], dim=-1).mean()) for b in range(3)]
    assert [block for block in order if block < 3] == sorted(range(3), key=lambda block: -cosine[block])


@pytest.mark.parametrize(("drop", "progressive"), [("last", False), ("last", True), ("influence", True)])
def test_recovery_writes_the_cut_and_compressed_model(
    drop: str, progressive: bool, model: Model, text: Calibration, tmp_path: Path
) -> None:
    """At a learning rate that moves nothing, one stage or two give the plain cut and compressed model, bit for bit."""
    still = {"learning_rate": 1e-30, "final_learning_rate": 0.0, "drop_layers": 2, "drop": drop}
    plan = pruned(model)
    after, report = remade(short("lora", text, **still, progressive=progressive), model, plan, tmp_path)
    blocks = report["blocks"]
    assert len(blocks) == 1 and (drop == "influence" or blocks == [0])
    expected = exported(depth.cut(model, blocks, tmp_path / "cut"), depth.plan_of(plan, blocks), tmp_path / "export")
    assert moved(expected, after) == set()
    assert json.loads((after.folder / "config.json").read_text())["num_hidden_layers"] == 1
    assert after.experts == {0: len(KEPT)}
    assert [stage["steps"] for stage in report["stages"]] == ([1, 3] if progressive else [4])
    assert report["tokens"] == 8 * 32


def test_progressive_training_takes_what_its_first_stage_learned_into_the_second(
    model: Model, text: Calibration, tmp_path: Path
) -> None:
    """All of the learning rate in the first of four steps: only that stage moves weights, and they arrive."""
    once = {"warmup": 0, "learning_rate": 1e-2, "final_learning_rate": 0.0, "drop_layers": 2, "progressive": True}
    recovery = short("router", text, **once, batch_size=4)  # two steps: the second's rate is 0
    after, report = remade(recovery, model, pruned(model), tmp_path)
    assert [stage["steps"] for stage in report["stages"]] == [1, 1]
    plain = exported(
        depth.cut(model, [0], tmp_path / "cut"), pruned(Model("cut", str(tmp_path / "cut"))), tmp_path / "e"
    )
    changed = moved(plain, after)
    assert changed == {"model.layers.0.mlp.gate.weight"}
    before, now = (decoded(m.tensors[min(changed)].read(), "F32") for m in (plain, after))
    assert 0.005 < (now - before).abs().max() <= 0.0101  # one step of AdamW


# Refusals.


def refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        options("all", **change)


def test_options_that_make_no_sense_are_refused_before_any_work() -> None:
    refused({"objective": "mse"}, "recovery.objective=mse is not one of kd, lm")
    refused({"parameters": "experts"}, "not one of router, lora, all")
    refused({"parameters": "lora", "rank": 0}, "recovery.rank=0")
    refused({"initial": "random", "parameters": "router"}, "starts from nothing")
    refused({"progressive": True}, "recovery.drop_layers=0 has no half")
    refused({"progressive": True, "drop_layers": 1}, "recovery.drop_layers=1 has no half")
    refused({"kd_end": 1.5}, "recovery.kd_end=1.5 is not between 0 and 1")
    refused({"epochs": 0}, "recovery.epochs=0 is below 1")
    refused({"final_learning_rate": 1.0}, "at most that")
    refused({"text": replace(options("all").text, held_out=0)}, "held out")


def test_models_and_methods_that_cannot_be_trained_are_refused_before_any_work(
    model: Model, text: Calibration, tmp_path: Path
) -> None:
    recovery = short("all", text)
    recovery.check(model, REAP())
    with pytest.raises(UserError, match="nothing to recover"):
        recovery.check(model, NoCompression())
    replace(recovery, drop_layers=1).check(model, NoCompression())
    with pytest.raises(UserError, match="drop_layers=3: the model has 3 blocks"):
        replace(recovery, drop_layers=3).check(model, REAP())
    quantised = write_model("qwen3_moe", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    with pytest.raises(UserError, match="quantised"):
        recovery.check(replace(quantised), REAP())


def test_kinds_of_blocks_that_alternate_are_cut_from_the_end_only(text: Calibration, tmp_path: Path) -> None:
    mixed = with_blocks(tmp_path, "gpt_oss", 4)
    short("all", text, drop_layers=1).check(mixed, REAP())
    with pytest.raises(UserError, match="full_attention, sliding_attention.*Set recovery.drop=last"):
        short("all", text, drop_layers=1, drop="influence").check(mixed, REAP())


def test_a_cut_must_leave_experts(text: Calibration, tmp_path: Path) -> None:
    dense_first = with_blocks(
        tmp_path, "glm4_moe", 3, first_k_dense_replace=1, mlp_layer_types=["dense"] + 2 * ["sparse"]
    )
    with pytest.raises(UserError, match="leaves none with experts"):
        short("all", text, drop_layers=2).check(dense_first, REAP())


@pytest.mark.parametrize("make", [merged])
def test_plans_whose_copies_would_drift_apart_are_trained_by_their_router_only(
    make: Callable[[Model], Plan], model: Model, text: Calibration, tmp_path: Path
) -> None:
    plan = make(model)
    for name in ("lora", "all"):
        with pytest.raises(UserError, match="more router rows than distinct experts"):
            remade(short(name, text), model, plan, tmp_path)
    after, _ = remade(short("router", text), model, plan, tmp_path)
    for layer in model.experts:
        copies = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for expert in (2, 3, 7)]
        assert len({after.tensors[name].read() for name in copies}) == 1


def test_plans_of_different_counts_are_refused(model: Model, text: Calibration, tmp_path: Path) -> None:
    plan = Plan({layer: LayerPlan.prune(range(4 + layer % 2), EXPERTS) for layer in model.experts})
    with pytest.raises(UserError, match="between 4 and 5 router rows per layer"):
        remade(short("router", text), model, plan, tmp_path)


# What names a remake.


def test_a_remake_is_named_by_its_options_and_its_text_not_by_paths(text: Calibration, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.txt"
    copy.write_bytes(Path(text.files[0]).read_bytes())
    first = identity(short("all", text))
    assert first == identity(short("all", replace(text, files=(str(copy),))))
    copy.write_text(copy.read_text() + "more")
    others = [
        short("all", replace(text, files=(str(copy),))),
        short("all", replace(text, held_out=3)),
        short("all", text, seed=1),
        short("all_lm", text),
    ]
    assert len({json.dumps(identity(recovery)) for recovery in others} | {json.dumps(first)}) == 5


def test_every_file_of_options_fits_the_embedded_model() -> None:
    model = Model("tiny", "tasks/tiny/model")
    for name in YAMLS:
        options(name).check(model, REAP())
    assert options("all_lm") == options("all", objective="lm")
    assert options("random_init").initial == "random"


def test_the_text_of_the_embedded_model_is_as_long_as_it_says(tmp_path: Path) -> None:
    ids, held = packed(options("all").text, Model("tiny", "tasks/tiny/model"), Store(tmp_path))
    assert (ids.shape, held.shape) == ((128, 256), (16, 256))


def test_weights_go_back_to_the_names_they_were_stored_by(model: Model) -> None:
    back = on_disk(model.load("float32"))
    assert set(back) == set(model.tensors)
