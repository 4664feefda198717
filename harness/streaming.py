"""A model bigger than memory: its decoder layers are read from disk one after the other, each for all batches.

Every batch's forward pass is the model's own, run in a greenlet that waits at the door of each layer. So all batches
go through a layer while its weights are there, and whatever a model does between its layers needs no code here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.errors import StageError, UserError
from harness.finite import not_finite
from harness.layer_files import Files, Sources, by_layer, load, load_parameter
from harness.loading import architecture, config_to_compute, from_files
from harness.memory import give_back
from harness.models import Model
from harness.parking import Parking, checksum, read, release, write_lasting
from harness.read_ahead import reading_ahead
from harness.seam import decoder, trunk
from harness.sharing import Sharing
from harness.tensors import Tensor as StoredTensor

Batch = tuple[Tensor, Tensor]  # token ids and attention mask, both int64 [B, T]
FORM = "form"  # name of a file beside saved states


@dataclass(frozen=True)
class Streamed:
    """A model whose decoder layers are on the meta device but while they are needed.

    layers: the decoder layers. sources: for each, by parameter, what of the files it is loaded from.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    sources: tuple[dict[str, Sources], ...]
    load_config: Any
    files: Files

    @property
    def layer_bytes(self) -> int:
        """Of the largest layer, in memory."""
        return max(sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in self.layers)

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """In here the layer has its weights, and those of the next are read ahead. Raises StageError if the checkpoint
        does not have them all.
        """
        layer = self.layers[index]
        try:
            self._load(index)
            with reading_ahead(self._stored(index + 1)):
                yield layer
        finally:
            _empty(layer)
            give_back()

    def whole(self) -> PreTrainedModel:
        """The model with all of its layers in memory, to stay. Raises StageError as `loaded`."""
        for index in range(len(self.layers)):
            self._load(index)
        return self.model

    def _load(self, index: int) -> None:
        for name, sources in self.sources[index].items():
            load_parameter(self.model, self.files, name, sources, self.load_config)
        give_back()
        if missing := [name for name, tensor in self.layers[index].state_dict().items() if tensor.is_meta]:
            raise StageError(f"The checkpoint has no {', '.join(missing[:3])} of layer {index}.")

    def _stored(self, index: int) -> list[StoredTensor]:
        """What the layer is loaded from, in the order of the files; nothing behind the last."""
        sources = self.sources[index].values() if index < len(self.layers) else ()
        found = [stored for each in sources for name in each.names for stored in self.files.stored(name)]
        return sorted(found, key=lambda tensor: (tensor.file, tensor.start))


