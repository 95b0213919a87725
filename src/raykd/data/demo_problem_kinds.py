"""Demo problem kinds: the twelve kinds of word problem as data (phrasings, words, ranges, steps)."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kind:
    """One kind of problem: its question, the ranges of its numbers, and the steps of its solution."""

    name: str
    questions: tuple[str, ...]
    """Phrasings; `{a}` to `{f}` are the drawn numbers, all other fields are words."""
    ranges: dict[str, tuple[int, int]]
    """Least and greatest value of each drawn number, inclusive."""
    steps: tuple[tuple[str, str, str], ...]
    """For each step the name of its result, its expression over names, and what it counts (a noun phrase)."""
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Words of this kind; one is drawn for each field."""


NAMES = (
    ("Mia", "she"), ("Tom", "he"), ("Ana", "she"), ("Ben", "he"), ("Zoe", "she"), ("Omar", "he"),
    ("Lucy", "she"), ("Raj", "he"), ("Nina", "she"), ("Carl", "he"), ("Ivy", "she"), ("Hugo", "he"),
    ("Mei", "she"), ("Luis", "he"), ("Sara", "she"), ("Finn", "he"),
)  # fmt: skip

KINDS: tuple[Kind, ...] = (
    Kind(
        "boxes",
        (
            "{name} packs {a} {boxes} with {b} {things} in each. Then {she} gives away {c} {things}. "
            "How many {things} does {name} have left?",
            "There are {b} {things} in each of {name}'s {a} {boxes}. If {she} sells {c} of the {things}, "
            "how many are left?",
            "{name} has {a} {boxes}. Each holds {b} {things}. After {name2} takes {c} {things}, "
            "how many {things} remain?",
        ),
        {"a": (3, 12), "b": (6, 25), "c": (5, 95)},
        (("p", "a * b", "{things} in the {boxes}"), ("r", "p - c", "{things} left")),
        {
            "boxes": ("boxes", "bags", "baskets", "crates"),
            "things": ("apples", "marbles", "cards", "eggs", "shells", "stickers", "lemons"),
        },
    ),
    Kind(
        "shopping",
        (
            "{name} buys {a} {things} at {b} dollars each and {c} {others} at {d} dollars each. "
            "How many dollars does {she} pay in all?",
            "A {thing_shop} sells {things} for {b} dollars and {others} for {d} dollars. "
            "What do {a} {things} and {c} {others} cost together, in dollars?",
            "At the {thing_shop}, {name} takes {c} {others} that cost {d} dollars each. {name2} "
            "takes {a} {things} "
            "for {b} dollars each. How many dollars do they spend together?",
        ),
        {"a": (2, 9), "b": (6, 25), "c": (2, 9), "d": (3, 12)},
        (
            ("p", "a * b", "dollars for the {things}"),
            ("q", "c * d", "dollars for the {others}"),
            ("r", "p + q", "dollars in all"),
        ),
        {
            "thing_shop": ("shop", "market", "store"),
            "things": ("books", "shirts", "lamps", "plates"),
            "others": ("pens", "cups", "candles", "brushes"),
        },
    ),
    Kind(
        "sharing",
        (
            "{name} has {a} {things} and {name2} has {b} {things}. They put them together and share them "
            "equally among {c} friends. One friend already had {d} {things}. How many does that "
            "friend have now?",
            "{c} friends share {a} {things} from {name} and {b} {things} from {name2} equally. "
            "{name3} is one of the friends and had {d} {things} before. How many {things} does "
            "{name3} have now?",
        ),
        {"a": (10, 90), "b": (10, 90), "c": (3, 9), "d": (12, 95)},
        (
            ("p", "a + b", "{things} together"),
            ("q", "p / c", "{things} for each friend"),
            ("r", "q + d", "{things} for the friend now"),
        ),
        {"things": ("marbles", "cards", "sweets", "stamps", "beads")},
    ),
    Kind(
        "wages",
        (
            "{name} earns {a} dollars an hour and works {b} hours a day for {c} days. Then {she} "
            "spends {d} dollars "
            "on a {item}. How many dollars does {name} have left?",
            "For {c} days {name} works {b} hours each day. The pay is {a} dollars an hour. A {item} "
            "costs {d} dollars. "
            "How many dollars are left after {she} buys the {item}?",
        ),
        {"a": (6, 15), "b": (3, 8), "c": (2, 7), "d": (15, 150)},
        (
            ("p", "a * b", "dollars a day"),
            ("q", "p * c", "dollars for all days"),
            ("r", "q - d", "dollars left"),
        ),
        {"item": ("bike", "coat", "phone", "table", "guitar")},
    ),
    Kind(
        "travel",
        (
            "{name} {drives} {a} miles an hour for {b} hours and then {c} miles more. The whole way "
            "is {d} miles. "
            "How many miles are still to go?",
            "A way is {d} miles long. {name} {drives} for {b} hours at {a} miles an hour and then "
            "another {c} miles. "
            "How many miles are left?",
        ),
        {"a": (12, 25), "b": (2, 9), "c": (8, 60), "d": (150, 400)},
        (
            ("p", "a * b", "miles in the {b} hours"),
            ("q", "p + c", "miles so far"),
            ("r", "d - q", "miles still to go"),
        ),
        {"drives": ("rides", "drives", "sails")},
    ),
    Kind(
        "reading",
        (
            "A book has {a} pages. {name} reads {b} pages a day for {c} days. {she_cap} wants to "
            "read the rest in "
            "{d} days. How many pages a day is that?",
            "{name} reads {b} pages of a book each day. After {c} days {she} has {d} days left to "
            "finish all {a} pages. "
            "How many pages must {she} read on each of those days?",
        ),
        {"a": (120, 330), "b": (6, 25), "c": (3, 9), "d": (2, 6)},
        (
            ("p", "b * c", "pages read"),
            ("q", "a - p", "pages left"),
            ("r", "q / d", "pages a day"),
        ),
    ),
    Kind(
        "orchard",
        (
            "{name} plants {a} rows of {b} {trees}. {c} of the {trees} die. Each of the others "
            "gives {d} {fruit}. "
            "How many {fruit} does {name} get?",
            "In a garden there are {a} rows with {b} {trees} in a row. {c} {trees} are cut. If each "
            "tree that is left "
            "gives {d} {fruit}, how many {fruit} are there?",
        ),
        {"a": (3, 8), "b": (3, 8), "c": (2, 20), "d": (4, 9)},
        (
            ("p", "a * b", "{trees} at first"),
            ("q", "p - c", "{trees} left"),
            ("r", "q * d", "{fruit}"),
        ),
        {"trees": ("trees", "young trees"), "fruit": ("pears", "plums", "figs", "apples")},
    ),
    Kind(
        "times_as_many",
        (
            "{name} has {a} {things}. {name2} has {b} times as many. {name3} has {c} {things} fewer "
            "than {name2}. "
            "How many {things} do the three have in all?",
            "{name2} owns {b} times as many {things} as {name}, who owns {a}. {name3} owns {c} "
            "fewer than {name2}. "
            "How many {things} do they own together?",
        ),
        {"a": (6, 30), "b": (2, 6), "c": (3, 40)},
        (
            ("p", "a * b", "{things} of {name2}"),
            ("q", "p - c", "{things} of {name3}"),
            ("s", "a + p", "{things} of {name} and {name2}"),
            ("r", "s + q", "{things} in all"),
        ),
        {"things": ("coins", "stamps", "books", "shells", "toys")},
    ),
    Kind(
        "half",
        (
            "{name} sells {a} {things} on {day}. The next day {she} sells half as many, and on the "
            "third day {b} "
            "more than on the second. How many {things} does {she} sell in the three days?",
            "On {day} a shop sells {a} {things}, a day later half of that, and then {b} more than "
            "on the second day. "
            "How many {things} are sold in all three days?",
        ),
        {"a": (24, 180), "b": (5, 60)},
        (
            ("p", "a / 2", "{things} on the second day"),
            ("q", "p + b", "{things} on the third day"),
            ("s", "a + p", "{things} on the first two days"),
            ("r", "s + q", "{things} in all"),
        ),
        {
            "day": ("Monday", "Tuesday", "Friday", "Sunday"),
            "things": ("clips", "cakes", "tickets", "flowers", "hats", "kites"),
        },
    ),
    Kind(
        "bakery",
        (
            "{name} bakes {a} trays of {b} {cakes}. {she_cap} sells {c} of them and puts the rest "
            "into bags of {d}. "
            "Each bag sells for {e} dollars. How many dollars do the bags bring?",
            "A baker makes {a} trays with {b} {cakes} each. {c} are eaten. The others go into bags "
            "of {d}, and a bag "
            "costs {e} dollars. How many dollars do all the bags cost?",
        ),
        {"a": (3, 9), "b": (6, 20), "c": (4, 60), "d": (2, 6), "e": (2, 9)},
        (
            ("p", "a * b", "{cakes} baked"),
            ("q", "p - c", "{cakes} left"),
            ("s", "q / d", "bags"),
            ("r", "s * e", "dollars for the bags"),
        ),
        {"cakes": ("buns", "rolls", "cakes", "pies")},
    ),
    Kind(
        "tickets",
        (
            "{a} adults pay {b} dollars each and {c} children pay {d} dollars each to see a {show}. "
            "The {show} costs "
            "{e} dollars to put on. How many dollars are left?",
            "A {show} is seen by {c} children at {d} dollars each and {a} adults at {b} dollars "
            "each. After paying "
            "{e} dollars for the hall, how many dollars remain?",
        ),
        {"a": (4, 25), "b": (5, 9), "c": (4, 25), "d": (2, 4), "e": (20, 120)},
        (
            ("p", "a * b", "dollars from adults"),
            ("q", "c * d", "dollars from children"),
            ("s", "p + q", "dollars in all"),
            ("r", "s - e", "dollars left"),
        ),
        {"show": ("play", "concert", "film", "match")},
    ),
    Kind(
        "tank",
        (
            "A tank holds {a} litres of {water}. {name} uses {b} litres a day for {c} days and then "
            "adds {d} litres. "
            "How many litres are in the tank now?",
            "{name} takes {b} litres of {water} each day from a tank of {a} litres. After {c} days "
            "{she} pours in "
            "{d} litres. How many litres of {water} does the tank hold then?",
        ),
        {"a": (150, 500), "b": (6, 25), "c": (3, 9), "d": (15, 99)},
        (
            ("p", "b * c", "litres used"),
            ("q", "a - p", "litres left"),
            ("r", "q + d", "litres in the tank now"),
        ),
        {"water": ("water", "oil", "milk")},
    ),
)
