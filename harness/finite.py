"""Values of a calibration pass that are not finite end it where they first appear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.errors import StageError


@dataclass
class Finite:
    """Whether everything that was noted is finite. Looking waits for the device, so it is done seldom."""

    noted: list[tuple[str, tuple[str, ...], Tensor]] = field(default_factory=list)

    def note(self, where: str, values: Mapping[str, Tensor]) -> None:
        """Values of one place by name, in the order in which one spoils the next."""
        are = torch.stack([value.isfinite().all() for value in values.values()])
        self.noted.append((where, tuple(values), are))

    def check(self) -> None:
        """Raise StageError for the first of them that holds NaN or infinity, and forget the others."""
        noted, self.noted = self.noted, []
        for where, names, are in noted:
            for name, is_finite in zip(names, are.tolist(), strict=True):
                if not is_finite:
                    raise not_finite(where, name)


def not_finite(where: str, what: str) -> StageError:
    """The error of a calibration that stops."""
    return StageError(
        f"Calibration stopped: {where}, {what} are not all finite (there is NaN or infinity). The weights are damaged, "
        "or values overflow in this type: check the files, or calibrate in float32 (calibration.dtype=float32)."
    )
