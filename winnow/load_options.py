"""What may be said of how a model is loaded, besides its device."""

from typing import TypedDict


class LoadOptions(TypedDict, total=False):
    """Those of `describe_model`, which has their meanings and defaults."""

    dtype: str
    max_model_len: int | None
    quantize: str | None
    dequantize: bool
