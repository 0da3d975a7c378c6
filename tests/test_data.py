"""Reading labelled text, splitting it, batching it."""

import tracemalloc
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.data import split as splits
from de3.data import tables
from de3.data.examples import (
    Example,
    check_disjoint,
    label_order,
    load_examples,
    rename,
    save_examples,
    to_examples,
)
from de3.data.tables import Columns
from de3.training.encoded import Encoded, training_batches

READING = Columns(label=None)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    ("name", "text", "columns", "rows"),
    [
        ("a.tsv", 'text\tlabel\n"so good\t1\n', Columns(), [('"so good', "1")]),
        ("a.tsv", 'text\tlabel\n"a\tb"\t0\n', Columns(quotes=True), [("a\tb", "0")]),
        (
            "a.csv",
            'text,label\r\n"good\r\n ""really""\r\n""" ,1\r\n"so" good,"1\n"',
            Columns(),
            [('good\r\n "really"\r\n"', "1"), ("so good", "1\n")],
        ),
        ("a.tsv", "\ufefftext\tlabel\ngood\t1\n", Columns(), [("good", "1")]),  # a byte order mark
        (
            "a.tsv",
            "gj04\t1\t\tOur friends.\n",
            Columns("3", label="1", header=False),
            [("Our friends.", "1")],
        ),
        ("a.jsonl", '{"s1": "a", "s2": "b", "label": "c"}\n\n', Columns("s1", "s2"), [(("a", "b"), "c")]),
        ("a.csv", "text,label,,\nx,1,,\n", Columns(), [("x", "1")]),  # several columns without a name
        ("a.csv", 'text;label\n"good; fine";1\n', Columns(delimiter=";"), [("good; fine", "1")]),
        ("a.txt", "text\tlabel\ngood, fine\t1\n", Columns(delimiter="tab"), [("good, fine", "1")]),
    ],
)
def test_a_file_is_read_as_its_kind_and_the_columns_say(
    tmp_path: Path, name: str, text: str, columns: Columns, rows: list[Any]
) -> None:
    assert tables.read_rows(write(tmp_path / name, text), columns) == rows


def test_a_lone_carriage_return_does_not_end_a_line(tmp_path: Path) -> None:
    for name, content in (("in.txt", b"a\rb\r\n\nc"), ("in.jsonl", b'{"text":\r"a\\rb"}\r\n\n{"text": "c"}')):
        (tmp_path / name).write_bytes(content)
        found = list(tables.records(tmp_path / name, READING))
        assert found == [(f"{tmp_path / name}:1", {"text": "a\rb"}), (f"{tmp_path / name}:3", {"text": "c"})]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "sentence\tlabel\nx\t1\n", "a.tsv:2: no column 'text'.*--text-column"),
        ("a.tsv", "text\tlabel\nx\t1\ny\n", "a.tsv:3: label is empty"),
        ("a.txt", "x", "a.txt: .*no columns"),
        ("a.xlsx", "x", "a.xlsx: .*--delimiter"),
        ("a.tsv", "text\tlabel\n", "has no rows"),
        ("a.jsonl", '{"text": "x", "label": 1}\n[1]\n', "a.jsonl:2: not an object"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{', "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": ["x"], "label": 1}', "a.jsonl:1: text must be text, got list"),
        ("a.csv", "text;label\nx;1\n", "--delimiter"),
        ("a.csv", "text,label,text\nx,1,y\n", "a.csv:1: has several columns named 'text'"),
        ("a.csv", 'text,label\nx,1\n"a\nb\n","1\nc,2\n', "a.csv:5: .* quotation mark .* never closed"),
        ("a.csv", 'text,label\nx,1\n"a\n""b""",1\n"y,1\nz,"1"\n', "a.csv:5: .* is closed only in line 6"),
        ("a.csv", "text,label\n,1\nx,1\n ,1\n", r"a.csv:2: text is empty.* \(the first of 2 bad rows\)"),
        ("a.csv", 'text,"label\r\nx,1\r\n', "a.csv:1: .* quotation mark .* never closed"),
    ],
)
def test_what_is_wrong_with_a_file_is_explained(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.read_rows(write(tmp_path / name, text), Columns())
    with pytest.raises(ValueError, match="one character or tab"):
        tables.read_rows(tmp_path / name, Columns(delimiter="::"))


def test_labels_are_ordered_as_numbers_if_they_are_numbers() -> None:
    assert label_order([("x", "10"), ("x", "9"), ("x", "1")]) == ["1", "9", "10"]
    assert label_order([("x", "b"), ("x", "a")]) == ["a", "b"]
    assert label_order([("x", "²"), ("x", "--1"), ("x", "-1")]) == ["-1", "--1", "²"]


def test_labels_are_renamed_in_order_and_unknown_ones_refused() -> None:
    rows = [("x", "1"), ("y", "0")]
    assert rename(rows, "bad, good") == [("x", "good"), ("y", "bad")]
    with pytest.raises(ValueError, match="--label-names must name each once"):
        rename(rows, "bad")
    with pytest.raises(ValueError, match=r"labels \['1'\] are not among"):
        to_examples(rows, ["0"])


LETTERS, GROUPS = st.sampled_from("abcdefghijklmnopqrst"), st.none() | st.integers(0, 12).map(str)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(LETTERS, st.integers(0, 1), GROUPS), min_size=30, max_size=60),
    st.integers(),
    st.integers(1, 6),
)
def test_a_split_keeps_everything_once_and_no_text_or_group_is_in_two_parts(
    rows: list[tuple[str, int, str | None]], seed: int, held_back: int
) -> None:
    examples = [Example(text * 3, label, group) for text, label, group in rows]
    try:
        parts = splits.split(examples, seed, held_back)
    except ValueError:
        return
    held = (parts.train, parts.tune, parts.certify)
    # == would ignore the groups.
    assert sorted(repr(e) for part in held for e in part) == sorted(map(repr, examples))
    for of in (lambda e: e.text, lambda e: e.group):
        values = [{of(e) for e in part} - {None} for part in held]
        assert not (values[0] & values[1] or values[0] & values[2] or values[1] & values[2])
    assert splits.split(examples, seed, held_back) == parts


