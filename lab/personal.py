"""Texts with made-up personal data: reviews and questions of the data sets, into some of which details are put."""

import csv
import random
from collections.abc import Callable, Iterator
from pathlib import Path

DATA = Path("../shared/data")
MAX_CHARS = 900  # of a text without personal data
# fmt: off
FIRST = (
    "Anna", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jamal", "Katja", "Liam", "Maria",
    "Nils", "Olga", "Priya", "Quentin", "Rosa", "Sven", "Tara", "Umar", "Vera", "William", "Xenia", "Yusuf", "Zoe",
    "Mohammed", "Siobhan", "Björn", "Zoë", "Aaliyah", "Noah", "Emma", "Lucas", "Mia", "Chen", "Wei", "Fatima",
    "Andrés", "Chloé",
)
LAST = (
    "Smith", "Müller", "Garcia", "Kowalski", "Nguyen", "Rossi", "Silva", "Johnson", "Okafor", "Petrov", "Dubois",
    "Yamada", "Khan", "Larsen", "Novak", "Brown", "Wilson", "Schmidt", "Fernandez", "O'Connor", "Ivanova", "Haddad",
    "Kim", "Andersson", "Jones", "Taylor", "Moreau", "Costa", "Weber", "Lindqvist", "Patel", "Cohen",
)
STREETS = (
    "Baker", "Mill", "Church", "Station", "Park", "High", "Oak", "Maple", "Elm", "River", "Hill", "King", "Queen",
    "Market", "Washington", "Lincoln",
)
KINDS = ("Street", "St", "Road", "Avenue", "Ave", "Lane", "Drive", "Blvd", "Court")
CITIES = (
    "London", "Boston", "Chicago", "Leeds", "Denver", "Austin", "Seattle", "Portland", "Dublin", "Bristol", "Miami",
    "Atlanta", "Phoenix", "Dallas",
)
STATES = ("MA", "IL", "CO", "TX", "WA", "OR", "FL", "GA", "AZ", "NY", "CA", "OH")
HOSTS = (
    "example.com", "mail.example.org", "gmail.com", "outlook.com", "proton.me", "company.co.uk", "web.de",
)
# fmt: on

Random = random.Random


def _name(r: Random) -> str:
    return r.choice(
        [f"{r.choice(FIRST)} {r.choice(LAST)}", r.choice(FIRST), f"{r.choice(FIRST)[0]}. {r.choice(LAST)}"]
    )


def _mail(r: Random) -> str:
    first, last = r.choice(FIRST).lower(), r.choice(LAST).lower()
    return f"{r.choice([first, f'{first}.{last}', f'{first[0]}{last}', f'{first}{r.randrange(99)}'])}@{r.choice(HOSTS)}"


def _phone(r: Random) -> str:
    n = [str(r.randrange(10)) for _ in range(10)]
    a, b, c = "".join(n[:3]), "".join(n[3:6]), "".join(n[6:])
    return r.choice([f"({a}) {b}-{c}", f"{a}-{b}-{c}", f"+1 {a} {b} {c}", f"+44 20 {b}{n[0]} {c}", a + b + c])


def _address(r: Random) -> str:
    street = f"{r.randrange(1, 2000)} {r.choice(STREETS)} {r.choice(KINDS)}"
    flat = r.choice(["", "", f", Apt {r.randrange(1, 60)}", f" #{r.randrange(1, 60)}"])
    return r.choice(
        [street + flat, f"{street}{flat}, {r.choice(CITIES)}, {r.choice(STATES)} {r.randrange(10000, 99999)}"]
    )


def _card(r: Random) -> str:
    groups = [f"{r.randrange(10000):04}" for _ in range(4)]
    return r.choice([" ", "-", ""]).join(groups)


def _account(r: Random) -> str:
    return r.choice(
        [
            f"{r.randrange(10**8, 10**10)}",
            f"GB{r.randrange(10, 99)} BARC {r.randrange(10**5, 10**6)} {r.randrange(10**8):08}",
        ]
    )


def _ssn(r: Random) -> str:
    return f"{r.randrange(100, 900)}-{r.randrange(10, 99)}-{r.randrange(1000, 9999)}"


SENTENCES: tuple[tuple[str, Callable[[Random], str]], ...] = (
    ("My name is {}.", _name), ("I am {} and", _name), ("Regards, {}", _name), ("{} told me about it.", _name),
    ("please ask {} about this", _name), ("Contact me at {}.", _mail), ("my email is {}", _mail), ("mail {}", _mail),
    ("Call me on {}.", _phone), ("my number: {}", _phone), ("I live at {}.", _address), ("ship it to {}", _address),
    ("The card number is {}.", _card), ("card {} was charged", _card), ("account number {}", _account),
    ("Transfer it to {}.", _account), ("My SSN is {}.", _ssn),
)  # fmt: skip


def _bodies() -> Iterator[str]:
    """The texts of the data sets, whole and unchanged."""
    for name in ("books", "electronics"):
        with (DATA / "ood" / f"{name}.tsv").open(newline="") as file:
            yield from (row[0] for row in list(csv.reader(file, delimiter="\t"))[1:])
    for name in ("train", "test"):
        with (DATA / "banking77" / f"{name}.csv").open(newline="") as file:
            yield from (row["text"] for row in csv.DictReader(file))
    with (DATA / "mrpc" / "train.tsv").open() as file:  # news, with names of their own
        yield from (
            line.split("\t")[3].strip() for line in file.read().split("\n")[1:] if line.count("\t") == 4
        )


def texts(count: int, share: float, seed: int) -> list[str]:
    """Different texts, in random order. share: of those into which one to three details are put."""
    r = Random(seed)
    bodies = sorted({" ".join(body.split()) for body in _bodies() if len(body) <= MAX_CHARS})
    Random(0).shuffle(bodies)
    if count > len(bodies):
        raise ValueError(f"there are only {len(bodies)} texts")
    chosen = bodies[:count] if seed == 0 else r.sample(bodies, count)
    return [_with_details(body, r) if r.random() < share else body for body in chosen]


def _with_details(body: str, r: Random) -> str:
    words = body.split(" ")
    for template, value in r.sample(SENTENCES, r.choice([1, 1, 2, 3])):
        at = r.choice([0, len(words), r.randrange(len(words) + 1)])
        words[at:at] = template.format(value(r)).split(" ")
    return " ".join(words)
