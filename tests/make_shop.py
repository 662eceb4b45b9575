"""A catalogue of fifty invented products in the files of WebShop, made anew from a seed."""

import json
from pathlib import Path
from random import Random

BRANDS = "Alder Birch Cedar Dogwood Elm Fennel Gorse Hazel Iris Juniper".split()
COLOURS = ["Black", "Navy Blue", "Forest Green", "Sky Blue/White", "Dark Red", "Sand"]
SIZES = ["Small", "Medium", "Large", "X-Large"]
PACKS = ["Pack of 2", "Pack of 6", "Pack of 12"]

# thing: (category, query, what it can be, what it can be chosen in)
KINDS = {
    "Water Bottle": (
        "Sports › Hydration › Bottles", "bottles",
        ["leak proof", "bpa free", "stainless steel", "double wall"], {"Color": COLOURS},
    ),
    "Rain Jacket": (
        "Clothing › Women › Jackets", "women's jackets",
        ["machine washable", "long sleeve", "quick drying"], {"Color": COLOURS, "Size": SIZES},
    ),
    "Running Shoes": (
        "Clothing › Men › Shoes", "men's shoes",
        ["rubber sole", "memory foam", "non slip"], {"Size": SIZES, "Color": COLOURS},
    ),
    "Green Tea": (
        "Grocery › Beverages › Tea", "tea",
        ["caffeine free", "sugar free", "usda organic"], {"Flavor Name": PACKS},
    ),
    "Table Lamp": (
        "Home › Lighting › Lamps", "lamps",
        ["easy to clean", "energy efficient", "solid wood"], {"Color": COLOURS, "Material": None},
    ),
    "Hand Cream": (
        "Beauty › Skin Care › Hands", "hand creams",
        ["fragrance free", "tea tree", "essential oils"], {"Size": PACKS},
    ),
    "USB Cable": (
        "Electronics › Accessories › Cables", "usb cables",
        ["fast charging", "high speed", "gold plated"], {"Color": COLOURS[:2], "Size": ["3ft"]},
    ),
    "Office Chair": (
        "Home › Furniture › Chairs", "chairs",
        ["lumbar support", "heavy duty", "easy assembly"], {},
    ),
    "Bed Sheets": (
        "Home › Bedding › Sheets", "bed sheets",
        ["machine washable", "queen size", "super soft"], {"Color": COLOURS},
    ),
    "Dog Leash": (
        "Pets › Dogs › Leashes", "dog leashes",
        ["heavy duty", "water resistant", "easy to clean"], {"Color": COLOURS, "Size": SIZES[:2]},
    ),
}  # fmt: skip


def price_of(draw: Random) -> str | None:
    """Most products have one price, some two, some none."""
    dollars = f"${draw.randint(5, 1100)}.{draw.choice(['99', '5', '00'])}"
    return draw.choice([dollars] * 6 + [dollars + "$1,200.00", "", None])


def make_product(asin: str, thing: str, draw: Random) -> tuple[dict, dict, list[dict]]:
    """A product, what is said of it, and what people asked for."""
    category, query, traits, options = KINDS[thing]
    chosen = draw.sample(traits, 2)
    brand = draw.choice(BRANDS)
    product = {
        "asin": asin,
        "name": f"{brand} {thing}, {chosen[0].title()}, for Home & Travel",
        "query": f" {query.title()}",
        "category": category.split()[0].lower(),
        "product_category": category,
        "full_description": f"This {thing.lower()} by {brand} is {chosen[1]}. It lasts for years.",
        "small_description": [f"{trait} and made to last" for trait in chosen],
        "pricing": price_of(draw),
        "images": ["none.jpg"],
        "customization_options": {
            name: values and [{"value": f" {value} ", "image": None} for value in values]
            for name, values in options.items()
        } or "",
    }  # fmt: skip
    asked = f"find me a {thing.lower()} that is {' and '.join(chosen)}"
    said = {"attributes": chosen, "instruction": asked, "instruction_attributes": chosen}
    values = [draw.choice(v).lower() for v in options.values() if v]
    wish = f"i want a {thing.lower()}, {chosen[0]}{''.join(', ' + v for v in values)}."
    human = {
        "instruction": wish,
        "instruction_attributes": chosen[:1],
        "instruction_options": values,
    }
    return product, said, [human, {**human, "instruction_attributes": []}]


def write_shop(folder: Path, large: bool = False) -> Path:
    """Write the files of fifty products, and some rows that do not count, to a folder."""
    draw = Random(7)
    products, said, human = [], {}, {}
    for number in range(50):
        asin = f"B{draw.randrange(10**9):09d}"
        made = make_product(asin, list(KINDS)[number % len(KINDS)], draw)
        products.append(made[0])
        if number % 7:
            said[asin] = made[1]
        if number % 3:
            human[asin] = made[2]
    products[20:20] = [{"asin": "nan"}, {"asin": "B0123456789"}, products[0] | {"name": "Twice"}]
    part = "" if large else "_1000"
    files = {f"items_shuffle{part}": products, f"items_ins_v2{part}": said}
    for name, content in (files | {"items_human_ins": human}).items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