def test_the_seed_draws_the_parts_and_shuffles_the_training_data() -> None:
    examples = [Example(f"t{i}", 0) for i in range(200)]
    one, other = (splits.split(examples, seed) for seed in (0, 1))
    assert len(one.tune) == len(one.certify) == 20  # a tenth
    assert one.tune != other.tune and not set(one.certify) <= set(other.tune + other.certify)
    by_rank = splits.split(examples, 0, 60).certify  # not shuffled: in the order in which parts are filled
    after = [e for e in by_rank if e in one.train]
    assert [e for e in one.train if e in after] != after


@pytest.mark.parametrize(
    ("texts", "held_back"), [(["t"] * 50, 5), (list("abcdefghij"), 5), (list("abc"), None)]
)
def test_data_that_cannot_be_split_say_so(texts: list[str], held_back: int | None) -> None:
    with pytest.raises(ValueError, match="hold out"):
        splits.split([Example(text, 0) for text in texts], 0, held_back)


def test_at_most_a_twentieth_of_the_certifying_texts_may_have_been_tuned_on() -> None:
    tune, others = ([Example(f"{name}{i}", 0) for i in range(100)] for name in "tc")
    check_disjoint(tune, [tune[0], *others[:19]], Path("t"), Path("c"))
    with pytest.raises(ValueError, match="c: 2 of its texts are in t"):
        check_disjoint(tune, [*tune[:2], *others[:18]], Path("t"), Path("c"))


def test_groups_and_fragments_come_back(tmp_path: Path) -> None:
    saved = [Example("a b", 1, "a b"), Example("b", 0, "a b", True), Example("c", 0), Example("d", 1, "0")]
    save_examples(tmp_path / "x.jsonl", saved, ["no", "yes"])
    loaded = load_examples(tmp_path / "x.jsonl", ["no", "yes"])
    assert [repr(e) for e in loaded] == [repr(e) for e in saved]  # == ignores groups and fragments
    numbers = write(tmp_path / "y.jsonl", '{"text": "a", "label": "no", "group": 0}\n' * 2)
    assert [e.group for e in load_examples(numbers, ["no", "yes"])] == ["0", "0"]


def test_parts_mark_fragments_and_name_their_whole_text() -> None:
    texts = {*SENTENCES, *(" ".join(s.split()[:3]) + f" {s.split()[3]}" for s in SENTENCES)}
    texts |= {" ".join(s.split()[1:]) for s in SENTENCES}
    assert splits.whole_texts({"a b c d", "a b c", "b c", "b c e"})["b c"] == {"a b c d", "b c e"}
    parts = splits.split([Example(t, 0) for t in sorted(texts)], 3, held_back=15, fragments=True)
    for e in parts.tune + parts.certify:
        assert isinstance(e.text, str) and e.is_fragment == (len(e.text.split()) == 3)
        assert e.group is not None and e.group.endswith(e.text) and len(e.group.split()) == 4
    assert any(e.is_fragment for e in parts.tune)


