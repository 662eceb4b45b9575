"""The search engine of the shop: words of a text, their stems, and BM25 over the stems.

    score(d, q) = sum over the stems t of q of  idf(t) tf / (tf + k1 (1 - b + b |d| / mean))
    idf(t)      = log(1 + (N - n_t + 0.5) / (n_t + 0.5))

    tf  how often t stands in d        |d|  stems of d, mean over all documents
    n_t documents that have t          N    documents

WebShop searches with Pyserini 0.17, that is Lucene 8, whose habits are kept, since they decide what
an agent sees: lengths are rounded to one byte, equal scores go by id, a stem that stands twice in q
counts twice. Left out: word borders of scripts that put no spaces between words.

Source: Robertson and Zaragoza 2009, section 3.4; Porter 1980; Unicode annex 29 (words).
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

K1 = 0.9
B = 0.4

# ---------------------------------------------------------------------------------- words, stems

# letters and digits, joined by ' . : between letters and by ' . , ; between digits; or a sign
ANY = r"[^\W¹²³¼-¾⅐-⅞]"
LETTER = r"[^\W\d_¹²³¼-¾⅐-⅞]"
JOINT = rf"(?<={LETTER})['’.:·](?={LETTER})|(?<=\d)['’.,;](?=\d)"
WORD = re.compile(rf"{ANY}+(?:(?:{JOINT}){ANY}+)*|[©®™]")
STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)


def stems(text: str) -> Iterator[str]:
    """The stems of a text in order, without stop words."""
    return filter(None, map(stem_of, WORD.findall(text.lower())))


@cache
def stem_of(word: str) -> str:
    """The stem of a word in lower case, "" of a stop word and of a mere line."""
    word = re.sub("['’]s$", "", word)
    return "" if word in STOP_WORDS or not word.strip("_") else porter(word)


def shape(word: str) -> str:
    """c for every consonant of a word, v for every vowel; y is a vowel behind a consonant."""
    kinds = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and kinds[-1:] == "c")
        kinds += "v" if vowel else "c"
    return kinds


def measure(stem: str) -> int:
    """Porter's m: how many runs of vowels have a consonant behind them."""
    return len(re.findall("v+c", shape(stem)))


def short(stem: str) -> bool:
    """Porter's *o: does it end like "hop", consonant, vowel, consonant other than w, x, y?"""
    return shape(stem)[-3:] == "cvc" and stem[-1] not in "wxy"


def doubled(stem: str) -> bool:
    """Porter's *d: does it end with the same consonant twice?"""
    return shape(stem)[-2:] == "cc" and stem[-1] == stem[-2]


def pairs(text: str) -> dict[str, str]:
    """ "ending:instead ..." -> the table, longest ending first."""
    table = dict(pair.split(":") for pair in text.split())
    return dict(sorted(table.items(), key=lambda pair: -len(pair[0])))


# bli and logi: Porter's own later changes, which Lucene has
SECOND = pairs(
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e "
    "ousli:ous ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous "
    "aliti:al iviti:ive biliti:ble logi:log"
)
THIRD = pairs("icate:ic ative: alize:al iciti:ic ical:ic ful: ness:")
FOURTH = pairs(
    "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ion: ou: ism: ate: iti: ous: ive: "
    "ize:"
)


def porter(word: str) -> str:
    """The stem of a word by Porter's five steps; words of one or two letters stay as they are."""
    if len(word) <= 2:
        return word
    word = without_past(without_plural(word))
    if word.endswith("y") and "v" in shape(word[:-1]):
        word = word[:-1] + "i"
    for table, least in ((SECOND, 1), (THIRD, 1), (FOURTH, 2)):
        word = replaced(word, table, least)
    return without_end(word)


def without_plural(word: str) -> str:
    """Step 1a."""
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def without_past(word: str) -> str:
    """Step 1b: -eed, -ed, -ing, and what their loss leaves to be mended."""
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    stem = re.sub("(ed|ing)$", "", word)
    if stem == word or "v" not in shape(stem):
        return word
    if stem.endswith(("at", "bl", "iz")) or (measure(stem) == 1 and short(stem)):
        return stem + "e"
    return stem[:-1] if doubled(stem) and stem[-1] not in "lsz" else stem


def replaced(word: str, table: dict[str, str], least: int) -> str:
    """Steps 2 to 4: replace the longest ending that the table has, if what is left is long."""
    for ending, instead in table.items():
        stem = word[: -len(ending)]
        if word.endswith(ending) and (ending != "ion" or stem.endswith(("s", "t"))):
            return stem + instead if measure(stem) >= least else word
    return word


def without_end(word: str) -> str:
    """Step 5: a last e, and the second of two l."""
    m = measure(word)
    if word.endswith("e") and (m > 1 or (m == 1 and not short(word[:-1]))):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and measure(word) > 1 else word


# ------------------------------------------------------------------------------------------ BM25


def byte_length(length: np.ndarray) -> np.ndarray:
    """Lengths as Lucene's byte gives them back: exact to 24, and four leading bits of the rest."""
    rest = np.maximum(length - 24, 0)
    bits = np.frexp(rest.astype(float))[1]  # of the binary number
    lost = np.maximum(bits - 4, 0)
    return np.minimum(length, 24) + (rest >> lost << lost)


class Index:
    """Documents to search. Holds a weight for every stem of every document, stem by stem."""

    def __init__(self, documents: Iterable[tuple[str, str]]):
        """documents: (id, text) of each."""
        self.ids = []
        self.numbers = {}  # of the stems
        stem, document, count = array("i"), array("i"), array("i")
        for number, (name, text) in enumerate(documents):
            self.ids.append(name)
            for word, tf in Counter(stems(text)).items():
                stem.append(self.numbers.setdefault(word, len(self.numbers)))
                document.append(number)
                count.append(tf)
        self.arrange(*(np.asarray(column, dtype=np.int32) for column in (stem, document, count)))

    def arrange(self, stem: np.ndarray, document: np.ndarray, count: np.ndarray) -> None:
        """Sort the postings by stem and weigh them. All (P,): stem, document, tf of a posting."""
        length = np.bincount(document, count, len(self.ids)).astype(np.int64)
        filled = max(1, np.count_nonzero(length))
        mean = max(1.0, length.sum() / filled)
        slope = K1 * (1 - B + B * byte_length(length) / mean)
        n = np.bincount(stem, minlength=len(self.numbers))
        idf = np.log1p((filled - n + 0.5) / (n + 0.5))
        order = np.argsort(stem, kind="stable")
        self.document = document[order]
        self.weight = (idf[stem] * count / (count + slope[document])).astype(np.float32)[order]
        self.ends = np.concatenate([[0], np.cumsum(n)])
        self.by_id = np.argsort(np.argsort(self.ids))  # place of each document in the order of ids

    def search(self, query: str, k: int = 50) -> list[str]:
        """The ids of the k best documents, best first; only such as share a stem with the query."""
        scores = np.zeros(len(self.ids))
        for stem in stems(query):
            if (number := self.numbers.get(stem)) is not None:
                part = slice(self.ends[number], self.ends[number + 1])
                scores[self.document[part]] += self.weight[part]
        k = min(k, np.count_nonzero(scores))
        if k == 0:
            return []
        hits = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        order = np.lexsort((self.by_id[hits], -scores[hits]))
        return [self.ids[i] for i in hits[order[:k]]]
