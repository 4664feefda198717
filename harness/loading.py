"""A checkpoint as a model in memory: transformers' own class, in plain floating point, if there is room for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.compressed import BESIDE, METHOD
from harness.errors import StageError, UserError
from harness.models import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DEQUANTISED = ("fp8", "mxfp4", METHOD)  # quantisations that are undone when a model is loaded
SCALES = ("_scale_inv", "_scales", *(f".weight{ending}" for ending in BESIDE))  # endings of what goes into others then


def config_to_compute(model: Model) -> PreTrainedConfig:
    """The config to load the model with: in plain floating point, also where the checkpoint is quantised.

    Raises UserError for a quantisation that cannot be undone here.
    """
    config = _config(model)
    method = model.quantisation
    if method is None:
        return config
    if method not in DEQUANTISED:
        raise UserError(
            f"model {model.name!r} is quantised ({method}), and only {', '.join(DEQUANTISED)} can be computed with "
            "here. It can be pruned as it is by a plan that was made of the model in 16 bits: "
            "./bench export plan=<file>."
        )
    for part in (config.get_text_config(), config):  # it may stand in either
        vars(part).pop("quantization_config", None)
    if model.compression is None:
        config.quantization_config = {**model.config["quantization_config"], "dequantize": True}
    else:  # unpacked as it is read, so that transformers sees plain weights
        model.compression.check()
    return config


def _config(model: Model) -> PreTrainedConfig:
    """By transformers' own class wherever it has the architecture, also where the checkpoint brings code that may run:
    what that computes goes through no interface by which experts could be observed.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = model.model_type
    if kind in CONFIG_MAPPING:
        config = CONFIG_MAPPING[kind].from_pretrained(model.folder, local_files_only=True)
        config.model_type = kind  # by which transformers knows how tensors become parameters
        return config
    return AutoConfig.from_pretrained(model.folder, local_files_only=True, trust_remote_code=model.runs_code)


def architecture(model: Model, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """transformers' class that reads text and answers, and its config: of a model that also sees, the part that reads
    text if it has a class of its own, else the whole. Raises UserError if transformers has none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for group in (AutoModelForCausalLM, AutoModelForImageTextToText):
        kind: Any = group._model_mapping.get(type(config), None)
        if kind is not None:
            kind = kind[0] if isinstance(kind, tuple) else kind
            if kind.config_class is not config.sub_configs.get("text_config"):
                return kind, config
            part = config.get_text_config()
            if (found := getattr(config, "quantization_config", None)) is not None:
                part.quantization_config = found  # or its numbers would be taken for weights
            return kind, part
    raise UserError(f"model {model.name!r}: transformers has no {config.model_type!r} that reads text and answers.")


def tensor_bytes(model: Model, name: str, dtype: str) -> float:
    """What a tensor of the checkpoint takes, when the model is in memory in this type."""
    tensor, method = model.tensors[name], model.quantisation
    if method is not None and name.endswith(SCALES):
        return 0.0
    numbers = tensor.elements
    if method == "mxfp4" and name.endswith("_blocks"):
        numbers *= 2
    elif name.endswith(".weight_packed") and model.compression is not None:
        numbers = 8 * tensor.nbytes // model.compression.bits(name.removesuffix("_packed"))
    return 4.0 * numbers if dtype == "float32" else max(2.0 * numbers, tensor.nbytes)


def model_bytes(model: Model, dtype: str) -> float:
    """What the whole model takes."""
    return sum(tensor_bytes(model, name, dtype) for name in model.tensors)


def check_memory(model: Model, dtype: str) -> None:
    """Raise StageError if the whole model does not fit into the memory that is free."""
    from harness.memory import free

    needed, there = model_bytes(model, dtype), free()
    if needed > there:
        raise StageError(
            f"The whole of {model.name} would have to be in memory, {needed / 2**30:.1f} GiB in {dtype}, and "
            f"{there / 2**30:.1f} GiB are free. What goes layer by layer needs no more than its largest layer: "
            "statistics, the plans that follow from them, and exports."
        )


def load(model: Model, dtype: str, gpus: Sequence[float] | None = None) -> PreTrainedModel:
    """The model in memory (on the GPUs, if any). dtype: ``auto``, ``float32`` or ``bfloat16``. gpus: bytes that may be
    taken of each GPU; None: what is free.

    Raises StageError if it does not fit, or the files do not hold all of it.
    """
    model.check_code()
    check_memory(model, dtype)
    import torch
    from transformers import AutoModelForCausalLM

    if model.compression is not None:
        from harness.streaming import open_streamed

        return open_streamed(model, dtype).whole()
    given: dict[str, Any] = {
        "dtype": dtype,
        "device_map": "auto" if torch.cuda.is_available() else None,
        "local_files_only": True,
        "use_safetensors": True,  # where both are there, pickles are not even looked at
    }
    if gpus:
        given["max_memory"] = {index: int(nbytes) for index, nbytes in enumerate(gpus)}
    config = config_to_compute(model)
    if type(config).__module__.startswith("transformers_modules."):  # an architecture that only its own code has
        return from_files(AutoModelForCausalLM, model, config=config, trust_remote_code=True, **given)
    kind, config = architecture(model, config)
    return from_files(kind, model, config=config, **given)


def from_files(kind: Any, model: Model, **given: Any) -> PreTrainedModel:
    """What a class of transformers makes of the checkpoint. Raises StageError for parameters that it finds no tensor
    for: it would fill them with random numbers.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the pass over the tokens has one of its own
    loaded, found = kind.from_pretrained(model.folder, output_loading_info=True, **given)
    if missing := sorted(found["missing_keys"]):
        raise StageError(
            f"{model.name}: transformers finds nothing in the files for {len(missing)} parameters of "
            f"{type(loaded).__name__}, such as {missing[0]}, and would make them up."
        )
    return loaded.eval()
