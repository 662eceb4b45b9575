"""A web page cut down to what surrounds a few of its elements, and spelled in few tokens.

    <div><form><input name="q" type="text" placeholder="City"/><button class="Go"/></form></div>
    <form> <input id=0 text q city /> <button go /> </form>

Kept are the candidates, their ancestors, what is inside them (six levels, the first fifty
elements) and three neighbours on either side. A wrapper that says nothing and holds at most one
element gives way to it. Only candidates have an id, counted from 0 in the order of the page. The
page is Mind2Web's cleaned_html: well-formed XML whose words stand in elements <text> and whose
elements are named by backend_node_id.

Source: Mind2Web (2306.06070) section 3, as AgentBench (2308.03688) runs it.
"""

from html import unescape
from xml.etree.ElementTree import Element

ID = "backend_node_id"
LEVELS = 6  # inside a candidate
INSIDE = 50  # elements inside a candidate
NEIGHBOURS = 3  # on either side of a candidate
WORDS = 20  # of a text, and of all attributes of an element
ATTRIBUTES = (
    "role aria_role type alt aria_description aria_label label title name text_value value "
    "placeholder input_checked input_value option_selected class"
).split()
ATTRIBUTE_WORDS = 5
LONGEST = 14  # letters of a word in an attribute; longer ones are no words
SAYS_NOTHING = ("hidden", "none", "presentation", "null", "undefined")


def candidates_on(page: Element, names: list[str]) -> dict[str, Element]:
    """name -> element, for those of the names that the page has."""
    found = {}
    for node in page.iter():
        if node.tag != "text" and node.get(ID) in names:
            found.setdefault(node.get(ID), node)
    return found


def inside(node: Element, levels: int = LEVELS) -> list[Element]:
    """The elements inside a node in the order of the page, down to some levels."""
    if levels == 0:
        return []
    return [found for child in node for found in (child, *inside(child, levels - 1))]


def around(page: Element, candidates: list[Element]) -> set[Element]:
    """The elements to keep."""
    parents = {child: parent for parent in page.iter() for child in parent}
    keep = set(candidates)
    for node in candidates:
        keep.update(inside(node)[:INSIDE])
        if node in parents:
            row = [child for child in parents[node] if child.tag != "text"]
            place = row.index(node)
            keep.update(row[max(0, place - NEIGHBOURS) : place + NEIGHBOURS + 1])
        while node in parents:
            node = parents[node]
            keep.add(node)
    return keep


def prune(page: Element, names: list[str]) -> Element:
    """A new page with what stands around the candidates of these names; no others have an id."""
    candidates = list(candidates_on(page, names).values())
    keep = around(page, candidates)

    def cut(node: Element) -> list[Element]:
        """What takes the place of a node in the new page: none, itself, or what it wrapped."""
        if node.tag != "text" and node not in keep:
            return []
        new = Element(node.tag, node.attrib)
        new.text = node.text
        new.tail = node.tail
        new.extend(piece for child in node for piece in cut(child))
        if node not in candidates:
            new.attrib.pop(ID, None)
        says = new.attrib or node.tag == "text" or any(child.tag == "text" for child in new)
        return [new] if says or len(new) > 1 or node is page else list(new)

    return cut(page)[0]


def attribute_words(node: Element) -> list[str]:
    """What the attributes of an element say, each thing once."""
    said = []
    for name in ATTRIBUTES:
        value = node.get(name, "").lower()
        if value in SAYS_NOTHING or value.startswith("http"):
            continue
        words = [word for word in value.split() if len(word) <= LONGEST]
        words = words[:ATTRIBUTE_WORDS]
        if words and words not in said:
            said.append(words)
    return sum(said, [])[:WORDS]


def words_of(text: str | None) -> list[str]:
    return (text or "").replace('"', " ").split()


def spelled(node: Element, numbers: dict[str, int]) -> list[str]:
    """The words of an element and all in it. numbers: name -> id of each candidate."""
    if node.tag == "text":
        return words_of(node.text)[:WORDS]
    named = [f"id={numbers[node.get(ID)]}"] if node.get(ID) in numbers else []
    head = [f"<{node.tag}", *named, *attribute_words(node)]
    if not len(node) and not node.text:
        return [*head, "/>"]
    head[-1] += ">"
    words = [*head, *words_of(node.text)]
    for child in node:
        words += spelled(child, numbers) + words_of(child.tail)
    return [*words, f"</{node.tag}>"]


def spell(node: Element, numbers: dict[str, int]) -> str:
    """An element as the agent reads it."""
    return " ".join(unescape(" ".join(spelled(node, numbers))).split())
