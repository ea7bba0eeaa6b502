"""How a layer attends, besides its queries, keys and values."""

from dataclasses import dataclass, replace

from torch import Tensor

from winnow.kernels.softmax import capped
from winnow.layers import FULL, Layer


@dataclass(frozen=True, slots=True, eq=False)
class AttentionOptions:
    """Attention logits are s = q·k * scaling, or softcap * tanh(s / softcap) with a softcap.

    layer: which earlier tokens are attended to, by their positions.
    sinks: [H], a logit of each head that takes part in the softmax and has no value.
    """

    scaling: float
    layer: Layer = FULL
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is scaled dot-product attention to all earlier tokens."""
        return self.layer.is_full and self.is_plain_softmax

    @property
    def is_plain_softmax(self) -> bool:
        """Whether the weights are the softmax of scaled products, over whatever is attended to."""
        return self.softcap is None and self.sinks is None

    def within(self, num_tokens: int) -> "AttentionOptions":
        """The same for a prompt of so many tokens, whose layer may be full if it is short."""
        window = self.layer.window
        return self if window is None or window < num_tokens else replace(self, layer=FULL)

    def logits(self, products: Tensor) -> Tensor:
        """The logits of products q·k, [...] float32, in their place."""
        return capped(products.mul_(self.scaling), self.softcap)

    def grouped_sinks(self, num_kv_heads: int) -> Tensor | None:
        """The sinks as float32 [H_kv, group, 1, 1]."""
        if self.sinks is None:
            return None
        return self.sinks.float().view(num_kv_heads, -1, 1, 1)
