"""Web shopping: pages and actions, purchases, the catalogue and its goals, files; no model."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from make_shop import write_shop

from benchmarks import items
from benchmarks.shop_catalogue import draw_limit, read_catalogue, read_options, read_prices
from benchmarks.shop_reward import Goal, Product
from benchmarks.web_shopping import OURS, Session, Shop, Visit, episode, load
from prompt import TASKS, parse_prompt, shopping_action

PROMPT = parse_prompt((Path(__file__).parent.parent / "web_shopping.txt").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_shop(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_shop(tmp_path_factory.mktemp("large"), large=True)


@pytest.fixture(scope="module")
def visits(small):
    return load(small)


def play(visit: Visit, replies) -> tuple[dict, list[str]]:
    """Let scripted replies play an episode -> (its result, the conversation as last shown)."""
    game = episode(visit)
    said = next(game)
    assert len(said) == 1
    try:
        for reply in replies:
            before = said
            said = game.send(reply)
            assert said[:-1] == [*before, reply]
    except StopIteration as end:
        return end.value, said
    raise AssertionError("the episode goes on")


def parts(session: Session) -> list[str]:
    """The texts of a page."""
    text = session.page().partition("\n\nAvailable Actions:\n")[0]
    return text.removeprefix("Observation:\n").split(" [SEP] ")


def buying(visit: Visit) -> list[str]:
    """The replies of an agent that knows what to buy."""
    goal = visit.goal
    replies = [f"search[{goal.product.title}]", f"click[{goal.product.asin}]"]
    chosen = [option[1] if isinstance(option, tuple) else option for option in goal.options]
    replies += [f"click[{value}]" for value in chosen]
    return [f"Thought:\nI go on.\n\nAction:\n{reply}" for reply in [*replies, "click[Buy Now]"]]


# ---------------------------------------------------------------- the pages are those of the prompt


def product_of_prompt(row: str, options: dict) -> Product:
    """A product from "asin [SEP] title [SEP] price" of the results in the prompt."""
    asin, title, price = row.split(" [SEP] ")
    dollars = float(price.removeprefix("$"))
    return Product(
        asin, title, "bottle", "a", "", (), ("stainless steel",), options, dollars, price
    )


def test_the_conversation_of_the_prompt():
    """Its products in our shop give its five pages, word for word, and the purchase is worth 1."""
    users = [text for role, text in PROMPT.turns if role == "user"]
    agents = [text for role, text in PROMPT.turns if role == "assistant"]
    pages = [text[text.index("Observation:\n") :] for text in users]
    listed = pages[1].partition("\n\n")[0].split("Next > [SEP] ")[1]
    rows = re.findall(r"B0\w{8} \[SEP] .*? \[SEP] \$[\d.]+", listed)
    bottle, *others = [
        product_of_prompt(row, {"color": ["black", "green", "sand"]}) for row in rows
    ]
    wanted = re.search(r"Instruction: \[SEP] (.*?) \[SEP]", pages[0])[1]
    goal = Goal(bottle, wanted, ("stainless steel",), ("green",), 30.0)
    shop = Shop({item.asin: item for item in (bottle, *others)})
    shop.search = lambda words: [bottle, *others]  # in the prompt's order; it shows 3 of 50
    pages[1] = pages[1].replace("Total results: 50", "Total results: 3")
    result, said = play(Visit("human-0", goal, shop), agents)
    assert said[::2] == pages and said[1::2] == agents[:-1]
    assert result["score"] == 1 and result["turns"] == len(agents)


# --------------------------------------------------------------------------------- pages and ways


def test_results_are_ten_a_page(visits):
    """At most fifty hits; the first page has no < Prev; behind the last a page is empty."""
    session = Session(visits[0].shop, visits[0].goal)
    session.act("search", "home travel lasts")
    assert parts(session)[2:5] == ["Back to Search", "Page 1 (Total results: 50)", "Next >"]
    first = parts(session)[5:]
    assert (
        len(first) == 3 * 10 and "'clickables': ['back to search', 'next >', 'b" in session.page()
    )
    for number in range(2, 7):
        session.act("click", "next >")
        assert f"Page {number} (Total" in session.page()
    assert parts(session)[4:] == ["< Prev", "Next >"]  # after the number nothing but the ways
    for _ in range(5):
        session.act("click", "< prev")
    assert parts(session)[5:] == first


def test_a_product_and_its_sub_pages(visits):
    """Options in front of the title; description and features on pages of their own, no reviews."""
    session = Session(visits[0].shop, visits[0].goal)
    item = visits[0].goal.product
    session.act("search", item.title)
    session.act("click", item.asin.lower())
    shown = [text for name, values in item.options.items() for text in (name, *values)]
    shown += [item.title, f"Price: {item.price_tag}", "Rating: N.A."]
    assert parts(session)[3:] == [
        "< Prev",
        *shown,
        *"Description Features Reviews".split(),
        "Buy Now",
    ]
    page = session.page()
    for tab, texts in (
        ("description", [item.description]),
        ("features", item.bullets),
        ("reviews", []),
    ):
        session.act("click", tab)
        assert parts(session)[3:] == ["< Prev", *texts]
        assert session.page().endswith("'clickables': ['back to search', '< prev']}")
        session.act("click", "< prev")
        assert session.page() == page


def test_what_a_page_does_not_offer_changes_nothing(visits):
    """Neither does a click on the search button; but a search works on every page."""
    session = Session(visits[0].shop, visits[0].goal)
    for argument in ("buy now", "next >", "search", "b000000000"):
        page = session.page()
        session.act("click", argument)
        assert session.page() == page and not session.bought
    session.act("search", visits[0].goal.product.title)
    session.act("click", visits[0].goal.product.asin.lower())
    session.act("search", "zebra")
    assert parts(session)[3:] == ["Page 1 (Total results: 0)", "Next >"]


def test_a_list_of_results_forgets_the_options(visits):
    """A sub-page does not; of two values of an option the last counts."""
    session = Session(visits[0].shop, visits[0].goal)
    item = next(p for p in visits[0].shop.products.values() if "color" in p.options)
    session.act("search", item.title)
    session.act("click", item.asin.lower())
    for argument in (item.options["color"][0], "features", "< prev", item.options["color"][1]):
        session.act("click", argument)
    assert session.chosen == {"color": item.options["color"][1]}
    session.act("click", "< prev")
    assert "Page 1" in session.page() and session.chosen == {}
    session.act("click", "back to search")
    assert "'has_search_bar': True" in session.page()


# -------------------------------------------------------------------------------------- purchases


def test_who_buys_what_was_asked_for_gets_all(visits):
    """With every option chosen the reward is 1, and the result says what was bought."""
    for visit in visits[::20]:
        result, _ = play(visit, buying(visit))
        assert result["score"] == 1 and result["goals"] == "generated"
        assert result["bought"] == result["wanted"] == visit.goal.product.asin


def test_our_own_shop_is_the_one_that_is_made(small):
    """The committed files are those of make_shop.py."""
    for file in OURS.iterdir():
        assert file.read_bytes() == (small / file.name).read_bytes()


def test_options_that_are_not_clicked_are_missed(visits):
    """Two attributes, two options, the price: without the options 3 of 5."""
    visit = next(v for v in visits if len(v.goal.options) == 2 and v.goal.limit)
    replies = buying(visit)
    result, _ = play(visit, [*replies[:2], replies[-1]])
    assert result["score"] == pytest.approx(3 / 5) and result["options"] == "0 of 2"


def test_nothing_bought_is_worth_nothing(visits):
    """A reply without an action ends at once; ten turns are all."""
    result, _ = play(visits[0], ["I would search for it."])
    assert (result["score"], result["ended"], result["turns"]) == (0, "no action", 1)
    result, said = play(visits[0], ["Action:\nsearch[x]"] * 10)
    assert (result["score"], result["ended"], len(said)) == (0, "nothing bought", 19)


def test_the_agents_form_is_that_of_the_task():
    """What the shop does is what prompt.py parses."""
    assert TASKS["web_shopping"].action is shopping_action
    assert shopping_action("Action:\nClick[Buy Now]") == ("click", "buy now")


# -------------------------------------------------------------------------- catalogue and goals


def test_products_are_read_once_and_only_proper_ones(small):
    """Fifty: not "nan", no long asin, of two the first; values in lower case with | for /."""
    products = read_catalogue(small, 0).products
    assert len(products) == 50 and all(p.title != "Twice" for p in products.values())
    bottle = next(p for p in products.values() if "Bottle" in p.title)
    assert "sky blue | white" in bottle.options["color"] and bottle.query == "bottles"
    lamp = next(p for p in products.values() if "Lamp" in p.title)
    assert list(lamp.options) == ["color"]  # of its material nothing is known


@pytest.mark.parametrize(
    ("text", "prices"),
    [
        ("$12.50", [12.5]),
        ("$1,234.00", [1234]),
        ("$5.99$10", [5.99, 10]),
        ("$5 - $6.5 $7", [5, 6.5]),
        ("", [100]),
        (None, [100]),
    ],
)
def test_prices(text, prices):
    """What follows each $, at most two; 100 dollars where nothing is said."""
    assert read_prices(text) == prices


def test_of_two_prices_one_is_drawn(small):
    """By seed and product: between both, the same each time; the pages show the two."""
    costs = [
        {asin: p.price for asin, p in read_catalogue(small, seed).products.items()}
        for seed in (0, 0, 1)
    ]
    two = {a: p for a, p in read_catalogue(small, 0).products.items() if " to $" in p.price_tag}
    assert costs[0] == costs[1] != costs[2] and two
    for asin, item in two.items():
        low, high = sorted(float(end) for end in item.price_tag.replace("$", "").split(" to "))
        assert low < costs[0][asin] < high and costs[0][asin] != costs[2][asin]


def test_limits_are_multiples_of_ten_above_the_price():
    """The larger of two of the next four: of 24.95 it is 40, 50 or 60; none near 1,000 dollars."""

    class Draw:
        def sample(self, limits, n):
            seen.append(limits)
            return limits[:n]

    seen = []
    assert draw_limit(24.95, Draw()) == (40, ", and price lower than 40.00 dollars")
    assert draw_limit(30, Draw())[0] == 50 and draw_limit(979, Draw())[0] == 990
    assert seen == [[30, 40, 50, 60], [40, 50, 60, 70], [980, 990]]
    assert draw_limit(980, Draw()) == draw_limit(1200.0, Draw()) == (None, "")


def test_generated_goals_are_all_combinations(small, visits):
    """Of each product that has an instruction; no goal stands for two."""
    catalogue = read_catalogue(small, 0)
    said = json.loads((small / "items_ins_v2_1000.json").read_text())
    count = Counter(goal.product.asin for goal in catalogue.goals)
    assert not catalogue.human and count.keys() == said.keys()
    jacket = next(p for p in catalogue.products.values() if "Jacket" in p.title and p.asin in said)
    assert count[jacket.asin] == len(jacket.options["color"]) * len(jacket.options["size"])
    texts = [goal.instruction for goal in catalogue.goals if goal.product is jacket]
    assert len(set(texts)) == len(texts)
    assert any(" with color: black, and size: small" in text for text in texts)


def test_human_goals_are_those_with_attributes(large):
    """With the large files: a goal an instruction; its full stop gives way to the limit."""
    catalogue = read_catalogue(large, 0)
    human = json.loads((large / "items_human_ins.json").read_text())
    assert catalogue.human and len(catalogue.goals) == len(human)
    assert len({goal.product.asin for goal in catalogue.goals}) == len(human)
    for goal in catalogue.goals:
        wish = human[goal.product.asin][0]
        assert goal.options == tuple(wish["instruction_options"])
        words = f", and price lower than {goal.limit:.2f} dollars" if goal.limit else ""
        assert goal.instruction == wish["instruction"].strip(".") + words
        assert goal.limit is None or goal.limit > goal.product.price
    visit = load(large, 3)[2]
    assert visit.id == "human-2-seed-0" and play(visit, buying(visit))[0]["score"] == 1


def test_goals_come_in_webshops_order(large):
    """Its seed 233 shuffles them, whatever ours is; ours draws the limits."""
    first, again, other = ([v.goal for v in load(large, 9, seed)] for seed in (0, 0, 1))
    assert first == again and first != other
    assert [goal.attributes for goal in first] == [goal.attributes for goal in other]
    order = list(range(33))
    Random(233).shuffle(order)
    asins = list(json.loads((large / "items_human_ins.json").read_text()))
    assert [goal.product.asin for goal in first] == [asins[i] for i in order[:9]]


# ------------------------------------------------------------------------------------------ files


def test_a_folder_without_the_files(tmp_path, small):
    """The first file that is missing is named, and where the files are to be had."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(
            ValueError, match=r"items_ins_v2_1000.json: No such file.*; give the fol"
        ):
            load(path)
    (tmp_path / "items_ins_v2_1000.json").write_bytes(
        (small / "items_ins_v2_1000.json").read_bytes()
    )
    with pytest.raises(ValueError, match=r"items_shuffle_1000.json: No such file"):
        load(tmp_path)
    (tmp_path / "items_shuffle_1000.json").write_text("[]")
    with pytest.raises(ValueError, match="no goal for any of 0 products"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("shuffle_1000", lambda rows: rows[3].update(pricing="12"), "pricing = '12' is no price"),
        ("shuffle_1000", lambda rows: rows[3].update(pricing="$1.2.3"), "pricing = '$1.2.3' is no"),
        ("shuffle_1000", lambda rows: rows[3].update(pricing=7), "pricing = 7 is no price"),
        ("shuffle_1000", lambda rows: rows[3].pop("name"), "lacks name"),
        ("shuffle_1000", lambda rows: rows[3].pop("small_description"), "lacks small_desc"),
        ("shuffle_1000", lambda rows: rows[3].update(query=None), "query = None is not"),
        ("shuffle_1000", lambda rows: rows[3].update(customization_options=[1]), "options = [1]"),
        ("shuffle_1000", lambda rows: rows[3].pop("asin"), "entry 4 has no asin"),
        ("shuffle_1000", lambda rows: rows.insert(0, "x"), "entry 1 has no asin"),
        ("ins_v2_1000", lambda said: said.update({list(said)[2]: 5}), "5 is no dict"),
        ("ins_v2_1000", lambda said: said[list(said)[2]].update(instruction=5), "instruction = 5"),
    ],
)
def test_a_file_that_is_no_good(tmp_path, file, change, words):
    """One line with the file, the product, the value and the cure."""
    path = write_shop(tmp_path) / f"items_{file}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load(tmp_path)
    told = str(error.value)
    assert told.startswith(f"{path}: ") and "; give the folder of WebShop's data" in told
    assert "\n" not in told and len(told) < 300


