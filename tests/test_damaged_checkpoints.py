"""Damaged checkpoints are refused before anyone serves them, with the file and the tensor in one message.

vLLM loads most of these without a word. Each kind of damage is planted in a checkpoint that was whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import checkpoint, inventory, tensors
from harness.errors import StageError, UserError
from harness.models import ROOT, Model
from harness.plan import LayerPlan, Plan
from harness.streaming import open_streamed
from harness.tokenizer import tokenizer_of
from tests.conftest import EXPERTS, write_model
from tests.test_streaming import streamed

KEPT = 5
WEIGHTS = "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"
ROUTER = "model.layers.2.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """8 experts behind routers with a float32 bias, everything else in bfloat16, as such models are published."""
    made = write_model("glm4_moe", tmp_path_factory.mktemp("glm"))
    values = load_file(made.folder / WEIGHTS)
    stored = {name: value if name.endswith("_bias") else value.bfloat16() for name, value in values.items()}
    save_file(stored, made.folder / WEIGHTS, metadata={"format": "pt"})
    (made.folder / "tokenizer.json").write_text("{}")
    return Model("glm", str(made.folder))


@pytest.fixture(scope="module")
def whole(glm: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export with 5 experts, finished and verified."""
    folder = tmp_path_factory.mktemp("whole")
    plan = Plan({layer: LayerPlan.prune(range(KEPT), EXPERTS) for layer in glm.experts})
    checkpoint.export(glm, plan, folder)
    checkpoint.verify(folder, glm)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage, with its checksums."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    values = load_file(folder / WEIGHTS)
    change(values)
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})


def patch_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def flip_a_byte(folder: Path, name: str) -> None:
    """In the middle of a tensor, the lowest bit of a mantissa: the value stays finite and close."""
    tensor = tensors.read_header(folder / WEIGHTS)[name]
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(tensor.start + tensor.nbytes // 4 * 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def cut_short(folder: Path) -> None:
    file = folder / WEIGHTS
    os.truncate(file, file.stat().st_size - 100)


def last_tensor(folder: Path) -> str:
    return next(reversed(tensors.read_header(folder / WEIGHTS)))


def lose_expert(folder: Path) -> None:
    edit(folder, lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.experts.4." in name])


def lose_last_experts_of_all_layers(folder: Path) -> None:
    edit(folder, lambda t: [t.pop(name) for name in list(t) if ".mlp.experts.4." in name])


def lose_all_experts_of_a_layer(folder: Path) -> None:
    edit(folder, lambda t: [t.pop(name) for name in list(t) if "layers.2.mlp.experts." in name])


def keep_an_expert_too_many(folder: Path) -> None:
    part = EXPERT.format(4, "up")
    edit(folder, lambda t: t.update({part.replace("experts.4", "experts.5"): t[part].clone()}))


def skip_a_number(folder: Path) -> None:
    edit(folder, lambda t: t.update({n.replace("experts.4.", "experts.9."): t.pop(n) for n in list(t)}))


def lose_a_part(folder: Path) -> None:
    edit(folder, lambda t: t.pop(EXPERT.format(2, "up")))


def change_a_shape(folder: Path) -> None:
    name = EXPERT.format(2, "up")
    edit(folder, lambda t: t.update({name: t[name][:3].clone()}))


def lengthen_a_router(folder: Path) -> None:
    edit(folder, lambda t: t.update({ROUTER: torch.cat([t[ROUTER], t[ROUTER][:1]])}))


def lengthen_a_bias(folder: Path) -> None:
    edit(folder, lambda t: t.update({BIAS: torch.cat([t[BIAS], t[BIAS][:1]])}))


def cast_a_bias(folder: Path) -> None:
    edit(folder, lambda t: t.update({BIAS: t[BIAS].bfloat16()}))


def cast_an_expert(folder: Path) -> None:
    name = EXPERT.format(2, "down")
    edit(folder, lambda t: t.update({name: t[name].float()}))


def cast_a_norm(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}))


def spoil_a_router(folder: Path) -> None:
    edit(folder, lambda t: t[ROUTER].view(-1)[7:8].fill_(float("nan")))


def spoil_an_expert(folder: Path) -> None:
    edit(folder, lambda t: t[EXPERT.format(3, "down")].view(-1)[5:6].fill_(float("-inf")))