def open_streamed(model: Model, dtype: str) -> Streamed:
    """The model with everything but its decoder layers in memory (on the GPU, if there is one).

    Raises UserError for an architecture that transformers does not have, or whose layers are not found, StageError if
    the files do not hold all of it.
    """
    model.check_code()
    # Read when oneDNN first computes. Every expert's number of tokens makes a kernel of its own, which is not needed
    # again; a thousand of them would take some hundred MB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    kind, config = architecture(model, config_to_compute(model))
    files = Files(model.tensors, model.compression)
    found: dict[str, Any] = {}

    def load_the_rest(empty: PreTrainedModel, state: Any, names: list[str], load_config: Any) -> tuple[Any, None]:
        """In place of transformers' own loading, with the same preparations: all but the layers."""
        path, layers = _decoder_layers(empty)
        sources, rest = by_layer(empty, path, len(layers), files, load_config)
        found.update(layers=layers, sources=tuple(sources), load_config=load_config)
        info = load(empty, files, rest, load_config)
        info.missing_keys = {name for name in info.missing_keys if not name.startswith(f"{path}.")}
        for parameter in layers.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # nothing else is to fill it
        return info, None

    own = {"_load_pretrained_model": staticmethod(load_the_rest), "__module__": kind.__module__}
    streaming: Any = type(kind.__name__, (kind,), own)
    loaded = from_files(
        streaming,
        model,
        config=config,
        dtype=dtype,
        device_map={"": torch.cuda.current_device()} if torch.cuda.is_available() else None,
        local_files_only=True,
        use_safetensors=True,
    )
    return Streamed(loaded, files=files, **found)


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the decoder's layers and its name in the model."""
    lists = {id(module): name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    layers = getattr(decoder(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or id(layers) not in lists:
        raise UserError(f"{type(model).__name__} has no list of decoder layers that is known as one.")
    return lists[id(layers)], layers


def _empty(layer: nn.Module) -> None:
    """Give the memory of a layer's weights back; buffers that no checkpoint holds stay."""
    for name, tensor in layer.state_dict(keep_vars=True).items():
        owner, _, attribute = name.rpartition(".")
        nothing = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            nothing = nn.Parameter(nothing, requires_grad=False)
        setattr(layer.get_submodule(owner), attribute, nothing)


class Passes:
    """The forward passes of all batches, side by side in front of the same layer."""

    def __init__(self, streamed: Streamed, batches: Sequence[Batch], parking: Parking) -> None:
        self.streamed, self.batches, self.parking = streamed, batches, parking
        self.form: int | None = None  # of what layers return: states alone (0), a tuple of so many with nothing else
        self.hands_on = False  # whether layers leave something for later ones in a mapping that all are given
        self.sharing = Sharing()

    def layers(self, entering: Callable[[Batch], None], start: int = 0, states: Path | None = None) -> Iterator[int]:
        """Take all batches through one layer after the other; gives the number of each when they are through it and its
        weights are still there.

        entering: called with a batch before it goes on. start: the first layer that is computed; ``states``, which
        `save` wrote, are what comes to it. Raises StageError for a model that does not go through its layers in order,
        and if what comes out of the last is not finite.
        """
        if states is not None:
            self.form = json.loads((states / FORM).read_text())["form"]
        with self._doors(start), torch.no_grad():
            passes = [greenlet(self._forward) for _ in self.batches]
            try:
                for number, one in enumerate(passes):
                    self._go_on(number, one, start, self.batches[number])
                    if states is not None:
                        self._put_back(number, states)
                for index in range(start, len(self.streamed.layers)):
                    with self.streamed.loaded(index):
                        for number, one in enumerate(passes):
                            entering(self.batches[number])
                            self._through(number, one, index)
                        self.sharing.check(type(self.streamed.model).__name__)
                        yield index
            finally:
                for one in passes:
                    if not one.dead:
                        one.throw(GreenletExit)
                self.parking.clear()

    @property
    def nbytes(self) -> int:
        """Of all that is parked."""
        return sum(hidden.nbytes for hidden in self.parking.parked.values())

    def save(self, folder: Path) -> bool:
        """Write what comes to the next layer into a folder; False if that is more than hidden states."""
        if self.form is None:
            return False
        checksums = []
        for number in range(len(self.batches)):
            self.parking.fetch(number)
            hidden = self.parking.parked[number]
            checksums.append(write_lasting(hidden, folder / f"{number}.bin"))
            self.parking.put(number, hidden)
        (folder / FORM).write_text(json.dumps({"form": self.form, "checksums": checksums}))
        return True

    def _put_back(self, number: int, states: Path) -> None:
        self.parking.fetch(number)
        hidden = self.parking.parked[number]
        hidden.data = read(states / f"{number}.bin", hidden)
        self.parking.put(number, hidden)

    def _through(self, number: int, one: greenlet, index: int) -> None:
        """Take a batch through the layer whose weights are there."""
        self.parking.fetch(number)
        before = self.parking.parked[number]
        self._go_on(number, one, index + 1)
        if before is not self.parking.parked[number]:
            release(before)  # a forward pass that keeps its embeddings would keep them for all batches

    def _go_on(self, number: int, one: greenlet, door: int, *first: Batch) -> None:
        """Run a batch up to the next door, and park it there."""
        came, hidden = one.switch(*first)
        if came != door:
            raise StageError(f"{type(self.streamed.model).__name__} goes from layer {door - 1} to layer {came}.")
        if door == len(self.streamed.layers):
            mask = self.batches[number][1].bool().to(hidden.device)
            if not hidden.isfinite().all(dim=-1)[mask].all():
                raise not_finite(f"behind layer {door - 1}", "the hidden states")
        self.sharing.look(one.gr_frame, hidden, is_first=number == 0)
        self.parking.put(number, hidden)

    def _forward(self, batch: Batch) -> None:
        ids, mask = (tensor.to(self.streamed.model.device) for tensor in batch)
        trunk(self.streamed.model)(input_ids=ids, attention_mask=mask, use_cache=False)
        raise AssertionError("it waits behind the last layer")

    @contextmanager
    def _doors(self, start: int) -> Iterator[None]:
        """In here a forward pass waits for `_go_on` in front of each layer from ``start`` on, and behind the last."""
        main = getcurrent()
        layers = list(self.streamed.layers)
        own = [layer.__dict__.get("forward") for layer in layers]

        def door(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def enter(*arguments: Any, **named: Any) -> Any:
                hidden = arguments[0] if arguments else named["hidden_states"]
                if index < start:
                    return (hidden.clone(), *[None] * (self.form - 1)) if self.form else hidden.clone()
                main.switch((index, hidden))
                before = _sizes(arguments, named)
                found = forward(*arguments, **named)
                self.hands_on |= before != _sizes(arguments, named)
                self.form = None if self.hands_on else _form(found)
                if index == len(layers) - 1:
                    main.switch((index + 1, found[0] if isinstance(found, tuple) else found))
                return found

            return enter

        for index, layer in enumerate(layers):
            layer.forward = door(index, layer.forward)
        try:
            yield
        finally:
            for layer, before in zip(layers, own, strict=True):
                if before is None:
                    del layer.forward
                else:
                    layer.forward = before


def are_whole(states: Path) -> bool:
    """Whether the hidden states that `Passes.save` wrote into this folder are as it wrote them."""
    try:
        checksums = json.loads((states / FORM).read_text())["checksums"]
        return all(checksum(states / f"{number}.bin") == one for number, one in enumerate(checksums))
    except (OSError, ValueError):
        return False


def _sizes(arguments: tuple[Any, ...], named: dict[str, Any]) -> list[int]:
    """Of the mappings that a layer is given."""
    return [len(value) for value in (*arguments, *named.values()) if isinstance(value, MutableMapping)]


def _form(found: Any) -> int | None:
    """What a layer returned: 0 for its states alone, n for a tuple of n with nothing beside them, None for more."""
    if isinstance(found, Tensor):
        return 0
    return len(found) if isinstance(found, tuple) and all(part is None for part in found[1:]) else None
