"""Sampling: the next token of every row of a batch, in one call and without waiting for the device.

    p      = softmax(logits' / T), zero where min-p, top-k or top-p exclude a token
    token  = argmax over tokens of p / E,    E = -ln(u),  u uniform in (0, 1)

logits' are the logits after penalties, biases and `min_tokens`. Dividing by exponential noise is
the Gumbel-max trick: each token wins with probability p. u is a hash of (seed, position, token id),
so a row's token depends on nothing else: not on the batch, its order or the device, and a sequence
that migrates to another worker continues unchanged. Such noise also makes it robust: logits that
differ in their last bits rarely change the token.

The race has two rounds: between blocks of BLOCK_SIZE token ids by their total probability, then
between the tokens of the block that won (blocks.py, draw.py). P(block) · P(token | block) is the
same distribution, with noise for hundreds of entrants instead of a whole vocabulary. So the noise
can be float64, whose precision a long tail of rare tokens needs.

Precision: logits, penalties and weights are float32, as the model gives them; noise, the weights in
the second round and the sums that decide top-p among sorted candidates are float64, and so are the
totals of the two blocks that come first in the first round. So it makes no difference to a token
how a device or a kernel rounds float32 sums, unless such a sum decides where top-p cuts a row whose
candidates are not sorted. A greedy row is an argmax.

A change by which some seed gives another token needs a new SAMPLER_VERSION
(winnow/sampler_version.py).
"""

from winnow.sampling.batch import Sampled, SampledBatch, sample_batch
from winnow.sampling.state import SamplingState

__all__ = ["Sampled", "SampledBatch", "SamplingState", "sample_batch"]
