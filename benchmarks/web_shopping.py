"""Web shopping: buy in a shop of text pages what an instruction asks for.

    python evaluate.py web_shopping --run runs/web_shopping                a shop of our own
    python evaluate.py web_shopping --run runs/web_shopping --data PATH    WebShop's, from a folder

The measure is the mean reward over the first 200 goals. A page shows its texts with [SEP] between
them and what can be clicked on it; the agent answers with search[words] or click[text]. There are
ten turns; a reply without an action ends the purchase with 0, an action that the page does not
offer shows the page again, and nothing bought is worth 0.

    search page     the instruction and a search bar
    results         ten products a page of the fifty best
    product         its options, price, and Buy Now; sub-pages Description, Features, Reviews

As in WebShop a search is possible on every page, whatever has_search_bar says, and who opens a
list of results has no option chosen any more. Left out: its special queries (<r>, <a>, <c>, <q>),
and reviews, which it does not load either.

Source: WebShop (2207.01206), text mode, commit 64fa2a5; AgentBench (2308.03688), web shopping.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from benchmarks.driver import Episode, Sample
from benchmarks.shop_catalogue import read_catalogue, search_text
from benchmarks.shop_reward import Goal, Product, reward
from benchmarks.shop_search import Index
from flags import SEED, WHOLE
from prompt import shopping_action
from runs import text_hash

REPLY_TOKENS = 512
MEASURES = ()
TURNS = 10
PAGE = 10  # products
FOUND = 50  # products
TABS = ("Description", "Features", "Reviews")
OURS = Path(__file__).parent / "data/web_shopping"


class Shop:
    """Products that can be searched."""

    def __init__(self, products: dict[str, Product]):
        self.products = products
        self.index = Index((asin, search_text(item)) for asin, item in products.items())

    def search(self, words: str) -> list[Product]:
        return [self.products[asin] for asin in self.index.search(words, FOUND)]


class Session:
    """One customer in the shop: the page that she sees, and what she has chosen so far."""

    def __init__(self, shop: Shop, goal: Goal):
        self.shop = shop
        self.goal = goal
        self.bought = None  # the reward and its parts
        self.start()

    # ------------------------------------------------------------------------------------- ways

    def start(self) -> None:
        """Open the search page."""
        self.show = self.search_page
        self.forget()

    def forget(self) -> None:
        self.item = None
        self.chosen = {}  # option name -> value

    def search(self, words: str) -> None:
        self.hits = self.shop.search(words)
        self.turn_to(1)

    def turn_to(self, number: int) -> None:
        """Open a page of results, counted from 1; behind the last one pages are empty."""
        self.number = number
        self.show = self.results_page
        self.forget()

    def open(self, item: Product) -> None:
        self.item = item
        self.show = self.item_page

    def choose(self, name: str, value: str) -> None:
        self.chosen[name] = value
        self.show = self.item_page

    def open_tab(self, tab: str) -> None:
        self.show = partial(self.tab_page, tab)

    def buy(self) -> None:
        self.bought = reward(self.item, self.goal, self.chosen)

    def act(self, name: str, argument: str) -> None:
        """Do what an action says, if the page offers it."""
        if name == "search":
            self.search(argument)
        elif way := self.show()[1].get(argument):
            way()

    # ------------------------------------------------------------------------------------ pages
    # texts of a page, and way behind each text that can be clicked

    def search_page(self) -> tuple[list[str], dict[str, Callable]]:
        ways = {"search": lambda: None}  # it is listed, and a click on it does nothing
        return ["WebShop", "Instruction:", self.goal.instruction, "Search"], ways

    def results_page(self) -> tuple[list[str], dict[str, Callable]]:
        texts = [f"Page {self.number} (Total results: {len(self.hits)})"]
        ways = {}
        if self.number > 1:
            texts.append("< Prev")
            ways["< prev"] = partial(self.turn_to, self.number - 1)
        texts.append("Next >")
        ways["next >"] = partial(self.turn_to, self.number + 1)
        for item in self.hits[(self.number - 1) * PAGE : self.number * PAGE]:
            texts += [item.asin, item.title, item.price_tag]
            ways[item.asin.lower()] = partial(self.open, item)
        return self.framed(texts, ways)

    def item_page(self) -> tuple[list[str], dict[str, Callable]]:
        item = self.item
        texts = ["< Prev"]
        ways = {"< prev": partial(self.turn_to, self.number)}
        ways |= {tab.lower(): partial(self.open_tab, tab) for tab in TABS}
        ways["buy now"] = self.buy
        for name, values in item.options.items():
            texts += [name, *values]
            ways |= {value: partial(self.choose, name, value) for value in values}
        texts += [item.title, f"Price: {item.price_tag}", "Rating: N.A.", *TABS, "Buy Now"]
        return self.framed(texts, ways)

    def tab_page(self, tab: str) -> tuple[list[str], dict[str, Callable]]:
        inside = {"Description": [self.item.description], "Features": self.item.bullets}
        texts = ["< Prev", *inside.get(tab, [])]
        return self.framed(texts, {"< prev": partial(self.open, self.item)})

    def framed(self, texts: list[str], ways: dict) -> tuple[list[str], dict[str, Callable]]:
        """A page with the instruction above it."""
        above = ["Instruction:", self.goal.instruction, "Back to Search"]
        return above + texts, {"back to search": self.start} | ways

    def page(self) -> str:
        """The page as the agent reads it."""
        texts, ways = self.show()
        text = " [SEP] ".join(part.strip() for part in texts if part)
        offer = {"has_search_bar": self.show == self.search_page, "clickables": list(ways)}
        return f"Observation:\n{text}\n\nAvailable Actions:\n{offer}"


# ---------------------------------------------------------------------------------- the benchmark


@dataclass(frozen=True)
class Visit:
    """A sample: a goal to be met in the shop."""

    id: str
    goal: Goal
    shop: Shop


def load(path: Path, n: int = 200, seed: int = 0) -> list[Visit]:
    """The first n goals of a folder of WebShop's files, or all if there are fewer.

    seed: of drawn prices and limits. Raises: ValueError naming a file that is missing or no good.
    """
    catalogue = read_catalogue(Path(path), seed)
    shop = Shop(catalogue.products)
    kind = "human" if catalogue.human else "generated"
    goals = enumerate(catalogue.goals[:n])
    return [Visit(f"{kind}-{number}-seed-{seed}", goal, shop) for number, goal in goals]


def episode(visit: Visit) -> Episode:
    """One purchase: yields the conversation so far, is sent the agent's reply, returns a score."""
    session = Session(visit.shop, visit.goal)
    said = [session.page()]
    known = {"goals": visit.id.partition("-")[0], "wanted": visit.goal.product.asin}
    for turn in range(1, TURNS + 1):
        reply = yield said
        action = shopping_action(reply)
        if action is None:
            return {"score": 0.0, "ended": "no action", "turns": turn, **known}
        session.act(*action)
        if session.bought:
            known |= {"bought": session.item.asin, "chosen": session.chosen}
            return {**session.bought, "ended": "bought", "turns": turn, **known}
        said = [*said, reply, session.page()]
    return {"score": 0.0, "ended": "nothing bought", "turns": TURNS, **known}


# --------------------------------------------------------------------------------- command


def add_flags(add: Callable) -> None:
    add("--data", type=Path, default=OURS, help="folder of WebShop's files")
    add("--samples", type=WHOLE, default=200, help="goals to play, the first ones")
    add("--seed", type=SEED, default=0, help="of drawn prices and limits")


def samples(args) -> list[Sample]:
    """Visits to the shop at --data. What one finds there depends on all its products."""
    visits = load(args.data, args.samples, args.seed)
    stock = sha256()
    for item in visits[0].shop.products.values():
        stock.update(repr(item).encode())
    kind = visits[0].id.partition("-")[0]
    print(f"{len(visits)} {kind} goals in a shop of {len(visits[0].shop.products):,} products")
    return [
        Sample(visit.id, text_hash(f"{stock.hexdigest()} {visit.goal}"), partial(episode, visit))
        for visit in visits
    ]
