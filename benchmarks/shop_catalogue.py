"""The products of the shop and the goals of its customers, read from WebShop's files.

    items_shuffle.json       a list of products            5.5 GB, or its first 1,000 products in
                                                           items_shuffle_1000.json
    items_ins_v2.json        attributes of each product    or items_ins_v2_1000.json
    items_human_ins.json     what people asked for         needed with the large files only

With the large files the goals are those that people wrote, in the order of WebShop, so that the
first 200 are the paper's. Of the 1,000 products hardly any has such a goal: there the goals are
generated, one for every combination of a product's options, and are called so.

What WebShop draws without a seed has one here, of its own for each product: the price of those that
have two, and the limit that a goal names.

Source: WebShop (2207.01206), web_agent_site/engine/engine.py and goal.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as combinations
from pathlib import Path
from random import Random

from tqdm import tqdm

from benchmarks.items import json_items
from benchmarks.shop_reward import Goal, Product
from files import check_kinds, read_json

CURE = "give the folder of WebShop's data, which its setup.sh downloads"
ORDER = 233  # WebShop's seed for the order of the goals
NO_PRICE = 100.0  # dollars
LIMITS = range(10, 1000, 10)  # dollars
OF_PRODUCT = {
    **dict.fromkeys(["name", "query", "product_category", "full_description"], str),
    "small_description": object,  # a text or a list of them
}
OF_INSTRUCTION = {
    "instruction": str,
    "instruction_attributes": list[str],
    "instruction_options": list | dict,  # values, or name -> value
}
OF_GENERATED = {"instruction": str, "instruction_attributes": list[str]}


@dataclass(frozen=True)
class Catalogue:
    """All products, by asin, the goals in their order, and whether people wrote these."""

    products: dict[str, Product]
    goals: list[Goal]
    human: bool


def read_catalogue(folder: Path, seed: int) -> Catalogue:
    """Read products and goals. Raises: ValueError naming file and product if one is no good."""
    human = (folder / "items_shuffle.json").exists()
    part = "" if human else "_1000"
    path = folder / f"items_ins_v2{part}.json"
    said = read_said(path, dict)
    asked = (path, said, generated_goals)
    if human:
        path = folder / "items_human_ins.json"
        asked = (path, read_said(path, list), human_goals)
    products = read_products(folder / f"items_shuffle{part}.json", said, seed)
    goals = read_goals(products, *asked, seed)
    Random(ORDER).shuffle(goals)
    return Catalogue(products, goals, human)


def read_said(path: Path, kind: type) -> dict:
    """asin -> what a file says of this product, which must be of this kind."""
    said = read_json(path, CURE)
    for name, entry in said.items():
        if not isinstance(entry, kind):
            told = f"product {name}: {entry!r:.40} is no {kind.__name__}"
            raise ValueError(f"{path}: {told}; {CURE}")
    return said


# ---------------------------------------------------------------------------------------- products


def read_products(path: Path, said: dict, seed: int) -> dict[str, Product]:
    """asin -> product; of two with the same asin the first, and none without a proper one.

    said: asin -> what the file of attributes says.
    """
    products = {}
    rows = tqdm(json_items(path, CURE), path.name, unit=" products", leave=False, disable=None)
    for number, row in enumerate(rows, 1):
        name = row.get("asin") if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"{path}: entry {number} has no asin, so it is no product; {CURE}")
        if name == "nan" or len(name) > 10 or name in products:
            continue
        try:
            products[name] = read_product(row, said.get(name, {}), seed)
        except ValueError as error:
            raise ValueError(f"{path}: product {name}: {error}; {CURE}") from None
    return products


def read_product(row: dict, said: dict, seed: int) -> Product:
    """A product from its entries in the two files. Raises: ValueError for what makes none."""
    check_kinds(row, OF_PRODUCT)
    attributes = said.get("attributes") or []
    check_kinds({"attributes": attributes}, {"attributes": list[str]})
    prices = read_prices(row.get("pricing"))
    price = prices[0]
    if len(prices) == 2:
        price = Random(f"{seed} price {row['asin']}").uniform(*prices)
    bullets = row["small_description"]
    return Product(
        asin=row["asin"],
        title=row["name"],
        query=row["query"].lower().strip(),
        category=row["product_category"],
        description=row["full_description"],
        bullets=tuple(map(str, bullets if isinstance(bullets, list) else [bullets])),
        attributes=tuple(attributes),
        options=read_options(row.get("customization_options")),
        price=price,
        price_tag=" to ".join(f"${price}" for price in prices),
    )


def read_prices(text: str | None) -> list[float]:
    """One or two prices in dollars: what follows each $, and 100 where nothing is said."""
    if not text:
        return [NO_PRICE]
    parts = text.split("$")[1:3] if isinstance(text, str) else []
    prices = [re.sub(r"[^\d.]", "", part) for part in parts]
    if not prices or not all(re.fullmatch(r"\d+\.?\d*|\.\d+", price) for price in prices):
        raise ValueError(f"pricing = {text!r:.40} is no price like $12.50")
    return [float(price) for price in prices]


def read_options(said: dict | None) -> dict[str, list[str]]:
    """name -> values that can be chosen, all in lower case."""
    options = {}
    try:
        for name, values in (said or {}).items():
            if values is not None:
                texts = [value["value"].strip().replace("/", " | ") for value in values]
                options[name.lower()] = [text.lower() for text in texts]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"customization_options = {said!r:.60} are no options") from None
    return options


def search_text(item: Product) -> str:
    """What the search engine knows of a product."""
    options = [f"{name}: {', '.join(values)}" for name, values in item.options.items()]
    bullet = item.bullets[0] if item.bullets else ""
    return " ".join([item.title, item.description, bullet, ", and ".join(options)])


# ------------------------------------------------------------------------------------------- goals


def draw_limit(price: float, draw: Random) -> tuple[float | None, str]:
    """A limit above a price, and the words that name it; none above the dearest products.

    It is the larger of two of the next four multiples of ten, so never the very next.
    """
    nearest = [limit for limit in LIMITS if limit > price][:4]
    if len(nearest) < 2:
        return None, ""
    limit = max(draw.sample(nearest, 2))
    return float(limit), f", and price lower than {limit:.2f} dollars"


def read_goals(products: dict, path: Path, said: dict, goals_of, seed: int) -> list[Goal]:
    """All goals in the order of the products. goals_of: from what is said of a product, at path."""
    goals = []
    for name, item in products.items():
        try:
            goals += goals_of(item, said.get(name, ()), seed)
        except ValueError as error:
            raise ValueError(f"{path}: product {name}: {error}; {CURE}") from None
    if not goals:
        raise ValueError(f"{path}: no goal for any of {len(products)} products; {CURE}")
    return goals


def human_goals(item: Product, said: list, seed: int) -> Iterator[Goal]:
    """What people asked for who saw this product; without attributes it does not count."""
    for number, row in enumerate(said):
        check_kinds(row if isinstance(row, dict) else {}, OF_INSTRUCTION)
        attributes = tuple(row["instruction_attributes"])
        if not attributes:
            continue
        limit, words = draw_limit(item.price, Random(f"{seed} limit {item.asin} {number}"))
        options = row["instruction_options"]
        options = tuple(options.items() if isinstance(options, dict) else options)
        yield Goal(item, row["instruction"].strip(".") + words, attributes, options, limit)


def generated_goals(item: Product, said: dict, seed: int) -> Iterator[Goal]:
    """A goal for each combination of the options, if the product has an instruction."""
    if not said or said.get("instruction") is None:
        return
    check_kinds(said, OF_GENERATED)
    attributes = tuple(said["instruction_attributes"])
    limit, words = draw_limit(item.price, Random(f"{seed} limit {item.asin}"))
    names = sorted(item.options)
    for values in combinations(*(item.options[name] for name in names)):
        options = tuple(zip(names, values, strict=True))
        asked = ", and ".join(f"{name}: {value}" for name, value in options)
        asked = f" with {asked}" if asked else ""
        yield Goal(item, said["instruction"] + asked + words, attributes, options, limit)
