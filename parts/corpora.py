"""Readers of corpora: a published file becomes documents, one after the other.

    plain   JSON lines: id, text, optionally title and image
    wiki    what wikiextractor writes, plain or --json: windows of 100 words of each page
    tables  Open-WikiTable's splitted_tables.json: each table as one line of text
    mbeir   M-BEIR's candidates: words, a picture, or both

A document is a dict of id, text, title and image (the path of a picture, or None).

Deviation from the released code: its Wikipedia builder repeats the last window of a page, breaks on
quotes in titles, leaves HTML entities and writes a wrong id before each passage. Here a last,
shorter window covers what no full one does, and an id says page and window.
"""
import html
import os
import re
from array import array
from pathlib import Path

import numpy as np

from plumbing.files import inside, json_object, read_json, text_lines, utf8, whole_line


# -------------------------------------------------------------------------------------- documents

def checked_doc(row, place):
    """A document with exactly the four fields, each of the right type; `place` (file:line) stands
    in the error."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with id, text, title and image, found "
                         f"{type(row).__name__}")
    doc = {name: row.get(name) for name in ("id", "text", "title", "image")}
    if type(doc["id"]) is int:
        doc["id"] = str(doc["id"])
    if doc["title"] is None:
        doc["title"] = ""
    if doc["image"] == "":
        doc["image"] = None
    for name, value in doc.items():
        if isinstance(value, str):
            doc[name] = utf8(value)
        elif value is not None or name != "image":
            kind = "missing" if value is None else type(value).__name__
            raise ValueError(f"{place}: field {name!r} is {kind}, expected a string: a row has id, "
                             "text, title, image")
    return doc


def picture_in(folder, name, place):
    """The path of a document's picture. A corpus from outside names no file outside its folder,
    links followed."""
    path = os.path.join(folder, name)
    if not name.isprintable() or not inside(path, folder):
        raise ValueError(f"{place}: picture {name!r} leads out of {folder}: name the pictures' "
                         "folder with --images")
    return path


def distinct(read):
    """The documents of read(), a function that gives a fresh stream of them; ValueError where an id
    comes twice.

    Keeps 8 bytes of each id. Only where two are alike the stream is read again, to compare the ids
    themselves.
    """
    hashes = array("q")
    for doc in read():
        hashes.append(hash(doc["id"]))
        yield doc
    values, counts = np.unique(np.asarray(hashes), return_counts=True)
    shared = set(values[counts > 1].tolist())
    if not shared:
        return
    ids = set()
    for doc in read():
        if doc["id"] in ids:
            raise ValueError(f"id {doc['id'][:80]!r} stands twice in the corpus: ids tell "
                             "documents apart")
        if hash(doc["id"]) in shared:
            ids.add(doc["id"])


def json_rows(path):
    """(place, row) of each line of a JSONL file that is not empty; place is file:line."""
    for number, line in text_lines(path):
        place = f"{path}:{number}"
        if line.strip():
            yield place, json_object(line, place)


def read_docs(path, images=None):
    """Plain JSONL: id, text, optionally title and image. Yields documents in order.

    Image paths are relative to the folder `images`, by default the file's own, and come back joined
    to it. A row that does not fit raises ValueError with file and line.
    """
    folder = images or Path(path).parent
    for place, row in json_rows(path):
        doc = checked_doc(row, place)
        if doc["image"]:
            doc["image"] = picture_in(folder, doc["image"], place)
        yield doc


def read_mbeir(path, images=None):
    """M-BEIR candidates: did, txt, img_path, modality. `images` is the folder that img_path starts
    from, by default the file's own."""
    folder = images or Path(path).parent
    for place, row in json_rows(path):
        modality = set(str(row.get("modality")).split(","))   # text,image and image,text both occur
        if not modality <= {"text", "image"}:
            raise ValueError(f"{place}: modality is {row.get('modality')!r}, expected text, image "
                             "or both")
        text, image = "", None
        if "text" in modality:
            text = row.get("txt") or ""
        if "image" in modality:
            name = row.get("img_path")
            if not isinstance(name, str) or not name:
                raise ValueError(f"{place}: modality {row['modality']!r}, but img_path is {name!r}")
            image = picture_in(folder, name, place)
        yield checked_doc({"id": row.get("did"), "text": text, "image": image}, place)


# ----------------------------------------------------------------------------------------- tables

MARKERS = ("[Title]", "[Section title]", "[Caption]", "[Table name]",
           "[Header]", "[Rows]", "[Row]", "[sep]")      # in the order of their ids in the tokenizer
TABLE_FIELDS = ("flattened", "page_title", "section_title", "caption", "name", "header", "rows")


def read_tables(path, images=None):
    """Open-WikiTable's splitted_tables.json in any of pandas' orientations: a document's text is
    the flattened table. The file is read into memory as a whole, which is the price of a plain
    json.load: several times the file's size."""
    for key, row in table_rows(path):
        place = f"{path}: table {key}"
        row = row if isinstance(row, dict) else {}
        text = row.get("flattened") or flatten_table(row, place)
        yield checked_doc({"id": str(key), "text": text}, place)


