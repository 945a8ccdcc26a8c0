"""Readers of corpora: plain JSONL, Wikipedia, Open-WikiTable, M-BEIR."""
import html
import itertools
import json
import os
import re
from array import array
from pathlib import Path

import numpy as np

from plumbing.old import inside, json_object, lines_of, reading, utf8


MARKERS = ("[Title]", "[Section title]", "[Caption]", "[Table name]", "[Header]", "[Rows]", "[Row]", "[sep]")  # by id


def checked_doc(row, place):
    """A document with exactly the four fields, each of the right type; `place` (file:line) stands in the error."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with id, text, title and image, found {type(row).__name__}")
    title, image = row.get("title"), row.get("image")
    doc = {"id": row.get("id"), "text": row.get("text"), "title": "" if title is None else title,
           "image": None if image == "" else image}
    if type(doc["id"]) is int:
        doc["id"] = str(doc["id"])
    for name, value in doc.items():
        if not isinstance(value, str) and (name != "image" or value is not None):
            found = "missing" if value is None else type(value).__name__
            raise ValueError(f"{place}: field {name!r} is {found}, expected a string: a row has id, text, title, image")
    return {name: value and utf8(value) for name, value in doc.items()}


def picture_in(folder, name, place):
    """The path of a document's picture; a corpus from outside names no file outside its folder, links followed."""
    path = os.path.join(folder, name)
    if not name.isprintable() or not inside(path, folder):
        raise ValueError(f"{place}: picture {name!r} leads out of {folder}: name the pictures' folder with --images")
    return path


def distinct(read):
    """The documents of read(), a function that gives a fresh stream of them; ValueError where an id comes twice.

    Keeps 8 bytes of each id. Only where two are alike the stream is read again, to compare the ids themselves.
    """
    seen = array("q")
    for doc in read():
        seen.append(hash(doc["id"]))
        yield doc
    values, counts = np.unique(np.asarray(seen), return_counts=True)
    twice, met = set(values[counts > 1].tolist()), set()
    for doc in read() if twice else ():
        if doc["id"] in met:
            raise ValueError(f"id {doc['id'][:80]!r} stands twice in the corpus: ids tell documents apart")
        if hash(doc["id"]) in twice:
            met.add(doc["id"])


def read_docs(path, images=None):
    """Plain JSONL: id, text, optionally title and image. Yields documents in order.

    Image paths are relative to the folder `images`, by default the file's own, and come back joined to it.
    A row that does not fit raises ValueError with file and line.
    """
    for place, line in lines_of(path):
        if line.strip():
            doc = checked_doc(json_object(line, place), place)
            yield {**doc, "image": doc["image"] and picture_in(images or Path(path).parent, doc["image"], place)}


def read_mbeir(path, images=None):
    """M-BEIR candidates: did, txt, img_path, modality. `images` is the folder that img_path starts from."""
    for place, line in lines_of(path):
        if not line.strip():
            continue
        row = json_object(line, place)
        modality = set(str(row.get("modality")).split(","))  # "text,image" and "image,text" both occur
        if not modality <= {"text", "image"}:
            raise ValueError(f"{place}: modality is {row.get('modality')!r}, expected text, image or both")
        if "image" in modality and not (isinstance(row.get("img_path"), str) and row["img_path"]):
            raise ValueError(f"{place}: modality {row['modality']!r}, but img_path is {row.get('img_path')!r}")
        image = picture_in(images or Path(path).parent, row["img_path"], place) if "image" in modality else None
        text = (row.get("txt") or "") if "text" in modality else ""
        yield checked_doc({"id": row.get("did"), "text": text, "image": image}, place)


class JsonStream:
    """A JSON file read piece by piece: a window slides over its text, so that only the value in hand is in memory."""
    solid = re.compile(r"\S")

    def __init__(self, path, file):
        self.path, self.file, self.window, self.at = path, file, "", 0  # what stands before `at` is done with

    def broken(self, problem):
        return ValueError(f"{self.path}: cannot be read as JSON near {self.window[self.at:self.at + 40]!r}: {problem}")

    def grow(self, problem):
        """Reads on, so that what is left of the window at least doubles; the problem is an error at the file's end."""
        more = self.file.read(max(1 << 16, len(self.window) - self.at))
        if not more:
            raise self.broken(problem)
        self.window, self.at = self.window[self.at:] + more, 0

    def next(self):
        """The next character that is no space, without passing it."""
        while not (found := self.solid.search(self.window, self.at)):
            self.grow("it ends too early")
        self.at = found.start()
        return found[0]

    def expect(self, character):
        """Passes the next character, which must be this one."""
        if self.next() != character:
            raise self.broken(f"expected {character!r}")
        self.at += 1

    def value(self, decode=json.JSONDecoder().raw_decode):
        """The next value, whole: the window grows until it holds the value and what follows it."""
        self.next()
        while True:
            try:
                value, end = decode(self.window, self.at)
                problem = "expected ','"
            except (ValueError, RecursionError) as error:
                end, problem = len(self.window), getattr(error, "msg", error)
            follows = self.solid.search(self.window, end)
            if follows and follows[0] in ",:]}":  # anything else may be the rest of a number that the window cuts
                self.at = end
                return value
            self.grow(problem)

    def items(self):
        """Enters the next object or list and yields its keys, of a list numbers. Before the next key is asked for, the
        caller takes the item's value, by value() or items()."""
        opening, count = self.next(), 0
        if opening not in "{[":
            raise self.broken("expected a list or an object")
        self.at += 1
        while self.next() != {"{": "}", "[": "]"}[opening]:
            if count:
                self.expect(",")
            key, count = self.value() if opening == "{" else count, count + 1
            if opening == "{":
                self.expect(":")
            yield key
        self.at += 1

    def pairs(self):
        """(key, value) of each item of the next object or list."""
        return ((key, self.value()) for key in self.items())


