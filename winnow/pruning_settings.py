"""Settings of prompt pruning and KV cache compression."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from winnow.catalog import COMPRESSIONS, METHODS, RECOMPRESSIONS, load
from winnow.checks import MAX_COUNT, require_choice, require_range, require_type
from winnow.errors import InvalidSetting

if TYPE_CHECKING:
    from winnow.kv import ModelShape  # loads torch


@dataclass(frozen=True, slots=True)
class Recompression:
    """The decode part of PruningSettings; see there. `method` is its `recompression`."""

    decode_budget: int | None = None
    decode_floor: int | None = None
    recompress_interval: int = 128
    method: str = "snapkv"
    redundancy_weight: float = 0.1
    window_size: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        require_choice("recompression", self.method, RECOMPRESSIONS)
        _require_window(self.window_size, self.kernel_size)
        require_range("recompress_interval", self.recompress_interval, 1, 2**20)
        require_range("redundancy_weight", self.redundancy_weight, 0, 1)
        _require_above_window("decode_budget", self.decode_budget, self.window_size)
        _require_above_window("decode_floor", self.decode_floor, self.window_size)
        if self.decode_budget is not None and self.decode_floor is not None:
            require_range("decode_floor", self.decode_floor, 1, self.decode_budget)

    @property
    def observes(self) -> bool:
        """Whether entries may be scored during decode, which needs the last queries."""
        return self.decode_budget is not None or self.decode_floor is not None


@dataclass(frozen=True, slots=True)
class PruningSettings:
    """How prompt and KV cache are pruned. Defaults are the paper's for 28 to 48 layers.

    Layers are the model's, counted from 0. Tokens are selected after those with full attention.

    method           one of winnow.catalog.METHODS: which tokens continue, and which KV is kept.
    select_tokens    prompt tokens (window included) that continue above the selection layer.
    window_size      last prompt tokens, whose queries score all other tokens (w).
    kernel_size      pooling width over positions, odd (S).
    observed_layers  full layers over which rank variance is taken (L_obs).
    min_layer        first layer after which ASL may select (L_min).
    threshold        select when relative rank variance falls below it (tau).
    latest_layer     select here at the latest; None: if the threshold is never met, asl does not
                     select, asl-2pass selects at the last layer.
    fixed_layer      where fastkv and gemfilter select.
    compression      snapkv: `kv_budget` entries per KV head; adakv: `kv_budget` on average,
                     distributed over a layer's heads; top_p: the smallest set per KV head with
                     attention mass `kv_top_p`; none: every computed entry is kept. For snapkv,
                     fastkv and asl; the other methods have their own rules.
    full_kv_below    fastkv and asl: layers up to the selection layer keep all their KV.
    decode_budget    KV entries per head that decode keeps during generation; None: all.
    decode_floor     KV entries per head that decode may compress to when memory is short;
                     None: never below decode_budget.
    recompress_interval  entries above decode_budget that trigger recompression.
    recompression    rule for recompression: snapkv, or rkv, which penalizes redundant keys.
    redundancy_weight  rkv: weight of attention against redundancy, 0 to 1 (lambda).
    """

    method: str = "asl"
    select_tokens: int = 2048
    window_size: int = 32
    kernel_size: int = 7
    observed_layers: int = 8
    min_layer: int = 10
    threshold: float = 0.3
    latest_layer: int | None = None
    fixed_layer: int = 15
    compression: str = "snapkv"
    kv_budget: int | None = 2048
    kv_top_p: float = 0.95
    full_kv_below: bool = False
    decode_budget: int | None = None
    decode_floor: int | None = None
    recompress_interval: int = 128
    recompression: str = "snapkv"
    redundancy_weight: float = 0.1

    def __post_init__(self) -> None:
        for setting in fields(self):
            require_type(setting.name, getattr(self, setting.name), setting.type)
        require_choice("method", self.method, METHODS)
        require_choice("compression", self.compression, COMPRESSIONS)
        _require_window(self.window_size, self.kernel_size)
        require_range("observed_layers", self.observed_layers, 1, 1024)
        require_range("threshold", self.threshold, 0, 1e6)
        require_range("kv_top_p", self.kv_top_p, 0, 1, low_open=True)
        require_range("fixed_layer", self.fixed_layer, 0, 1023)
        _require_above_window("select_tokens", self.select_tokens, self.window_size)
        _require_above_window("kv_budget", self.kv_budget, self.window_size)
        _ = self.decode_side  # validates its fields
        if self.latest_layer is not None and self.latest_layer < self.min_layer:
            raise InvalidSetting(
                f"latest_layer is {self.latest_layer}; it must be at least "
                f"min_layer, {self.min_layer}",
                param="latest_layer",
            )

    @property
    def decode_side(self) -> Recompression:
        """The settings that decode needs."""
        names = {field.name for field in fields(Recompression)} - {"method"}
        own = {name: getattr(self, name) for name in names}
        return Recompression(method=self.recompression, **own)

    def max_prompt_entries(self, num_prompt_tokens: int, num_kv_heads: int) -> int:
        """The most KV entries per (layer, KV head) that prefill can keep of a prompt."""
        method = load(METHODS[self.method])
        return int(method.max_entries(self, num_prompt_tokens, num_kv_heads))

    def require_fits(self, shape: "ModelShape") -> None:
        """Raise InvalidSetting for what the layers of a model do not allow."""
        load(METHODS[self.method]).require_fits(self, shape)


def _require_window(window_size: int, kernel_size: int) -> None:
    require_range("window_size", window_size, 1, 1024)
    require_range("kernel_size", kernel_size, 1, 1023)
    if kernel_size % 2 == 0:
        raise InvalidSetting(f"kernel_size is {kernel_size}; it must be odd", param="kernel_size")


def _require_above_window(name: str, value: int | None, window_size: int) -> None:
    if value is None:
        return
    if value <= window_size:
        raise InvalidSetting(
            f"{name} is {value}; it must be above window_size, {window_size}", param=name
        )
    require_range(name, value, 1, MAX_COUNT)
