"""Word lists for keys and filler prose."""

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    able amber ancient angry bitter blue bold brave brief bright broad broken busy calm careful
    cheap clean clear clever cold common cool curious dark deep different dry dull eager early
    easy empty fair famous fast fine firm flat fresh full gentle giant glad golden good grand
    gray great green happy hard heavy hidden high hollow honest huge humble icy jolly keen kind
    large late lazy light little lively lonely long loud lucky mellow mild modern narrow neat
    new noble odd old open pale plain polite poor proud pure quick quiet rapid rare red rich
    rough round royal rusty sad safe sharp short shy silent silver simple slow small smooth soft
    solid sour steady steep still strange strong sunny sweet swift tall tame tender thick thin
    tiny tired vast warm weak wet white wide wild windy wise wooden yellow young
    """
)

NOUNS = _words(
    """
    anchor apple arrow autumn badge basket beach bell bird boat book bottle branch bread bridge
    brook bucket butter button cabin camel candle canyon castle cat cave chair cherry city cloud
    coast coin copper corner cottage cup desert dog door dream drum eagle engine falcon farm
    feather field fire fish flower forest fountain fox frog garden gate glass grape hammer
    harbor hawk hill horse house island jacket jar jungle kettle key king kitchen kite ladder
    lake lamp lantern leaf lemon letter lion market meadow mirror monkey moon mountain needle
    nest night oak ocean orange otter owl paper path pearl pencil piano picture pine planet
    plate pocket pond queen rabbit rain ribbon ring river road rock roof rope rose sail salt
    school seed shadow sheep shell ship shoe sky snow song spoon spring squirrel star stone
    storm story street stream summer sun table tea temple tiger tower town train tree tunnel
    turtle valley village violin wagon wall water whale wheel wind window winter wolf wood world
    """
)

VERBS = _words(
    """
    answers avoids becomes builds calls carries catches covers crosses draws enters feels finds
    follows forgets gathers guards guides hears helps hides holds joins keeps knows leads learns
    leaves likes loses loves makes meets misses moves needs notices opens paints passes praises
    pulls pushes reaches remembers saves sees sends shows stops studies takes touches trusts
    turns visits wants warms watches wins
    """
)

PREPOSITIONS = _words(
    """
    above across after along around before behind below beside beyond from in near over through
    toward under with without
    """
)

ADVERBS = _words(
    """
    again almost always daily early fast gladly later never nightly now often once quickly
    quietly rarely slowly sometimes soon still then together twice yearly
    """
)

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"


def made_up_word(rng: random.Random) -> str:
    """A pronounceable made-up word of two or three syllables."""
    syllables = [
        rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(("", "", rng.choice("lmnrst")))
        for _ in range(rng.randint(2, 3))
    ]
    return "".join(syllables)
