"""The drawn people and their clothes, dressed at random for summer or winter.

Of every five people three are look-alikes, which differ from each other in one detail only.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from personmae.synthetic.canvas import Bgr
from personmae.synthetic.rng import Rng, pick, pick_weighted, rng_of

LEAST_VIVID = 0.05  # share of a named colour's saturation that every garment has
LOOK_ALIKES, GROUP = 3, 5  # of every five identities three differ from each other in one detail only

# fmt: off
_COLOURS: dict[str, Bgr] = {
    "black": (22, 20, 20), "charcoal": (58, 54, 52), "grey": (135, 132, 130), "white": (246, 246, 248),
    "navy": (92, 48, 34), "blue": (185, 98, 48), "sky": (222, 178, 122), "denim": (135, 95, 70), "red": (48, 42, 190),
    "wine": (52, 34, 112), "pink": (175, 140, 232), "orange": (45, 120, 235), "yellow": (60, 205, 235),
    "green": (70, 145, 60), "olive": (55, 95, 95), "mint": (180, 215, 150), "beige": (150, 185, 208),
    "brown": (48, 70, 105), "purple": (140, 60, 120), "teal": (130, 125, 35),
}
# What is drawn how often: name -> weight.
_BRIGHT = {
    "white": 8, "black": 6, "grey": 3, "navy": 2, "charcoal": 2, "sky": 2, "blue": 1, "red": 2, "pink": 1, "orange": 1,
    "yellow": 1, "green": 1, "mint": 1, "beige": 2, "purple": 1,
}
_DARK = {
    "black": 8, "charcoal": 3, "navy": 3, "grey": 2, "brown": 2, "olive": 1, "wine": 1, "beige": 2, "blue": 1,
    "red": 1, "green": 1, "purple": 1, "white": 2,
}
_LEGS = {
    "black": 6, "denim": 3, "navy": 3, "charcoal": 2, "grey": 2, "beige": 3, "white": 2, "olive": 1, "brown": 1,
    "wine": 1, "sky": 2,
}
_SHOES = {"black": 2, "white": 2, "brown": 1, "red": 1, "grey": 1}
_SKINS = ((175, 200, 232), (150, 180, 222), (120, 155, 205), (90, 125, 180), (60, 88, 135), (45, 62, 95))
_HAIRS = (
    (28, 26, 28), (36, 40, 52), (45, 66, 96), (80, 130, 175), (110, 180, 215), (165, 165, 168), (40, 62, 140),
)
_UPPERS = {
    "summer": {"tshirt": 3, "longsleeve": 2, "vest": 1, "hoodie": 1, "jacket": 1, "dress": 1},
    "winter": {"coat": 2, "jacket": 2, "hoodie": 1, "longsleeve": 1},
}
_LOWERS = {
    "summer": {"trousers": 2, "leggings": 1, "shorts": 2, "skirt": 1, "longskirt": 1, "wide": 1},
    "winter": {"trousers": 3, "wide": 1, "leggings": 1, "longskirt": 1},
}
_DECORATIONS = {
    "none": 3, "hstripes": 1, "vstripes": 1, "checks": 1, "dots": 1, "twotone": 1, "sleeves": 2, "logo": 2,
    "backprint": 1, "open": 2,
}
_LOWER_DECORATIONS = {"none": 6, "sidestripe": 1, "checks": 1}
_BAGS = {"none": 6, "backpack": 5, "shoulder": 4, "handbag": 4, "shopping": 2, "umbrella": 1}
_HAIRSTYLES = {"short": 3, "bald": 1, "bob": 1, "long": 2, "ponytail": 1, "bun": 1}
_HEADWEAR = {
    "summer": {"none": 6, "cap": 2, "hat": 1},
    "winter": {"none": 5, "beanie": 2, "cap": 1, "hat": 1},
}
_SCARVES = {"summer": {"none": 19, "scarf": 1}, "winter": {"none": 2, "scarf": 1}}
_DETAILS = {"bag": 3, "hair": 1, "decoration": 1, "headwear": 1, "shoes": 1, "upper": 1, "scarf": 1, "lower": 1}
# fmt: on


class Garment(NamedTuple):
    """A piece of clothing: its cut and main colour."""

    cut: str
    colour: Bgr


class Item(NamedTuple):
    """Something worn, carried, grown or printed. Kind ``none`` means it is absent."""

    kind: str
    colour: Bgr


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that stays the same between two images of one person. Each field is one visible detail."""

    height: float  # of the figure in its detection box, 0.9..1
    build: float  # width factor, 0.85 slim .. 1.25 heavy
    curved: float  # 0 straight shoulders-to-hip line .. 1 narrow waist and shoulders
    skin: Bgr
    hair: Item  # bald, short, bob, long, ponytail, bun
    upper: Garment  # tshirt, longsleeve, jacket, coat, hoodie, dress, vest
    decoration: Item  # hstripes, vstripes, checks, dots, twotone, sleeves; logo, open (front only); backprint (back only)
    lower: Garment  # trousers, leggings, wide, shorts, skirt, longskirt
    lower_decoration: Item  # none, sidestripe, checks
    shoes: Item  # shoes, boots
    bag: Item  # none, backpack, shoulder, handbag, shopping, umbrella
    carry_side: int  # +1 the person's left hand, -1 the right
    headwear: Item  # none, cap, hat, beanie
    scarf: Item  # none, scarf


