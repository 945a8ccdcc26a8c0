"""What the terminal shows: a trace of one question, the chat."""
import json
import os
import sys

from PIL import Image

from parts.questions import golds_of, plans_of, predicted, result_row
from parts.score import answer_scores
from parts.steps import BASES, NONE, PREFIX
from parts.vision import load_picture
from plumbing.old import code_of, printable


# ---------------------------------------------------------------------------------------------------- 4 what people see

def has_colour():
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def thumbnail(path, size=20):
    """A picture as `size` x `size` pixels of text: each character is two pixels, one above the other."""
    small = load_picture(path).resize((size, size), Image.Resampling.BOX)
    for y in range(0, size, 2):
        pairs = (small.getpixel((x, y)) + small.getpixel((x, y + 1)) for x in range(size))
        yield "".join("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*pair) for pair in pairs) + "\x1b[0m"


def print_line(name, text, code=""):
    """One line of a trace; `code` is an ANSI colour."""
    text = printable(text)
    print(f"  {name:<10}" + (f"\x1b[{code}m{text}\x1b[0m" if code and has_colour() else text))


def print_thought(said):
    if "fault" in said:
        print_line("malformed", f"{said['fault']}: {said['text'][:100]}", "31")
    else:
        print_line("think", said["thought"], "2")


def print_trace(row):
    """Shows one result row: question and picture, each step with its best evidence, the answer against the gold."""
    print(printable(row["question"]), f"  [{printable(row.get('kind', 'question'))}, {row['method']}]")
    if row.get("image"):
        print(*thumbnail(row["image"]), sep="\n") if has_colour() else print_line("picture", row["image"])
    for plan in plans_of(row):
        if "thought" in plan or "fault" in plan:
            print_thought(plan)
        asked = NONE if plan["retriever"] == [NONE] else f"{' + '.join(plan['retriever'])}: {plan['query']}"
        print_line("ask", asked, "36")
        for prefix in PREFIX.values():
            if plan.get(prefix):
                print_line("read", plan[prefix][0][:160], "2")
        if "answer" in plan:
            print_thought(plan["answer"])
            print_line("found", plan["answer"]["answer"])
    print_thought(row["llm_answer"])
    print_line("answer", predicted(row) or "(none)", "1")
    if row.get("answer") is not None:
        right = answer_scores(predicted(row), golds_of(row))[1] == 1
        print_line("gold", " | ".join(map(str, golds_of(row)[:5])))
        print_line("", "right" if right else "wrong", "32" if right else "31")
    print_line("time", f"{row['cost']['seconds_model']:.2f} s model, {row['cost']['seconds_search']:.3f} s search")
    print()


CHAT_HELP = """A line is a question, which sees the question and answer before it. Commands:
  :image FILE   a picture for the questions that follow; :image alone takes it away
  :base NAME    ask text, image or table only; :base alone lets the model choose again
  :trace        show the steps of each answer, or stop showing them
  :new          forget the question before, as a new picture does too
  :help  :quit"""


class Chat:
    """Questions and commands from the terminal or a pipe. With `as_json`, a result row a question and nothing else.

    A follow-up has the exchange before it as `former` (see Router.run): a method that routes goes on from there.
    """

    def __init__(self, make_router, method, image, as_json):
        self.make_router, self.usual, self.as_json = make_router, method, as_json
        self.router, self.image, self.former, self.trace = make_router(method=method), None, (), False
        self.command("image", image or "")

    def run(self):
        """Until :quit, the end of the input, or Ctrl-C. A mistake is told in one line and the chat goes on."""
        sys.stdin.reconfigure(errors="replace")
        if not self.as_json:
            print(CHAT_HELP)
        try:
            while (line := input("> " if sys.stdin.isatty() else "").strip()).split()[:1] != [":quit"]:
                try:
                    if line.startswith(":"):
                        self.command(*line[1:].partition(" ")[::2])
                    elif line:
                        self.ask(line)
                except (ValueError, OSError) as error:
                    print(f"infer.py: {error}", file=sys.stderr)
        except (EOFError, KeyboardInterrupt) as end:
            if isinstance(end, KeyboardInterrupt) and code_of(end) != 130:         # SIGTERM
                raise
            print(file=sys.stderr)

    def command(self, name, value):
        value = value.strip()
        if name == "image":
            value = os.path.expanduser(value)
            if value:
                load_picture(value)
            self.image, self.former = value or None, ()
        elif name == "base":
            if value and value not in BASES:
                raise ValueError(f":base {value}: give one of {', '.join(BASES)}, or nothing")
            self.router = self.make_router(method=value or self.usual)
        elif name == "trace":
            self.trace = not self.trace
        elif name == "new":
            self.former = ()
        elif name == "help":
            print(CHAT_HELP)
        else:
            raise ValueError(f":{name}: no such command, :help names them")

    def ask(self, question):
        [trajectory] = self.router.run([{"question": question, "image": self.image, "former": self.former}])
        row = result_row(trajectory)
        self.former = [(question, trajectory.answer)] if trajectory.answer else ()
        if self.as_json:
            print(json.dumps(row, ensure_ascii=False), flush=True)
        elif self.trace:
            print_trace(row)
        else:
            print_line("answer", predicted(row) or f"(none: {row['llm_answer']['fault']})", "1")
