"""Readers of corpora: every published form becomes the same documents, and every mistake a line."""
import json

import pytest

from bases import write_lines
from parts.corpora import distinct, read_docs, read_mbeir, read_tables, read_wiki, windows


def doc(id, text, title="", image=None):
    return {"id": id, "text": text, "title": title, "image": image}


def test_plain_reader(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", {"id": "a", "text": "one", "image": "p/x.png"}, "",
                       {"id": 7, "text": "", "title": "T"})
    assert list(read_docs(file)) == [doc("a", "one", image=str(tmp_path / "p" / "x.png")),
                                     doc("7", "", "T")]


@pytest.mark.parametrize("row", [
    "{", "[1]", {"text": "no id"}, {"id": "x"}, {"id": "x", "text": None},
    {"id": "x", "text": ["y"]}, {"id": "x", "text": "y", "image": 3}, {"id": True, "text": "y"},
    {"id": "x", "text": "y", "title": 0}, {"id": "x", "text": "y", "title": False},
    {"id": "x", "text": "y", "image": 0}, '{"id": "x", "text": ' + "[" * 100_000,
    '{"text": "y", "id": ' + "1" * 5000 + "}"], ids=lambda row: str(row)[:30])
def test_rows_that_do_not_fit_are_named(tmp_path, row):
    file = write_lines(tmp_path / "d.jsonl", {"id": "a", "text": "one"}, row)
    with pytest.raises(ValueError, match="d.jsonl:2: ") as error:
        list(read_docs(file))
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path):
    row = json.dumps({"id": "a", "text": "one", "title": None, "image": ""})
    file = write_lines(tmp_path / "d.jsonl", "\ufeff" + row)
    assert list(read_docs(file)) == [doc("a", "one")]


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"id": "a", "text": "é"}'.encode("latin-1"))
    for name, reason in (("latin.jsonl", "not UTF-8"), ("none.jsonl", "cannot be read")):
        with pytest.raises(ValueError, match=f"{name}: {reason}"):
            list(read_docs(tmp_path / name))


def test_ids_are_distinct_though_their_hashes_are_not():
    class Alike(str):
        def __hash__(self):
            return 1

    def read(*ids):
        return lambda: iter([{"id": Alike(name)} for name in ids])

    assert [row["id"] for row in distinct(read("a", "b", "c"))] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="id 'b' stands twice"):
        list(distinct(read("a", "b", "c", "b")))


# -------------------------------------------------------------------------------------- Wikipedia

@pytest.mark.parametrize("count, expected", [
    (1, [(0, 1)]), (50, [(0, 50)]), (100, [(0, 100)]), (101, [(0, 100), (50, 101)]),
    (150, [(0, 100), (50, 150)]), (151, [(0, 100), (50, 150), (100, 151)]),
    (200, [(0, 100), (50, 150), (100, 200)])])
def test_windows_cover_everything_and_repeat_nothing(count, expected):
    words = [f"w{i}" for i in range(count)]
    assert list(windows(words)) == [" ".join(words[a:b]) for a, b in expected]


PAGES = [
    ("1", 'The "Big" One > Two', "a &lt;b&gt; &amp; c > d\n\nsecond"),
    ("2", "AT&amp;T", " ".join(f"w{i}" for i in range(120))),
    ("3", "List of rivers", "x"), ("4", "Mercury (disambiguation)", "x"), ("5", "Lists", "kept"),
    ("6", "Mercury", "Mercury may refer to:\n\nMercury (planet)"), ("7", "Index of things", "x"),
    ("8", "Outline of physics", "x"), ("9", "Empty", "")]
PAGE = '<doc id="{0}" url="https://x?curid={0}" title="{1}">\n{1}\n\n{2}\n</doc>\n\n'


def test_wikiextractor_both_forms(tmp_path):
    for form in ("plain", "json"):
        (tmp_path / form / "AA").mkdir(parents=True)
    plain = "".join(PAGE.format(*page) for page in PAGES)
    (tmp_path / "plain" / "AA" / "wiki_00").write_text(plain, encoding="utf-8")
    write_lines(tmp_path / "json" / "AA" / "wiki_00", *[
        {"id": i, "revid": "5", "url": "u", "title": title, "text": text}
        for i, title, text in PAGES])
    words = PAGES[1][2].split()
    expected = [doc("1-0", "a <b> & c > d second", 'The "Big" One > Two'),
                doc("2-0", " ".join(words[:100]), "AT&T"), doc("2-1", " ".join(words[50:]), "AT&T"),
                doc("5-0", "kept", "Lists")]
    for form in ("plain", "json"):
        assert list(read_wiki(tmp_path / form)) == expected
        assert list(read_wiki(tmp_path / form / "AA" / "wiki_00")) == expected