def _colour(rng: Rng, names: dict[str, int]) -> Bgr:
    """A named colour, a little off and mostly muted: few clothes are as vivid as their colour's name."""
    vivid = LEAST_VIVID + (1 - LEAST_VIVID) * rng.random() ** 2
    named = _COLOURS[pick_weighted(rng, names)]
    grey = sum(named) / 3
    b, g, r = (min(max(round(grey + (c - grey) * vivid) + int(rng.integers(-9, 10)), 8), 248) for c in named)
    return b, g, r


def sample_identity(rng: Rng, domain: str) -> Identity:
    """A person dressed for ``summer`` or ``winter``."""
    cloth = _BRIGHT if domain == "summer" else _DARK
    who = Identity(
        height=rng.uniform(0.9, 1.0),
        build=rng.uniform(0.82, 1.22),
        curved=rng.random(),
        skin=pick(rng, _SKINS),
        hair=Item(pick_weighted(rng, _HAIRSTYLES), pick(rng, _HAIRS)),
        upper=Garment(pick_weighted(rng, _UPPERS[domain]), _colour(rng, cloth)),
        decoration=Item(pick_weighted(rng, _DECORATIONS), _colour(rng, _BRIGHT)),
        lower=Garment(pick_weighted(rng, _LOWERS[domain]), _colour(rng, _LEGS)),
        lower_decoration=Item(pick_weighted(rng, _LOWER_DECORATIONS), _colour(rng, _BRIGHT)),
        shoes=Item("boots" if rng.random() < 0.2 else "shoes", _colour(rng, _SHOES)),
        bag=Item(pick_weighted(rng, _BAGS), _colour(rng, pick(rng, (_BRIGHT, _DARK)))),
        carry_side=1 if rng.random() < 0.5 else -1,
        headwear=Item(pick_weighted(rng, _HEADWEAR[domain]), _colour(rng, cloth)),
        scarf=Item(pick_weighted(rng, _SCARVES[domain]), _colour(rng, _BRIGHT)),
    )
    return _wearable(who)


def look_alikes(rng: Rng, domain: str) -> list[Identity]:
    """Three identities that are the same but for one detail, in which all three differ."""
    base = sample_identity(rng, domain)
    detail = pick_weighted(rng, _DETAILS)
    if detail == "lower" and base.upper.cut == "dress":
        detail = "bag"  # a dress leaves no lower garment to see
    group = [base]
    while len(group) < LOOK_ALIKES:
        value = getattr(sample_identity(rng, domain), detail)
        if detail in ("upper", "lower"):
            value = getattr(base, detail)._replace(colour=value.colour)
        one = _wearable(replace(base, **{detail: value}))
        if all(_differ(getattr(one, detail), getattr(other, detail)) for other in group):
            group.append(one)
    return group


def _wearable(who: Identity) -> Identity:
    """Only jackets, coats and hoodies are worn open, and short sleeves are not set off."""
    heavy = who.upper.cut in ("jacket", "coat", "hoodie")
    swap = {"open": "twotone", "sleeves": "logo"}.get(who.decoration.kind)
    if heavy or swap is None or (who.decoration.kind == "sleeves" and who.upper.cut == "longsleeve"):
        return who
    return replace(who, decoration=who.decoration._replace(kind=swap))


def _differ(a: Item | Garment, b: Item | Garment) -> bool:
    """Whether two values of one detail can be told apart in an image: another kind, or a clearly other colour."""
    return a[0] != b[0] or (a[0] != "none" and sum(abs(p - q) for p, q in zip(a.colour, b.colour, strict=True)) > 120)


@lru_cache(maxsize=4096)
def identity_of(seed: int, split: str, index: int) -> Identity:
    """Identity ``index`` of a split."""
    group, member = divmod(index, GROUP)
    domain = domain_of(split, index)
    if member < LOOK_ALIKES:
        return look_alikes(rng_of(seed, split, "identity", group, 0), domain)[member]
    return sample_identity(rng_of(seed, split, "identity", group, member), domain)


def domain_of(split: str, index: int) -> str:
    if split == "pool":
        return ("summer", "winter")[index // GROUP % 2]
    return "winter" if split.startswith("duke") else "summer"