def test_a_group_column(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "text,label,user\ngood,1, ann \nbad,0,7\n")
    assert tables.read_groups(tables.records(file, Columns()), "user") == ["ann", "7"]
    row = '{"text": "a", "label": 1, "user": %s}\n'
    rows = write(tmp_path / "b.jsonl", row % "3" + row % '" "')
    with pytest.raises(ValueError, match=r"b.jsonl:2: user is empty"):
        tables.read_groups(tables.records(rows, Columns()), "user")
    with pytest.raises(ValueError, match=r"a.csv:2: no column 'who'.*--group-column"):
        tables.read_groups(tables.records(file, Columns()), "who")


@given(st.lists(st.integers(1, 90), min_size=1, max_size=100), st.integers(1, 40), st.integers(0, 9))
def test_batches_hold_each_row_once_and_similar_lengths(lengths: list[int], size: int, seed: int) -> None:
    batches = training_batches(lengths, size, seed)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) <= size for b in batches)
    spans = [(min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches]
    for (least, most), (other_least, other_most) in combinations(spans, 2):
        assert most <= other_least + 4 or other_most <= least + 4


def test_padding_is_masked() -> None:
    import torch

    encoded = Encoded([[2, 7, 3], [2, 3]], [[0, 1, 1], [0, 1]], torch.tensor([1, 0]))
    inputs, labels = encoded.batch([1, 0], pad_id=9)
    assert inputs["input_ids"].tolist() == [[2, 3, 9], [2, 7, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 1]]
    assert labels.tolist() == [0, 1]


SENTENCES = [
    f"{a} {b} {c} tail{i}" for i, (a, b, c) in enumerate(["xyz", "abc", "abd", "uvw", "pqr", "mno"] * 5)
]


@settings(max_examples=30)
@given(
    st.sets(st.tuples(st.integers(0, 29), st.integers(0, 3), st.integers(1, 4)), min_size=5),
    st.integers(0, 99),
)
def test_fragments_stay_with_their_text(cuts: set[tuple[int, int, int]], seed: int) -> None:
    texts = set(SENTENCES) | {" ".join(SENTENCES[i].split()[a : a + n]) for i, a, n in cuts}
    parts = splits.split([Example(t, 0) for t in sorted(texts)], seed, held_back=5, fragments=True)
    together = [e.text for e in parts.train + parts.tune + parts.certify]
    assert len(together) == len(set(together)) and set(together) <= texts
    for held in (parts.tune, parts.certify):
        assert held
        for e in held:
            for other in parts.train + (parts.certify if held is parts.tune else parts.tune):
                for long, short in ((e.text, other.text), (other.text, e.text)):
                    assert f" {short} " not in f" {long} " or len(short.split()) < 3, (short, long)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("in.txt", "good\ncafé".encode("latin-1"), "in.txt:2: not UTF-8; .*iconv.* -f WINDOWS-1252"),
        ("in.txt", "good".encode("utf-16"), "in.txt:1: .* -f UTF-16"),
        ("in.jsonl", '"good"'.encode("utf-16-be"), "in.jsonl:1: .* -f UTF-16"),
        ("in.txt", "好".encode("utf-16"), "in.txt:1: .* -f UTF-16"),
        ("in.txt", b"good\nba\0d", "in.txt:2: .*zero byte"),
        ("in.jsonl", b'"good"\n"a \\ud800"', r"in.jsonl:2: text has '.ud800', half of a surrogate pair"),
        ("in.jsonl", b"[" * 100_000, "in.jsonl:1: not JSON: maximum recursion"),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        for where, record in tables.records(file, READING):
            tables.text_of(record if isinstance(record, dict) else {"text": record}, "text", where)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("in.jsonl", b'"text"\n', "in.jsonl:2: .* 65536"),
        ("in.csv", b'"text"\n', "in.csv:2: .* 65536"),
        (
            "in.csv",
            b"text,a,b\n" + b",".join([b'"' + (b"x" * 999 + b"\n") * 30 + b'"'] * 3),
            r"in.csv:\d+: a row of more than 65536",
        ),
    ],
)
def test_no_line_and_no_row_is_read_beyond_its_limit(
    tmp_path: Path, name: str, content: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_LINE", 2**16)
    file = tmp_path / name
    with file.open("wb") as opened:
        opened.write(content)
        opened.truncate(2**23)  # zero bytes, which take no space on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=says):
            list(tables.records(file, READING))
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
