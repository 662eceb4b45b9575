"""What a purchase in the shop is worth.

    reward = type * (attributes hit + options hit + [price <= limit])
                  / (attributes + options + 1)

    attribute  hit if the product has one with a token-set ratio above 85, or if its title, bullets
               or description contain it
    option     hit if one of the chosen values, colours reduced to their plain name, has a token-set
               ratio above 85
    type       1; 0.5 if nothing says that it is the same kind of product: neither the query under
               which it was collected, nor two levels of its category, nor a title score above 0.2;
               then 0.1 if the title score is below 0.1, and 0 if it is 0
    title      of the nouns of the wanted title the share that the bought one has; 0.2 without any

This is WebShop's code; the formula that its paper prints inverts a case of the type. Its nouns come
from spaCy's tagger. Here all content words stand in for them, so that a title score can differ:
adjectives and verbs count as well.

Source: WebShop (2207.01206) section 3.1 and its web_agent_site/engine/goal.py; thefuzz 0.19.0 with
difflib, the version that it pins.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

CLOSE = 85  # per cent; a ratio above it is a hit

# in this order, in which the first that a value contains is its plain name
COLOURS = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower "
    "tan taupe teal tiger turquoise violet walnut wheat white wine yellow"
).split()

# what carries no content: articles, prepositions, pronouns, auxiliaries, conjunctions
EMPTY_WORDS = frozenset(
    "a about above after all also an and any are as at be below between both but by can each "
    "every for from has have in into is it its more most no non not of off on only onto or other "
    "our out over own per plus she so some such than that the their them then these they this "
    "those through to under up upon via was we were when where which while who will with within "
    "without you your".split()
)


@dataclass(frozen=True, slots=True)
class Product:
    """A product of the catalogue. price is what a purchase costs, price_tag what the pages say."""

    asin: str
    title: str
    query: str  # of the search that found it when the catalogue was collected
    category: str  # levels, with › between them
    description: str
    bullets: tuple[str, ...]
    attributes: tuple[str, ...]
    options: dict[str, list[str]]  # name -> values, in lower case
    price: float  # dollars
    price_tag: str


@dataclass(frozen=True, slots=True)
class Goal:
    """What an instruction asks for. An option is a value or (name, value); no limit is None."""

    product: Product
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str | tuple[str, str], ...]
    limit: float | None  # dollars


# --------------------------------------------------------------------------------- token-set ratio


def tokens(text: str) -> set[str]:
    """Runs of letters and digits in lower case; what Latin-1 has beyond ASCII is dropped."""
    return set(re.sub(r"\W", " ", re.sub(r"[\x80-\xff]", "", text)).lower().split())


def ratio(a: str, b: str) -> int:
    """Matching characters of both texts, in per cent of all their characters."""
    return round(100 * SequenceMatcher(None, a, b).ratio())


def token_set_ratio(a: str, b: str) -> int:
    """How alike two texts are, 0 to 100; the order of words is nothing, more words are forgiven.

    Compared are the shared words, these with the rest of a, and these with the rest of b.
    """
    of_a = tokens(a)
    of_b = tokens(b)
    if not of_a or not of_b:
        return 0
    shared = sorted(of_a & of_b)
    both = " ".join(shared)
    whole_a = " ".join(shared + sorted(of_a - of_b))
    whole_b = " ".join(shared + sorted(of_b - of_a))
    return max(ratio(both, whole_a), ratio(both, whole_b), ratio(whole_a, whole_b))


# ---------------------------------------------------------------------------------------- the parts


def content_words(title: str) -> list[str]:
    """The words of a title that may be nouns, in lower case: no numbers, no empty words."""
    words = re.findall(r"[^\W_]+(?:['’.][^\W_]+)*", title.lower())
    return [word for word in words if word not in EMPTY_WORDS and re.search(r"[^\W\d_]", word)]


def title_score(bought: str, wanted: str) -> float:
    """The share of the wanted title's words that the bought one has; a word twice is two words."""
    words = content_words(wanted)
    shared = set(words) & set(content_words(bought))
    return len(shared) / len(words) if words else 0.2


def type_reward(bought: Product, wanted: Product) -> float:
    """1, 0.5, 0.1 or 0: is it the same kind of product?"""
    levels = [{level.strip() for level in p.category.split("›")} for p in (bought, wanted)]
    score = title_score(bought.title, wanted.title)
    if score < 0.1:
        return 0.1 if score > 0 else 0.0
    same = bought.query == wanted.query or len(levels[0] & levels[1]) >= 2 or score > 0.2
    return 1.0 if same else 0.5


def attribute_hits(bought: Product, wanted: Iterable[str]) -> int:
    """How many of the wanted attributes the product has, or names in its texts."""
    texts = (bought.title, " ".join(bought.bullets), bought.description)
    texts = [text.lower() for text in texts]
    return sum(
        any(token_set_ratio(own, asked) > CLOSE for own in bought.attributes)
        or any(asked in text for text in texts)
        for asked in wanted
    )


def plain_colour(value: str) -> str:
    """The first colour that a value contains, or the value."""
    return next((colour for colour in COLOURS if colour in value), value)


def option_text(option: str | tuple[str, str]) -> str:
    """What a chosen value is compared with.

    Of (name, value) it is both words, unless one of them is a colour and nothing else.
    """
    if isinstance(option, str):
        return plain_colour(option)
    return next((colour for colour in COLOURS if colour in option), " ".join(option))


def option_hits(chosen: Iterable[str], wanted: Iterable[str | tuple[str, str]]) -> int:
    """How many of the wanted options one of the chosen values is."""
    values = [plain_colour(value) for value in chosen]
    asked = [option_text(option) for option in wanted]
    return sum(any(token_set_ratio(value, text) > CLOSE for value in values) for text in asked)


def reward(bought: Product, goal: Goal, chosen: dict[str, str]) -> dict:
    """Score a purchase -> {"score": 0 to 1, and its parts}. chosen: option name -> value."""
    kind = type_reward(bought, goal.product)
    attributes = attribute_hits(bought, goal.attributes)
    options = option_hits(chosen.values(), goal.options)
    cheap = goal.limit is None or bought.price <= goal.limit
    hits = attributes + options + cheap
    return {
        "score": kind * hits / (len(goal.attributes) + len(goal.options) + 1),
        "type": kind,
        "attributes": f"{attributes} of {len(goal.attributes)}",
        "options": f"{options} of {len(goal.options)}",
        "price": cheap,
    }
