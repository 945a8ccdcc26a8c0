"""Models that say what a test tells them to, and small bases: the Router without a network.

`scripted(bases, reply)` is a Router whose model says reply(prompt, sample index). Words stands for
the processor: its tokens are words, so that prompts can be read back.
"""
import json
import re
from types import SimpleNamespace

import torch

from infer import Router, main
from parts.steps import render_answer, render_route
from retrieve import KnowledgeBase

DOCS = {"text": ["Kasten has capital Ortal.", "Ortal has mayor Vesna.", "Mirin has capital Dosta."],
        "image": ["flag of Kasten.", "flag of Mirin."],
        "table": ["Kasten population 35", "Mirin population 28"]}
QUESTION = {"question": "Who leads the capital of Kasten?", "answer": ["Vesna"]}
PROMPTS = {"route": "R", "answer": "A", "final": "F", "cot": "C"}


class Words:
    """A processor whose tokens are words with the blanks before them; a picture is its path. Id 0
    ends a turn."""
    eos_ids, pad_id = (0,), 1

    def __init__(self):
        self.ids, self.words = {}, ["", "<pad>"]

    def encode(self, text):
        pieces = re.findall(r"\s*[^\s<]+|\s*<[^<\s]*|\s+$", text)
        for piece in pieces:
            if self.ids.setdefault(piece, len(self.words)) == len(self.words):
                self.words.append(piece)
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)

    def prompt(self, conversation):
        texts = []
        for message in conversation:
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            texts.append("".join(part.get("text", f" [{part.get('image')}]") for part in parts))
        return self.encode("\n".join(texts)), [], []

    def batch(self, prompts):
        rows = [ids for ids, _, _ in prompts]
        width = max(map(len, rows))
        ids = [[self.pad_id] * (width - len(row)) + row for row in rows]
        mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask),
                "pixel_values": None, "image_grid_thw": None}


class Scripted(torch.nn.Module):
    """A model that says what `reply(prompt, sample index)` says; it notes the batches and the
    options of sampling that it is given."""

    def __init__(self, processor, reply, positions=4096):
        super().__init__()
        self.processor, self.reply = processor, reply
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches, self.sampling = [], []

    def generate(self, input_ids, attention_mask, *, n, max_new_tokens, eos_ids, **sampling):
        prompts = [self.processor.decode(ids[mask].tolist())
                   for ids, mask in zip(input_ids, attention_mask)]
        self.batches.append(prompts)
        self.sampling.append({"n": n, "max_new_tokens": max_new_tokens, **sampling})
        rows = []
        for prompt in prompts:
            for g in range(n):
                ids = self.processor.encode(self.reply(prompt, g)) + [0]
                rows.append(ids[:max_new_tokens])
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
        return SimpleNamespace(tokens=tokens, mask=mask, logps=torch.where(mask, -0.5, 0.0))


def small_bases():
    """{base: KnowledgeBase} of DOCS."""
    bases = {}
    for base, texts in DOCS.items():
        docs = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
        bases[base] = KnowledgeBase.build(docs, "lexical")
    return bases


def scripted(bases, reply, positions=4096, **options):
    """(the model, a Router with it)."""
    processor = Words()
    vlm = Scripted(processor, reply, positions)
    return vlm, Router(vlm, processor, bases, prompts=PROMPTS, **options)


def capital_then_mayor(prompt, _):
    """Two hops about Kasten: capital, mayor, enough."""
    system, problem = prompt.split("\n", 1)
    if system == "R":
        hop = problem.count("Sub-question")
        query = ["What is the capital of Kasten?", "Who is mayor of Ortal?", "None"][hop]
        return render_route(f"t{hop}", query, "None" if hop == 2 else "Text Retriever")
    if system == "A":
        return render_answer("read", "Vesna" if "Question: Who" in problem else "Ortal")
    return render_answer("done", re.findall(r"Answer\d: (\w+)", problem)[-1])


def gold_replies(rows):
    """What a model says that routes by gold and reads what it is given."""
    row_of = {(row["question"], row["image"]): row for row in rows}

    def reply(prompt, g):
        """Gold routing; an answer only if the evidence, or in the end the history or the picture,
        holds it."""
        system, problem = prompt.split("\n", 1)
        picture = re.search(r" \[([^\]]*\.jpg)\]$", problem)
        if system == "A":
            evidence = problem.split("Give me the answer")[0].split(":", 1)[1]
            for row in rows:
                for hop in row["hops"]:
                    asked = f"Question: {hop['query']}" in problem
                    if asked and re.search(rf"\b{hop['answer']}\b", evidence):
                        return render_answer("t", hop["answer"])
            return render_answer("t", "nothing")
        question = re.match(r"Origin question: (.*)\n", problem).group(1)
        row = row_of[question, picture and picture.group(1)]
        if system == "R":
            hop = ([*row["hops"], None])[problem.count("Sub-question")]
            if hop is None:
                return render_route("t", "None", "None")
            return render_route("t", hop["query"], hop["retriever"])
        text = problem[:picture.start()] if picture else problem        # its path is no knowledge
        known = all(re.search(rf"\b{re.escape(hop['answer'])}\b", text) for hop in row["hops"])
        return render_answer("t", row["answer"][0] if known else "unknown")

    return reply


def questions_at(path, *rows):
    """A question file: each row gets an answer where it has none."""
    lines = [json.dumps({"question": "Who?", "answer": "x"} | row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return path


def cli(capsys, *words):
    """infer.py in this process: exit code, lines of stdout, lines of stderr."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()