def lose_a_norm(folder: Path) -> None:
    edit(folder, lambda t: t.pop("model.norm.weight"))


def lose_a_router(folder: Path) -> None:
    edit(folder, lambda t: [t.pop(name) for name in (ROUTER, ROUTER.replace("weight", "e_score_correction_bias"))])


def write_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04pickle")


def add_a_tensor(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.extra.weight": torch.zeros(3)}))


def count_in_config(folder: Path) -> None:
    patch_config(folder, n_routed_experts=6)


def two_counts_in_config(folder: Path) -> None:
    patch_config(folder, num_experts=8)


def two_counts_at_two_levels(folder: Path) -> None:
    patch_config(folder, text_config={"n_routed_experts": 8})


STRUCTURE = {  # damage, and what the message must name besides the file
    cut_short: "last tensor",
    lose_expert: EXPERT.format(4, ".*"),
    lose_last_experts_of_all_layers: EXPERT.format(4, ".*"),
    lose_all_experts_of_a_layer: r"layers \[1\], not in \[1, 2\]",
    keep_an_expert_too_many: EXPERT.format(5, "up"),
    skip_a_number: EXPERT.format(4, ".*"),
    lose_a_part: EXPERT.format(2, "up"),
    change_a_shape: EXPERT.format(2, "up"),
    lengthen_a_router: ROUTER,
    lengthen_a_bias: BIAS,
    cast_a_bias: f"{BIAS} is stored as BF16, the original's as F32",
    cast_an_expert: f"{EXPERT.format(2, 'down')} is stored as F32, the original's as BF16",
    cast_a_norm: "model.norm.weight is stored as F16, the original's as BF16",
    spoil_a_router: f"{ROUTER} holds values that are not finite",
    spoil_an_expert: f"{EXPERT.format(3, 'down')} holds values that are not finite",
    lose_a_norm: "model.norm.weight",
    lose_a_router: "layer 2: there is no router tensor",
    write_a_pickle: "not a readable safetensors file",
    add_a_tensor: "model.extra.weight",
    count_in_config: EXPERT.format(5, ".*"),
    two_counts_in_config: "num_experts=8, n_routed_experts=5",
    two_counts_at_two_levels: "n_routed_experts=5, n_routed_experts=8",
}


@pytest.mark.parametrize("damage", STRUCTURE, ids=lambda damage: damage.__name__)
def test_damage_is_found_without_checksums_and_named(copy: Path, glm: Model, damage: Callable[[Path], None]) -> None:
    (copy / tensors.CHECKSUMS).unlink()
    damage(copy)
    with pytest.raises(UserError, match=STRUCTURE[damage]) as refused:
        checkpoint.verify(copy, glm)
    message = str(refused.value)
    in_config = damage in (two_counts_in_config, two_counts_at_two_levels)
    in_folder = damage in (lose_all_experts_of_a_layer, lose_a_router)
    assert ("config.json" if in_config else str(copy) if in_folder else str(copy / WEIGHTS)) in message
    assert "\n" not in message and not (copy / tensors.CHECKSUMS).exists(), "what is damaged gets no checksums"


@pytest.mark.parametrize("damage", STRUCTURE, ids=lambda damage: damage.__name__)
def test_a_kept_checkpoint_that_was_damaged_since_is_refused(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy)
    with pytest.raises(UserError, match="config.json|model.safetensors"):
        inventory.check_unchanged(copy)


@pytest.mark.parametrize("name", [EXPERT.format(2, "gate"), ROUTER, BIAS, "lm_head.weight"])
def test_one_flipped_bit_is_found_by_the_checksum_alone_and_its_tensor_named(copy: Path, glm: Model, name: str) -> None:
    flip_a_byte(copy, name)
    for refuse in (lambda: checkpoint.verify(copy, glm), lambda: inventory.check_unchanged(copy)):
        with pytest.raises(UserError) as refused:
            refuse()
        assert str(copy / WEIGHTS) in str(refused.value) and f"(tensor {name})" in str(refused.value)
    with pytest.raises(UserError, match="SHA-256"):
        _ = Model("reused", str(copy)).digest
    (copy / tensors.CHECKSUMS).unlink()
    checkpoint.verify(copy, glm)  # nothing else can tell


def test_a_flipped_byte_in_the_header_or_the_config_is_found(copy: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content.replace(b'"format":"pt"', b'"format":"np"', 1))
    with pytest.raises(UserError, match="in its header"):
        inventory.check_unchanged(copy)
    (copy / WEIGHTS).write_bytes(content)
    inventory.check_unchanged(copy)
    patch_config(copy, rope_theta=123.0)
    with pytest.raises(UserError, match="config.json is damaged or was changed"):
        inventory.check_unchanged(copy)


def test_a_file_that_was_lost_or_came_since_is_found(copy: Path) -> None:
    (copy / "tokenizer.json").rename(copy / "elsewhere")
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        inventory.check_unchanged(copy)
    (copy / "elsewhere").rename(copy / "tokenizer.json")
    save_file({"model.norm.weight": torch.ones(3)}, copy / "model-00002.safetensors")
    with pytest.raises(UserError, match="model-00002.safetensors is left over"):
        inventory.check_unchanged(copy)


def test_a_checkpoint_without_checksums_was_not_finished(copy: Path) -> None:
    (copy / tensors.CHECKSUMS).unlink()
    with pytest.raises(UserError, match="was not finished"):
        inventory.check_unchanged(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 3}', "[" * 100_000])
def test_unreadable_checksums_are_refused(copy: Path, text: str) -> None:
    (copy / tensors.CHECKSUMS).write_text(text)
    with pytest.raises(UserError, match="not readable"):
        inventory.check_unchanged(copy)


def test_checksums_are_those_of_sha256sum(whole: Path) -> None:
    noted = json.loads((whole / tensors.CHECKSUMS).read_text())["sha256"]
    assert set(noted) == {WEIGHTS, "config.json", "generation_config.json", "tokenizer.json"}
    lines = "".join(f"{value}  {name}\n" for name, value in noted.items())
    subprocess.run(["sha256sum", "--check", "--strict"], input=lines, text=True, cwd=whole, check=True)


def test_an_export_of_an_export_gets_checksums_of_its_own(whole: Path, tmp_path: Path) -> None:
    source, out = Model("whole", str(whole)), tmp_path / "out"
    out.mkdir()
    plan = Plan({layer: LayerPlan.prune(range(KEPT - 1), KEPT) for layer in source.experts})
    checkpoint.export(source, plan, out)
    assert not (out / tensors.CHECKSUMS).exists()
    checkpoint.verify(out, source)
    inventory.check_unchanged(out)


@pytest.mark.parametrize(
    "dtype, kind",
    [
        *(("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)),
        *(("F8_E5M2", torch.float8_e5m2), ("F8_E4M3", torch.float8_e4m3fn), ("F8_E8M0", torch.float8_e8m0fnu)),
    ],
)
def test_finite_is_what_torch_calls_finite_for_every_pattern_of_bits(dtype: str, kind: torch.dtype) -> None:
    size = kind.itemsize
    patterns = torch.arange(256 ** min(size, 2), dtype=torch.int64)
    data = patterns.numpy().astype(f"<u{min(size, 2)}").tobytes()
    if size > 2:  # the upper 16 bits of each value, all their patterns; the lower ones zero, then one
        for low in (b"\0" * (size - 2), b"\1" + b"\0" * (size - 3)):
            values = [low + data[i : i + 2] for i in range(0, len(data), 2)]
            _compare(values, dtype, kind)
        return
    _compare([data[i : i + size] for i in range(0, len(data), size)], dtype, kind)


def _compare(values: list[bytes], dtype: str, kind: torch.dtype) -> None:
    finite = torch.frombuffer(bytearray(b"".join(values)), dtype=kind).double().isfinite().tolist()
    assert not all(finite)
    assert inventory.is_finite(b"".join(value for value, is_so in zip(values, finite, strict=True) if is_so), dtype)
    broken = [value for value, is_so in zip(values, finite, strict=True) if not is_so]
    assert not any(inventory.is_finite(value, dtype) for value in broken)


# The original: there is nothing to compare it with but itself, and what the hub's cache is called by.


def test_an_original_that_is_not_finite_is_refused_before_any_work(glm: Model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(glm.folder, tmp_path / "nan"))
    spoil_an_expert(folder)
    with pytest.raises(UserError, match=f"{EXPERT.format(3, 'down')} holds values that are not finite"):
        _ = Model("nan", str(folder)).digest


def test_an_original_without_all_experts_of_a_layer_is_refused(glm: Model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(glm.folder, tmp_path / "gap"))
    lose_all_experts_of_a_layer(folder)
    with pytest.raises(UserError, match=f"{WEIGHTS}: there is the router model.layers.2.mlp.gate"):
        checkpoint.check_structure(Model("gap", str(folder)))


@pytest.fixture
def cached(glm: Model, tmp_path: Path) -> Path:
    """The model as the hub's cache holds it: links to blobs that are called by their checksums."""
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in glm.folder.iterdir():
        if file.suffix == ".safetensors":
            name = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            name = subprocess.run(
                ["git", "hash-object", file], capture_output=True, text=True, check=True
            ).stdout.strip()
        shutil.copy(file, blobs / name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_the_hubs_cache_is_held_to_its_own_checksums(cached: Path, glm: Model) -> None:
    assert Model("cached", str(cached)).digest == glm.digest
    flip_a_byte(cached, ROUTER)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        _ = Model("cached", str(cached)).digest
    flip_a_byte(cached, ROUTER)
    with (cached / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="config.json is damaged"):
        _ = Model("cached", str(cached)).digest


# Files that are not what they should be.


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_model("qwen3_moe", tmp_path / "sharded", max_shard_size="40KB").folder


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / tensors.INDEX
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_an_index_and_its_shards_must_agree(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    tensors.inventory(sharded)
    shards[2].rename(sharded / "elsewhere")
    with pytest.raises(UserError, match=f"in {shards[2].name}, and it is not there"):
        tensors.inventory(sharded)
    (sharded / "elsewhere").rename(shards[2])
    extra = sharded / "extra.safetensors"
    save_file({"model.layers.0.mlp.experts.8.up_proj.weight": torch.ones(2)}, extra)
    with pytest.raises(UserError, match=f"{extra} holds tensor model.layers.0.mlp.experts.8.up_proj.weight"):
        tensors.inventory(sharded)
    extra.unlink()
    change_index(sharded, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(UserError, match="holds tensor model.norm.weight, which"):
        tensors.inventory(sharded)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", 3, None]
)
def test_an_index_cannot_lead_out_of_its_folder(sharded: Path, place: object) -> None:
    change_index(sharded, lambda names: names.update({"model.norm.weight": place}))
    with pytest.raises(UserError, match="model.norm.weight in .*, which is no safetensors file of its own folder"):
        tensors.inventory(sharded)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "notes.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(glm: Model, tmp_path: Path, name: str) -> None:
    """A checkpoint from elsewhere could name any file of this machine, and an export would carry it to the hub."""
    secret, folder, out = tmp_path / "token", Path(shutil.copytree(glm.folder, tmp_path / "model")), tmp_path / "out"
    secret.write_text("hf_secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    out.mkdir()
    with pytest.raises(UserError, match=f"{name} is a link that leads out"):
        tensors.inventory(folder)
    with pytest.raises(UserError, match=f"{name} is a link that leads out"):
        checkpoint.copy_rest(folder, out)
    assert not list(out.iterdir()) or "hf_secret" not in "".join(f.read_text() for f in out.glob("*.json"))


def test_pickles_are_never_read_and_never_copied(glm: Model, tmp_path: Path) -> None:
    folder, out = Path(shutil.copytree(glm.folder, tmp_path / "model")), tmp_path / "out"
    out.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04pickle")
    Model("both", str(folder)).load("float32")
    checkpoint.copy_rest(folder, out)
    assert not [file for file in out.iterdir() if file.suffix in tensors.PICKLES]
    (folder / WEIGHTS).rename(folder / "other.safetensors")  # then transformers would take the pickle
    with pytest.raises(OSError, match="model.safetensors"):
        Model("both", str(folder)).load("float32")
    (folder / "other.safetensors").rename(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="no .*safetensors file, only optimizer.pt.*no pickles"):
        tensors.inventory(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(shape=[2, 3]),
        lambda header: header["a"].update(dtype="F64"),
        lambda header: header["b"].update(data_offsets=[4, 20]),
        lambda header: header["b"].update(data_offsets=[20, 36]),
        lambda header: header["a"].update(data_offsets=[0, 8, 16]),
        lambda header: header["a"].update(data_offsets=[0.0, 16.0]),
        lambda header: header["a"].update(shape=[-2, -2]),
        lambda header: header["a"].update(shape="22"),
        lambda header: header.update(a=3),
        lambda header: header.pop("b"),
    ],
)
def test_a_header_that_does_not_fit_its_bytes_is_refused(tmp_path: Path, change: Callable[[dict], object]) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
    }
    file = tmp_path / WEIGHTS

    def write() -> None:
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))

    write()
    assert list(tensors.read_header(file)) == ["a", "b"]
    change(header)
    write()
    with pytest.raises(UserError, match=WEIGHTS):
        tensors.read_header(file)


# Code that comes with a checkpoint.

ATTACK = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass C: pass\n"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_refused_unless_the_user_says_what_to_do(glm: Model, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(glm.folder, tmp_path / "model"))
    (folder / "attack.py").write_text(ATTACK)
    config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    text = json.dumps({**config, "auto_map": {"AutoConfig": "attack.C", "AutoModelForCausalLM": "attack.C"}})
    (folder / file).write_text(text.replace('"auto_map"', '"auto\\u005fmap"'))  # the same to a JSON reader
    for refuse in (checkpoint.check_structure, lambda model: model.load("float32")):
        with pytest.raises(UserError, match=f"{file} names Python code.*trust_remote_code=false"):
            refuse(Model("code", str(folder)))
    without = Model("code", str(folder), trust_remote_code=False)
    checkpoint.check_structure(without)
    assert type(without.load("float32")).__name__ == "Glm4MoeForCausalLM", "the library's own"
    assert not list(tmp_path.rglob("ran")), "it was never run"


def test_an_unknown_architecture_with_code_is_not_run_and_asks_nothing(
    glm: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    folder = Path(shutil.copytree(glm.folder, tmp_path / "model"))
    (folder / "attack.py").write_text(ATTACK)
    patch_config(folder, model_type="attack", auto_map={"AutoConfig": "attack.C", "AutoModelForCausalLM": "attack.C"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        Model("code", str(folder), trust_remote_code=False).load("float32")
    assert not list(tmp_path.rglob("ran"))


def test_a_tokenizers_code_runs_if_and_only_if_the_model_may(
    glm: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(glm.folder, tmp_path / "model"))
    tokenizer = tokenizer_of(ROOT / "tasks" / "tiny" / "model")
    tokenizer.save_pretrained(folder)
    (folder / "own_tokenizer.py").write_text(
        f"from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    file = folder / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), "tokenizer_class": "Own"}
    file.write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": [None, "own_tokenizer.Own"]}}))
    tokenizer_of(folder)
    assert not (tmp_path / "ran").exists()
    assert type(tokenizer_of(folder, runs_code=True)).__name__ == "Own"
    assert (tmp_path / "ran").exists()


def test_what_to_do_with_code_must_be_yes_or_no(glm: Model) -> None:
    with pytest.raises(UserError, match="trust_remote_code=maybe"):
        Model("glm", str(glm.folder), trust_remote_code="maybe").check_code()  # type: ignore[arg-type]


def test_nothing_is_made_up_for_tensors_that_are_not_there(glm: Model, tmp_path: Path) -> None:
    """transformers fills such parameters with random numbers, and says so in a log at most."""
    folder = Path(shutil.copytree(glm.folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.self_attn.o_proj.weight"):
        save_file({other: tensor for other, tensor in weights.items() if other != name}, folder / "model.safetensors")
        with pytest.raises(StageError, match=f"nothing in the files for 1 parameters .* such as {name}"):
            Model("glm", str(folder)).load("auto")
    with pytest.raises(StageError, match=r"no model.layers.1.self_attn|no self_attn.o_proj.weight of layer 1"):
        streamed(Model("glm", str(folder)), tmp_path, frozenset())
    save_file({name: value for name, value in weights.items() if "norm.w" not in name}, folder / "model.safetensors")
    with pytest.raises(StageError, match="nothing in the files for .* such as model.norm.weight"):
        open_streamed(Model("glm", str(folder)), "auto")