def table_column(path, name):
    """(key, value) of each item of one column of a file of columns."""
    with reading(path) as file:
        stream = JsonStream(path, file)
        for column in stream.items():
            yield from (pair for pair in stream.pairs() if column == name)


TABLE_FIELDS = ("flattened", "page_title", "section_title", "caption", "name", "header", "rows")


def read_tables(path, images=None):
    """Open-WikiTable's splitted_tables.json in any pandas orientation: a document's text is the flattened table."""
    for key, row in table_rows(path):
        place = f"{path}: table {key}"
        row = row if isinstance(row, dict) else {}
        lines = [row.get("header"), *row["rows"]] if isinstance(row.get("rows"), list) else [None]
        if not row.get("flattened") and not all(isinstance(line, list) for line in lines):
            raise ValueError(f"{place}: expected flattened, or header and rows (a list, and a list of lists)")
        yield checked_doc({"id": str(key), "text": row.get("flattened") or flatten_table(row)}, place)


def table_rows(path):
    """(key, row) of each table, as pandas writes them: a list of rows, an object of rows, or an object of columns."""
    with reading(path) as file:
        stream, columns = JsonStream(path, file), []
        for key in stream.items():
            columns += [key] * (key in TABLE_FIELDS)
            for _ in stream.pairs():
                pass  # a look at the keys only
        if (stream.window[stream.at:] + file.read()).strip():
            raise stream.broken("the file should end here")
    if not {"header", "flattened"} & set(columns):
        with reading(path) as file:
            yield from JsonStream(path, file).pairs()
        return
    for cells in itertools.zip_longest(*(table_column(path, name) for name in columns), fillvalue=(None, None)):
        if len({key for key, _ in cells}) > 1:  # (key, value) of one table in each column
            raise ValueError(f"{path}: its columns do not list the same tables in the same order")
        yield cells[0][0], dict(zip(columns, (value for _, value in cells)))


def flatten_table(row):
    """A table as one line, the way the table encoder was trained to see it."""
    cells = [[str(cell) for cell in line] for line in [row["header"], *row["rows"]]]
    heads = [row.get(name) or "" for name in ("page_title", "section_title", "caption", "name")]
    return ("".join(marker + str(head) for marker, head in zip(MARKERS, heads)) + "[Header]" + "[sep]".join(cells[0])
            + "[Rows]" + "".join("[Row]" + "[sep]".join(line) for line in cells[1:]))


WIKI_HEADER = re.compile(r'<doc id="([^"]*)".*? url="[^"]*" title="(.*)">\s*$')  # greedy: a title may hold quotes and >
WIKI_SKIP = re.compile(r"(List|Index|Outline) of |.*\(disambiguation", re.IGNORECASE)
WIKI_MEANINGS = re.compile(r"[^\n]{0,200}\b(may|can) (also |commonly )?refer to:?\s*$", re.MULTILINE)


def files_of(path):
    """A file, or all files below a folder in a fixed order."""
    path = Path(path)
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def read_wiki(path, images=None):
    """wikiextractor's output, plain or --json, a file or a folder: windows of 100 words, each with the page's title."""
    for file in files_of(path):
        for place, page, title, text in wiki_pages(file):
            title, text = html.unescape(title).strip(), html.unescape(text).strip()
            head, _, rest = text.partition("\n")
            text = rest.strip() if head.strip() == title else text
            if text and not WIKI_SKIP.match(title) and not WIKI_MEANINGS.match(text):
                for i, window in enumerate(windows(text.split())):
                    yield checked_doc({"id": f"{page}-{i}", "text": window, "title": title}, place)


def wiki_pages(path):
    """Pages of one wikiextractor file: (place, id, title, text)."""
    header, body = None, []
    for place, line in lines_of(path):
        if header is not None:
            if WIKI_HEADER.match(line):  # a page inside a page: the end of the first is missing
                break
            if line.strip() == "</doc>":
                yield *header, "".join(body)
                header, body = None, []
            else:
                body.append(line)
        elif line.startswith("{"):
            row = json_object(line, place)
            if not all(isinstance(row.get(name), str) for name in ("id", "title", "text")):
                raise ValueError(f"{place}: expected id, title and text, each a string")
            yield place, row["id"], row["title"], row["text"]
        elif match := WIKI_HEADER.match(line):
            header = place, match[1], match[2]
        elif line.strip():
            raise ValueError(f"{place}: expected <doc id= url= title=> or JSON, found {line.strip()[:40]!r}")
    if header is not None:
        raise ValueError(f"{header[0]}: page {header[2]!r} does not end with </doc>: is the file complete?")


def windows(words, size=100, stride=50):
    """Overlapping windows of words, the last one shorter where full ones leave words over; each holds something new."""
    for start in range(0, max(len(words) - size + stride, 1), stride):
        yield " ".join(words[start:start + size])


READERS = {"plain": read_docs, "wiki": read_wiki, "tables": read_tables, "mbeir": read_mbeir}