def table_rows(path):
    """(key, row) of each table, as pandas writes them: a list of rows, an object of rows, or an
    object of columns."""
    tables = read_json(path, kinds=(dict, list))
    if isinstance(tables, list) or not {"header", "flattened"} & set(tables):
        yield from pairs(tables, path)
        return
    columns = {}
    for name in TABLE_FIELDS:
        if name in tables:
            columns[name] = dict(pairs(tables[name], path))
    keys = next(iter(columns.values())).keys()
    if any(list(column) != list(keys) for column in columns.values()):
        raise ValueError(f"{path}: its columns do not list the same tables in the same order")
    for key in keys:
        yield key, {name: column[key] for name, column in columns.items()}


def pairs(items, path):
    """(key, item) of each item of an object, (number, item) of a list."""
    if isinstance(items, dict):
        return items.items()
    if isinstance(items, list):
        return enumerate(items)
    raise ValueError(f"{path}: expected a list or an object, found {type(items).__name__}")


def flatten_table(row, place="a table"):
    """A table as one line, the way the table encoder was trained to see it."""
    header, rows = row.get("header"), row.get("rows")
    if not isinstance(rows, list) or not all(isinstance(line, list) for line in [header, *rows]):
        raise ValueError(f"{place}: expected flattened, or header and rows (a list, and a list of "
                         "lists)")
    title, section, caption, name = MARKERS[:4]
    text = title + str(row.get("page_title") or "")
    text += section + str(row.get("section_title") or "")
    text += caption + str(row.get("caption") or "")
    text += name + str(row.get("name") or "")
    text += "[Header]" + "[sep]".join(map(str, header)) + "[Rows]"
    for line in rows:
        text += "[Row]" + "[sep]".join(map(str, line))
    return text


# -------------------------------------------------------------------------------------- Wikipedia

WIKI_HEADER = re.compile(           # greedy: a title may hold quotes and >
    r'<doc id="([^"]*)".*? url="[^"]*" title="(.*)">\s*$')
WIKI_SKIP = re.compile(r"(List|Index|Outline) of |.*\(disambiguation", re.IGNORECASE)
WIKI_MEANINGS = re.compile(
    r"[^\n]{0,200}\b(may|can) (also |commonly )?refer to:?\s*$", re.MULTILINE)


def files_of(path):
    """A file, or all files below a folder in a fixed order."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def stamps(path):
    """[path, bytes, time of the last change] of each file of a corpus, to tell it from another."""
    rows = []
    for file in files_of(path):
        stat = file.stat()
        rows.append([str(file), stat.st_size, stat.st_mtime_ns])
    return rows


def read_wiki(path, images=None):
    """wikiextractor's output, plain or --json, a file or a folder: windows of 100 words, each with
    the page's title. Lists and pages that only tell meanings apart are left out."""
    for file in files_of(path):
        for place, page, title, text in wiki_pages(file):
            title = html.unescape(title).strip()
            text = html.unescape(text).strip()
            first_line, _, rest = text.partition("\n")
            if first_line.strip() == title:
                text = rest.strip()
            if not text or WIKI_SKIP.match(title) or WIKI_MEANINGS.match(text):
                continue
            for number, window in enumerate(windows(text.split())):
                yield checked_doc({"id": f"{page}-{number}", "text": window, "title": title}, place)


def wiki_pages(path):
    """Pages of one wikiextractor file: (place, id, title, text)."""
    header, body = None, []                             # of the page that is being read
    for number, line in text_lines(path):
        place = f"{path}:{number}"
        line = whole_line(line, place)
        match = WIKI_HEADER.match(line)
        if header is not None:
            if match:                                   # a page inside a page: the first has no end
                break
            if line.strip() == "</doc>":
                yield *header, "".join(body)
                header, body = None, []
            else:
                body.append(line)
        elif line.startswith("{"):
            yield place, *wiki_row(line, place)
        elif match:
            header = place, match[1], match[2]
        elif line.strip():
            raise ValueError(f"{place}: expected <doc id= url= title=> or JSON, found "
                             f"{line.strip()[:40]!r}")
    if header is not None:
        raise ValueError(f"{header[0]}: page {header[2]!r} does not end with </doc>: is the file "
                         "complete?")


def wiki_row(line, place):
    """(id, title, text) of a page as wikiextractor --json writes it."""
    row = json_object(line, place)
    page = row.get("id"), row.get("title"), row.get("text")
    if not all(isinstance(value, str) for value in page):
        raise ValueError(f"{place}: expected id, title and text, each a string")
    return page


def windows(words, size=100, stride=50):
    """Overlapping windows of words, the last one shorter where full ones leave words over. Each
    holds something new."""
    count = max(len(words) - size + stride, 1)
    for start in range(0, count, stride):
        yield " ".join(words[start:start + size])


READERS = {"plain": read_docs, "wiki": read_wiki, "tables": read_tables, "mbeir": read_mbeir}