def test_human_goals_that_are_no_good(tmp_path):
    """The same for what people asked for."""
    path = write_shop(tmp_path, large=True) / "items_human_ins.json"
    human = json.loads(path.read_text())
    name = next(iter(human))
    lacking = {"instruction": "x", "instruction_attributes": ["y"]}
    for value, words in (
        ([lacking], "lacks instruction_options"),
        (["x"], "lacks"),
        (3, "3 is no"),
    ):
        path.write_text(json.dumps(human | {name: value}))
        with pytest.raises(ValueError, match=f"{path}: product {name}: {words}.*; give the folder"):
            load(tmp_path)


def test_options_may_be_missing():
    """Nothing, an empty text, or nothing for a name."""
    assert read_options(None) == read_options("") == read_options({"Size": None}) == {}


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_list_is_read_in_blocks(tmp_path, monkeypatch, block):
    """Whatever the size of a block, the entries are those that json.load finds."""
    monkeypatch.setattr(items, "BLOCK", block)
    wanted = [{"a": [1, "]", '"', "\\"]}, "x, y", None, {}, [[]], "é🙂"]
    path = tmp_path / "list.json"
    for indent in (None, 2):
        path.write_text(json.dumps(wanted, indent=indent) + "\n", encoding="utf-8")
        assert list(items.json_items(path, "cure")) == wanted
    path.write_text(json.dumps(wanted)[:-1])
    with pytest.raises(ValueError, match=r"list.json: not a list in JSON .*; cure"):
        list(items.json_items(path, "cure"))
