"""A mixture-of-experts model on disk: where it is, and the facts about its experts, read from headers only."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import fingerprints, inventory, tensors
from harness.compressed import METHOD, Compression
from harness.errors import UserError
from harness.roles import EXPERT_COUNT, LAYER, TOP_K, experts_on_disk, list_of, role
from harness.tensors import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
SAME_ARCHITECTURE = {"kimi_k2": "deepseek_v3"}  # model types that only the checkpoint's own code knows by that name


@dataclass(frozen=True)
class Model:
    """A model as ``conf/model/*.yaml`` names it.

    name: label in tables. path: a folder (absolute, or relative to the project), or a repository name on the Hugging
    Face hub, fetched at ``revision`` when first used. build: the command that makes the folder. domains: those of
    ``conf/domain/`` that experiments test it on, separated by commas. outline: the fields of its config.json that fix
    its size, and ``bytes`` per parameter of routed experts and of the rest, to know its size before it is here.
    trust_remote_code: what to do where a checkpoint brings Python code of its own. Unset, it is refused; false, the
    code is never run and the libraries' own implementation of the architecture is used; true, the tokenizer's may run,
    and the model's where transformers has no implementation of its own.
    """

    name: str
    path: str
    revision: str | None = None
    build: str | None = None
    domains: str | None = None
    outline: dict[str, Any] | None = field(default=None, compare=False)  # the files themselves say what a model is
    trust_remote_code: bool | None = None

    @property
    def runs_code(self) -> bool:
        """Whether Python code that comes with the checkpoint may run."""
        return bool(self.trust_remote_code)

    @cached_property
    def folder(self) -> Path:
        """The local folder of the checkpoint. Raises UserError if there is none and the hub cannot give it."""
        return self._given or self._fetch()

    @property
    def _given(self) -> Path | None:
        return next((path.resolve() for path in (Path(self.path), ROOT / self.path) if path.is_dir()), None)

    @cached_property
    def is_here(self) -> bool:
        """Whether the checkpoint is a folder on this machine or whole in the hub's cache. Asks no network."""
        from huggingface_hub import snapshot_download

        if self._given is not None or self.build is not None or self.path.count("/") != 1:
            return self._given is not None
        try:
            folder = snapshot_download(self.path, revision=self.revision, local_files_only=True)
            tensors.inventory(Path(folder))
        except (OSError, ValueError, UserError):  # the hub's own errors are OSErrors
            return False
        return (Path(folder) / "config.json").exists()

    def outlined(self) -> Outlined | None:
        """The model as its published config.json describes it, without files; None where that is not noted."""
        return None if self.outline is None else Outlined(**asdict(self))

    def _fetch(self) -> Path:
        if self.build is not None:
            raise UserError(f"model {self.name!r} is not built yet: {self.path} is missing. Make it with: {self.build}")
        if self.path.startswith((".", "/")) or self.path.count("/") != 1:
            raise UserError(
                f"model {self.name!r}: there is no folder {self.path!r}. "
                "Name a folder that holds config.json and *.safetensors, or a hub repository as owner/name."
            )
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", *(["*.py"] if self.runs_code else [])]
        try:
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
            raise UserError(
                f"model {self.name!r}: {self.path!r} is no folder here and the hub did not give it "
                f"({type(error).__name__}). Check the name and the network, or set model.path to a local folder."
            ) from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands, with the fields of a nested text_config on top."""
        return {name: value for level in self._levels for name, value in level.items()}

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture; of one that also sees, of the whole."""
        name = str(self._levels[0].get("model_type"))
        return SAME_ARCHITECTURE.get(name, name)

    @property
    def quantisation(self) -> str | None:
        """How the weights are quantised, by transformers' name of it; None if they are not."""
        found = self.config.get("quantization_config")
        return str(found.get("quant_method")) if isinstance(found, dict) else None

    @cached_property
    def compression(self) -> Compression | None:
        """How the weights are packed, if the compressed-tensors library did it."""
        return Compression(self.config["quantization_config"]) if self.quantisation == METHOD else None

    @cached_property
    def _levels(self) -> tuple[dict[str, Any], ...]:
        """config.json, and the text_config nested in it, if there is one."""
        try:
            config = json.loads((self.folder / "config.json").read_text())
            levels = (config, config.get("text_config") or {})
            if not all(isinstance(level, dict) for level in levels):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"model {self.name!r}: {self.folder} has no readable config.json ({error}). "
                "It must be a Hugging Face checkpoint folder."
            ) from error
        return levels

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Of the model that answers: without those of `extra_heads`."""
        return {name: tensor for name, tensor in self._inventory.items() if name not in self.extra_heads}

    @cached_property
    def _inventory(self) -> dict[str, Tensor]:
        return tensors.inventory(self.folder)

    @cached_property
    def extra_heads(self) -> frozenset[str]:
        """Tensors of multi-token-prediction heads, which guess tokens after the next one: parts called ``mtp``, and
        layers with numbers beyond those of the decoder. No statistic sees them, as no forward pass runs them.
        """
        layers = self.config.get("num_hidden_layers")
        matches = {name: match for name in self._inventory if (match := LAYER.match(name))}
        decoders = {list_of(match) for match in matches.values() if "experts." in match["rest"]}
        beyond = {
            name
            for name, match in matches.items()
            if isinstance(layers, int) and int(match["layer"]) >= layers and list_of(match) in decoders
        }
        return frozenset(beyond | {name for name in self._inventory if "mtp" in name.split(".")})

    @cached_property
    def experts(self) -> dict[int, int]:
        """Routed experts of each MoE layer, by layer index; none for a dense model."""
        if not any(alias in self.config for alias in EXPERT_COUNT):
            return {}
        experts = experts_on_disk(self.tensors, self.expert_count)
        if not experts:
            raise UserError(f"model {self.name!r}: {self.folder} holds no experts, though config.json promises some.")
        return experts

    @property
    def expert_count(self) -> int:
        """The expert count that config.json gives."""
        return self._number(EXPERT_COUNT)

    @property
    def top_k(self) -> int:
        """Experts each token is routed to; 0 in a dense model."""
        return self._number(TOP_K) if self.experts else 0

    def _number(self, aliases: tuple[str, ...]) -> int:
        """The one number that config.json gives under these names, at both levels: engines read either."""
        found = [(alias, level[alias]) for level in self._levels for alias in aliases if type(level.get(alias)) is int]
        if len({value for _, value in found}) != 1:
            raise UserError(
                f"model {self.name!r}: config.json must give one number under one of {', '.join(aliases)}; "
                f"found {', '.join(f'{alias}={value}' for alias, value in found) or 'none'}."
            )
        return int(found[0][1])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def bytes_of_a_number(self) -> float:
        """Of the mean parameter, as it is stored."""
        return self.nbytes / self.parameters

    def check_compressible(self) -> None:
        """Raise UserError for a dense model."""
        if not self.experts:
            raise UserError(
                f"model {self.name!r} is dense: its config.json has none of {', '.join(EXPERT_COUNT)}. "
                "There are no experts to compress; it can only be scored as it is, with method=none."
            )

    def check_tokenizer(self) -> None:
        """Raise UserError if the folder has no tokenizer: transformers would make an empty one up."""
        if not any(any(self.folder.glob(pattern)) for pattern in ("tokenizer.json", "tokenizer.model", "vocab*")):
            raise UserError(
                f"model {self.name!r}: {self.folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.*). "
                "Copy the original model's tokenizer files there."
            )

    def check_code(self) -> None:
        """Raise UserError for a checkpoint that names Python code of its own, unless ``trust_remote_code`` is set."""
        if self.trust_remote_code not in (None, False, True):
            raise UserError(f"model.trust_remote_code={self.trust_remote_code} is none of null, false, true.")
        for file in (self.folder / name for name in ("config.json", "tokenizer_config.json")):
            if self.trust_remote_code is None and file.exists() and _names_code(file):
                raise UserError(
                    f"model {self.name!r}: {file} names Python code that comes with the checkpoint (auto_map), which "
                    "is not run unless you say so. Set model.trust_remote_code=false to use the libraries' own "
                    "implementation of the architecture instead, or =true if you have read that code and trust it."
                )

    @cached_property
    def digest(self) -> str:
        """Hash of the weights, config and tokenizer: the model's content, whatever its folder is called.

        Raises UserError where a file is not what is known of it (``checksums.json`` beside it, the hub's cache) or
        holds values that are not finite.
        """
        code = ("*.py",) if self.runs_code else ()
        return self._digest(*inventory.DETERMINING, *code)

    @cached_property
    def tokenizer_digest(self) -> str:
        return self._digest(*inventory.TOKENIZER)

    def _digest(self, *patterns: str) -> str:
        found = fingerprints.of_files(inventory.files(self.folder, patterns), self.name)
        inventory.check_known(self.folder, found)
        return hashlib.sha256("\n".join(f"{name} {one.sha256}" for name, one in found.items()).encode()).hexdigest()

    def elsewhere(self, folder: Path) -> Model:
        """What was made of it in a folder: the same code may run."""
        return Model(folder.name, str(folder), trust_remote_code=self.trust_remote_code)

    def load(self, dtype: str) -> PreTrainedModel:
        """The model in memory, in the type ``auto``, ``float32`` or ``bfloat16`` (`harness.loading.load`)."""
        from harness.loading import load

        return load(self, dtype)


@dataclass(frozen=True)
class Outlined(Model):
    """A model that is not here: the tensors that its outline implies, by name, shape and size, without contents."""

    @cached_property
    def folder(self) -> Path:
        raise UserError(f"model {self.name!r} is not on this machine.")

    @cached_property
    def _levels(self) -> tuple[dict[str, Any], ...]:
        assert self.outline is not None
        return ({name: value for name, value in self.outline.items() if name != "bytes"},)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """As transformers builds the architecture on its meta device; tied parameters once."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        assert self.outline is not None
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.config))
        once = {id(tensor): (name, tuple(tensor.shape)) for name, tensor in empty.state_dict(keep_vars=True).items()}
        shapes = dict(once.values())
        experts = experts_on_disk({name: _sized(shape, 0) for name, shape in shapes.items()}, self.expert_count)
        size = self.outline["bytes"]
        routed = {name: role(name, shape, experts).kind in ("expert", "fused") for name, shape in shapes.items()}
        return {name: _sized(shape, size["routed" if routed[name] else "rest"]) for name, shape in shapes.items()}

    @property
    def is_observable(self) -> bool:
        """Whether its experts go through transformers' experts interface, where calibration observes them, or are led
        through it (`harness.llama4`).
        """
        from transformers import AutoModelForCausalLM, PreTrainedModel
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind: Any = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[self.model_type]]
        is_known = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
        return is_known and (kind._can_set_experts_implementation() or kind.__name__.startswith("Llama4"))


def _sized(shape: tuple[int, ...], bytes_per_parameter: float) -> Tensor:
    """A tensor of this shape that is in no file."""
    return Tensor(Path(), "outline", shape, 0, round(math.prod(shape) * bytes_per_parameter))


def _names_code(file: Path) -> bool:
    """Whether a JSON file has a field ``auto_map``, however deep. Raises UserError if it is none."""
    fields: set[str] = set()

    def note(pairs: list[tuple[str, Any]]) -> None:
        fields.update(name for name, _ in pairs)

    try:
        json.loads(file.read_text(), object_pairs_hook=note)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable: {error}.") from error
    return "auto_map" in fields
