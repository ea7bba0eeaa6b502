"""The building blocks of retrieval, written into the initial weights of a model.

The initial hidden state has blocks (`Block`): what a token is, the four before it, digests of the
five tokens that end 2 places back (where `ABCDE = 1` is read, `BCDE =`) and 8 places back (where
`ABCDE = VAR FGHIJ` ends), and a pointer, at first the digest of the five tokens before the last.
Five kinds of heads fill and use them:

* look-back heads (layers 0 and 1): keys are constant, so that after RoPE the logit depends only on
  the distance and peaks at one offset;
* copying heads (the repeated layer): copy what came next where the last tokens occurred before;
* a reading head (the repeated layer): reads what follows the name that the pointer holds;
* a following head (the repeated layer): finds the name that the pointer's name is assigned from,
  with which the MLP replaces the pointer;
* a fetching head (the repeated layer): writes to the same block as the following head, but learns
  where to look: at the question's key.

These are only initial values: every weight is trained. Contents are matched in the rotary pairs
that hardly rotate within the context.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 4, 32
GROUP = NUM_HEADS // NUM_KV_HEADS
NUM_BEFORE = 4
FIRST_SLOW_PAIR = 6
DIGEST = 2 * (HEAD_DIM // 2 - FIRST_SLOW_PAIR)  # 20: the dimensions of a head that can be matched
BEFORE = 16
LOOK_BACK_PAIRS = 5
LOOK_BACK_LOGIT = 14.0  # at 8, a tenth of the attention leaks at 4k tokens; at 14, under 1%
CONTENT_STD = 0.5
COPY_GAIN, COPY_OUTPUT = 2.0, 0.15
FOLLOW_GAIN, FOLLOW_OUTPUT = 3.5, 0.8
GATE, MOVE = 4.0, 0.09  # at a hidden state of rms 0.6, GATE · MOVE / rms² = 1
CONSTANT = 1.0
READING_KV_HEAD, FOLLOWING_KV_HEAD = 2, 3
READING_HEAD, FOLLOWING_HEAD = READING_KV_HEAD * GROUP, FOLLOWING_KV_HEAD * GROUP
FETCHING_HEAD = FOLLOWING_HEAD + 1


@dataclass(frozen=True)
class Block:
    """A range of hidden dimensions."""

    start: int
    size: int

    @property
    def dims(self) -> slice:
        return slice(self.start, self.start + self.size)


OWN = Block(0, 96)
BEFORES = tuple(Block(96 + BEFORE * i, BEFORE) for i in range(NUM_BEFORE))  # 1, 2, 3, 4 tokens back
READ, LINK, POINTER, NEXT = (Block(160 + DIGEST * i, DIGEST) for i in range(4))
ONE = Block(240, 1)
HIDDEN = 256


def lay_out(model: Qwen2ForCausalLM, repeated_layer: int, assigns: int) -> None:
    """Overwrite part of the model's weights with the circuits.

    assigns: ID of the token between a name and what is assigned to it, ` =`.
    """
    with torch.no_grad():
        _Circuits(model, repeated_layer, assigns).write()


class _Circuits:
    def __init__(self, model: Qwen2ForCausalLM, repeated_layer: int, assigns: int) -> None:
        self._model, self._assigns = model, assigns
        self._layers = model.model.layers
        self._repeated = self._layers[repeated_layer]
        self._contents, self._turns = _maps()

    def write(self) -> None:
        embedding = self._model.model.embed_tokens.weight
        embedding.zero_()
        embedding[:, OWN.dims].normal_(std=CONTENT_STD)
        embedding[:, ONE.dims] = CONSTANT
        self._write_look_back()
        self._write_digests()
        self._write_copying()
        self._write_following()

    def _digest(self) -> Tensor:
        """The digest of a token and the four before it: [DIGEST, HIDDEN]."""
        digest = torch.zeros(DIGEST, HIDDEN)
        digest[:, OWN.dims] = self._turns[0] @ self._contents[0][:BEFORE]
        for turn, block in zip(self._turns[1:], BEFORES, strict=True):
            digest[:, block.dims] = turn
        return digest / math.sqrt(NUM_BEFORE + 1)

    def _write_look_back(self) -> None:
        """Layer 0: the contents of the tokens 1 to 4 places back."""
        value = torch.zeros(HEAD_DIM, HIDDEN)
        value[:BEFORE, OWN.dims] = self._contents[0][:BEFORE]
        offsets = {head: head + 1 for head in range(NUM_BEFORE)}
        self._look_back(0, offsets, value, dict(enumerate(BEFORES)), CONTENT_STD / 1.6)

    def _write_digests(self) -> None:
        """Layer 1: digests of the tokens that end 2, 8 and 1 places back."""
        value = torch.zeros(HEAD_DIM, HIDDEN)
        value[:DIGEST] = self._digest()
        offsets, blocks = {0: 2, 1: 8, 2: 1}, {0: READ, 1: LINK, 2: POINTER}
        self._look_back(1, offsets, value, blocks, CONTENT_STD)

    def _look_back(
        self,
        layer_idx: int,
        offsets: dict[int, int],
        value: Tensor,
        blocks: dict[int, Block],
        gain: float,
    ) -> None:
        """Heads at fixed offsets; each writes what `value` reads at its offset into its block."""
        attention = self._layers[layer_idx].self_attn
        frequencies = self._model.model.rotary_emb.inv_freq[:LOOK_BACK_PAIRS]
        # q·k / √d = Σ amplitude² cos(angle) / √d, so each pair carries LOOK_BACK_LOGIT at its peak.
        amplitude = math.sqrt(LOOK_BACK_LOGIT * math.sqrt(HEAD_DIM))
        for head, offset in offsets.items():
            rows, kv_rows = _rows(head), _rows(head // GROUP)
            attention.q_proj.weight[rows] = 0
            attention.q_proj.bias[rows] = amplitude * _rotary_bias(-offset * frequencies)
            attention.k_proj.weight[kv_rows] = 0
            attention.k_proj.bias[kv_rows] = amplitude * _rotary_bias(0 * frequencies)
            attention.v_proj.weight[kv_rows] = value
            block = blocks[head]
            attention.o_proj.weight[:, rows] = 0
            attention.o_proj.weight[block.dims, rows] = gain * torch.eye(block.size, HEAD_DIM)

    def _write_copying(self) -> None:
        """Heads 0 and 2 of the repeated layer: copy what came after the last 3 or 4 tokens."""
        for kv_head, num_matched in ((0, 3), (1, 4)):
            query, key = torch.zeros(HEAD_DIM, HIDDEN), torch.zeros(HEAD_DIM, HIDDEN)
            for turn, block in zip(self._turns, BEFORES[:num_matched], strict=False):
                key[_slow(), block.dims] = COPY_GAIN * turn
            query[_slow(), OWN.dims] = COPY_GAIN * self._turns[0] @ self._contents[0][:BEFORE]
            for turn, block in zip(self._turns[1:], BEFORES[: num_matched - 1], strict=False):
                query[_slow(), block.dims] = COPY_GAIN * turn
            self._write_head(kv_head, query, key)
            self._copy_out(kv_head)

    def _write_following(self) -> None:
        """Head 4 reads what follows the pointer's name; 6 follows the link from it, 7 fetches."""
        pointer = torch.zeros(HEAD_DIM, HIDDEN)
        pointer[_slow(), POINTER.dims] = FOLLOW_GAIN * torch.eye(DIGEST)
        for kv_head, block in ((READING_KV_HEAD, READ), (FOLLOWING_KV_HEAD, LINK)):
            key = torch.zeros(HEAD_DIM, HIDDEN)
            key[_slow(), block.dims] = FOLLOW_GAIN * torch.eye(DIGEST)
            self._write_head(kv_head, pointer, key)
        self._copy_out(READING_KV_HEAD)
        attention = self._repeated.self_attn
        attention.v_proj.weight[_rows(FOLLOWING_KV_HEAD)] = 0
        attention.v_proj.weight[_rows(FOLLOWING_KV_HEAD)][:DIGEST] = self._digest_of_assigned()
        out = FOLLOW_OUTPUT * torch.eye(DIGEST, HEAD_DIM)
        for head in (FOLLOWING_HEAD, FETCHING_HEAD):
            attention.o_proj.weight[:, _rows(head)] = 0
            attention.o_proj.weight[NEXT.dims, _rows(head)] = out
        self._write_move()

    def _digest_of_assigned(self) -> Tensor:
        """The digest one token later, if ` =` follows: [DIGEST, HIDDEN]."""
        later = torch.zeros(DIGEST, HIDDEN)
        assigns = self._model.model.embed_tokens.weight[self._assigns, OWN.dims]
        name = self._contents[0][:BEFORE]
        later[:, ONE.dims] = (self._turns[0] @ name @ assigns)[:, None] / CONSTANT
        later[:, OWN.dims] = self._turns[1] @ name
        for turn, block in zip(self._turns[2:], BEFORES, strict=False):
            later[:, block.dims] = turn
        return later / math.sqrt(NUM_BEFORE + 1)

    def _write_move(self) -> None:
        """MLP units that replace the pointer with the next one; their gates stay open."""
        mlp = self._repeated.mlp
        forget, advance = slice(0, DIGEST), slice(DIGEST, 2 * DIGEST)
        for units, block in ((forget, POINTER), (advance, NEXT)):
            mlp.gate_proj.weight[units] = 0
            mlp.gate_proj.weight[units, ONE.dims] = GATE
            mlp.up_proj.weight[units] = 0
            mlp.up_proj.weight[units, block.dims] = torch.eye(DIGEST)
            mlp.down_proj.weight[:, units] = 0
            mlp.down_proj.weight[block.dims, units] = -MOVE * torch.eye(DIGEST)
        mlp.down_proj.weight[POINTER.dims, advance] = MOVE * torch.eye(DIGEST)

    def _write_head(self, kv_head: int, query: Tensor, key: Tensor) -> None:
        attention = self._repeated.self_attn
        attention.q_proj.weight[_rows(kv_head * GROUP)] = query
        attention.k_proj.weight[_rows(kv_head)] = key

    def _copy_out(self, kv_head: int) -> None:
        """The head's values are token contents; its output makes those tokens more likely."""
        attention = self._repeated.self_attn
        attention.v_proj.weight[_rows(kv_head)] = 0
        attention.v_proj.weight[_rows(kv_head), OWN.dims] = self._contents[kv_head]
        rows = _rows(kv_head * GROUP)
        attention.o_proj.weight[:, rows] = 0
        attention.o_proj.weight[OWN.dims, rows] = COPY_OUTPUT * self._contents[kv_head].T


