import torch

from winnow.rotary import RotaryTables


def test_takes_the_same_tokens_of_every_table() -> None:
    cos, sin, both = torch.rand(3, 1, 6, 4).unbind()
    every = RotaryTables(torch.arange(6)[None], {"pair": (cos, sin), "one": both})
    for tokens, own in ((torch.tensor([1, 4]), [1, 4]), (slice(4, None), [4, 5])):
        some = every.take(tokens)
        assert some.positions.tolist() == [own]
        one, pair = some.by_kind["one"], some.by_kind["pair"]
        assert isinstance(one, torch.Tensor) and torch.equal(one, both[:, own])
        assert torch.equal(pair[0], cos[:, own]) and torch.equal(pair[1], sin[:, own])
