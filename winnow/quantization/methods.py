"""Methods that checkpoints are quantized by: what runs them, and what undoes them."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.errors import UnusableModel
from winnow.quantization.formats.awq import awq
from winnow.quantization.formats.base import Format, Settings
from winnow.quantization.formats.bitsandbytes import bitsandbytes
from winnow.quantization.formats.compressed_tensors import compressed_tensors
from winnow.quantization.formats.fp8 import fp8
from winnow.quantization.formats.gptq import gptq
from winnow.quantization.formats.mxfp4 import mxfp4


@dataclass(frozen=True, slots=True)
class Method:
    """libraries: Python packages by which transformers runs it.

    form: how it holds weights; None if that is not known.
    devices: where products are computed with weights as they are held. Elsewhere transformers
    dequantizes them too, so Winnow does by itself.
    """

    libraries: tuple[str, ...]
    form: Callable[[Settings], Format] | None
    devices: tuple[str, ...] = ("cpu", "cuda")


METHODS = {
    "fp8": Method(("accelerate",), fp8, ("cuda",)),
    "compressed-tensors": Method((), compressed_tensors, ()),
    "gptq": Method(("optimum", "gptqmodel"), gptq),
    "awq": Method(("accelerate", "gptqmodel"), awq),
    "bitsandbytes": Method(("accelerate", "bitsandbytes"), bitsandbytes),
    "mxfp4": Method(("accelerate", "kernels", "triton"), mxfp4, ("cuda",)),
    "torchao": Method(("torchao",), None),
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's weights are quantized.

    settings: config.json's `quantization_config`.
    dequantize: whether they become the dtype when they are loaded.
    """

    settings: Settings
    dequantize: bool

    @property
    def name(self) -> str:
        return self.settings.get("quant_method") or "a method without a name"

    @property
    def form(self) -> Format | None:
        """How the weights are held; None where it is not known.

        Raises UnusableModel if the method is known, and these settings of it are not.
        """
        form = METHODS[self.name].form
        return None if form is None else form(self.settings)

    def require_usable(self, path: Path, quantize: str | None) -> None:
        """Raise UnusableModel unless the checkpoint can be run, or dequantized, as is asked for.

        transformers ignores unknown methods, and fails late for most.
        """
        method = METHODS.get(self.name)
        if method is None:
            raise UnusableModel(
                f"{path} is quantized by {self.name}, which Winnow does not run; it runs "
                f"{', '.join(METHODS)}, and weights that are not quantized"
            )
        if self.dequantize:
            if self.form is None:
                raise UnusableModel(
                    f"{path} is quantized by {self.name}, which is not dequantized when loaded; "
                    f"without dequantize it runs where there is {_named(method.libraries)}"
                )
            return
        instead = "; dequantize: true loads its weights as the dtype" if method.form else ""
        if quantize is not None:
            raise UnusableModel(f"{path} is quantized by {self.name} already{instead}")
        missing = [one for one in method.libraries if importlib.util.find_spec(one) is None]
        if missing:
            raise UnusableModel(
                f"{path} is quantized by {self.name}, for which {_named(missing)} is not "
                f"installed: pip install {' '.join(map(_package, missing))}{instead}"
            )


def quantization_of(config: Any, device: str, dequantize: bool) -> Quantization | None:  # noqa: ANN401
    """How a model's weights are quantized, if they are.

    config: its family's.  dequantize: on a device, too, that computes with them as they are.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    known = settings if isinstance(settings, dict) else settings.to_dict()
    method = METHODS.get(str(known.get("quant_method")))
    runs = method is None or device.partition(":")[0] in method.devices
    return Quantization(known, dequantize or not runs)


def _named(libraries: tuple[str, ...] | list[str]) -> str:
    return " and ".join(map(_package, libraries))


def _package(module: str) -> str:
    return module.replace("_", "-")