def _maps() -> tuple[Tensor, list[Tensor]]:
    """contents: orthogonal maps of a token's own content to heads, [3, HEAD_DIM, OWN].

    turns: how the content of a token at distance j enters a digest, [DIGEST, BEFORE] each.
    """
    generator = torch.Generator().manual_seed(1)
    square = torch.randn(OWN.size, OWN.size, generator=generator)
    contents = torch.linalg.qr(square).Q.view(-1, HEAD_DIM, OWN.size)
    turns = [
        torch.linalg.qr(torch.randn(DIGEST, DIGEST, generator=generator)).Q[:, :BEFORE]
        for _ in range(NUM_BEFORE + 1)
    ]
    return contents, turns


def _rows(head: int) -> slice:
    return slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)


def _slow() -> list[int]:
    """A head's dimensions that hardly rotate: [DIGEST]."""
    pairs = [*range(FIRST_SLOW_PAIR, HEAD_DIM // 2)]
    return pairs + [pair + HEAD_DIM // 2 for pair in pairs]


def _rotary_bias(phases: Tensor) -> Tensor:
    """Unit vectors at `phases` in the fastest pairs; pair i is (i, i + HEAD_DIM / 2)."""
    bias = torch.zeros(HEAD_DIM)
    bias[: len(phases)] = phases.cos()
    bias[HEAD_DIM // 2 : HEAD_DIM // 2 + len(phases)] = phases.sin()
    return bias