@pytest.mark.parametrize("text, reason", [
    ('<doc id="1" url="u" title="T">\nT\n\nbody\n', ":1: .*does not end"),
    ('<doc id="1" url="u" title="T">\nT\n<doc id="2" url="u" title="U">\nU\n</doc>\n',
     ":1: .*'T' does not end"),
    ("junk\n", ":1: expected <doc"), ('{"id": "1"}\n', ":1: expected id, title"),
    ("{\n", ":1: not JSON")])
def test_broken_wikiextractor_files_are_named(tmp_path, text, reason):
    (tmp_path / "wiki_00").write_text(text)
    with pytest.raises(ValueError, match="wiki_00" + reason):
        list(read_wiki(tmp_path / "wiki_00"))


# --------------------------------------------------------------------------- tables and candidates

@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_open_wikitable_in_every_orientation(tmp_path, mark):
    flat = ("[Title]T[Section title]S[Caption]C[Table name]N[Header]a[sep]b"
            "[Rows][Row]x[sep]1[Row]y[sep]2")
    row = {"page_title": "T", "section_title": "S", "caption": "C", "name": "N",
           "header": ["a", "b"], "rows": [["x", 1], ["y", 2]]}
    rows = [{**row, "flattened": "as it stands"}, row]
    columns = {name: {str(i): r.get(name) for i, r in enumerate(rows)} for name in rows[0]}
    file = tmp_path / "splitted_tables.json"
    for data in (rows, {str(i): r for i, r in enumerate(rows)}, columns):
        file.write_text(mark + json.dumps(data), encoding="utf-8")
        assert list(read_tables(file)) == [doc("0", "as it stands"), doc("1", flat)]


@pytest.mark.parametrize("text, reason", [
    ('[{"caption": "C"}]', "table 0: expected flattened"),
    ('[{"header": ["a"], "rows": [3]}]', "table 0: expected"),
    ('{"a": {"header": 1, "rows": []}}', "table a: expected"), ("[[1]]", "table 0: expected"),
    ('[{"flattened": 3}]', "table 0: field 'text' is int"),
    ("", "not valid JSON"), ("7", "expected a JSON object or list, found int"),
    ('[{"flattened": "x"}', "not valid JSON"), ('{"0": {"x": tr}}', "not valid JSON"),
    ('[{"flattened": "x"}] {}', "not valid JSON"),
    ('{"flattened": 3}', "expected a list or an object, found int"),
    ('{"flattened": {"1": "x"}, "header": {"2": []}}', "same order"),
    ('{"flattened": {"1": "x"}, "header": {}}', "same order"), ("[" * 100_000, "recursion"),
    ("[" + "1" * 5000, "not valid JSON")], ids=lambda x: x[:20])
def test_broken_table_files_are_named(tmp_path, text, reason):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=f"t.json: .*{reason}") as error:
        list(read_tables(tmp_path / "t.json"))
    assert "\n" not in str(error.value)


def test_mbeir_candidates(tmp_path):
    file = write_lines(
        tmp_path / "cand.jsonl",
        {"did": "9:1", "txt": "a cat", "img_path": "i/a.jpg", "modality": "text,image",
         "src_content": None},
        {"did": "9:2", "txt": None, "img_path": "b.jpg", "modality": "image"},
        {"did": "9:3", "txt": "words", "img_path": None, "modality": "text"},
        {"did": "9:4", "txt": "t", "img_path": "c.jpg", "modality": "image,text"})
    assert list(read_mbeir(file, images="/m")) == [
        doc("9:1", "a cat", image="/m/i/a.jpg"), doc("9:2", "", image="/m/b.jpg"),
        doc("9:3", "words"), doc("9:4", "t", image="/m/c.jpg")]


@pytest.mark.parametrize("row, reason", [
    ({"did": "1", "txt": "x", "modality": "sound"}, "sound"),
    ({"txt": "x", "modality": "text"}, "id"), ({"did": "1", "modality": "image"}, "img_path"),
    ({"did": "1", "modality": "image", "img_path": 7}, "img_path is 7")])
def test_candidates_that_do_not_fit_are_named(tmp_path, row, reason):
    with pytest.raises(ValueError, match=f"bad.jsonl:1: .*{reason}"):
        list(read_mbeir(write_lines(tmp_path / "bad.jsonl", row)))
