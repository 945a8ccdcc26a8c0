"""What the terminal shows of a question: its steps, and the chat."""
import json
import os
import sys
from pathlib import Path

from parts.questions import golds_of, load_questions, plans_of, predicted
from parts.score import answer_scores
from parts.steps import BASES, NONE, PREFIX
from parts.trajectory import result_row
from parts.vision import load_picture
from plumbing.files import printable, read_json, say, stop_code

GREY, RED, GREEN, CYAN, BOLD = "2", "31", "32", "36", "1"           # ANSI codes


# ---------------------------------------------------------------------------------- one question

def has_colour():
    """Whether stdout is a terminal that shows colours."""
    return (sys.stdout.isatty() and "NO_COLOR" not in os.environ
            and os.environ.get("TERM") != "dumb")


def print_line(name, text, colour=""):
    """One line of a trace: a name of at most ten letters, then the text."""
    text = printable(text)
    if colour and has_colour():
        text = f"\x1b[{colour}m{text}\x1b[0m"
    print(f"  {name:<10}{text}")


def print_thought(output):
    """The thought of a step of a result row, or what is wrong with the step."""
    if "fault" in output:
        print_line("malformed", f"{output['fault']}: {output['text'][:100]}", RED)
    else:
        print_line("think", output["thought"], GREY)


def print_trace(row):
    """Shows one result row: the question, each step with its best evidence, the answer against the
    gold."""
    kind = row.get("kind", "question")
    print(printable(row["question"]), f"  [{printable(kind)}, {row['method']}]")
    if row.get("image"):
        print_line("picture", row["image"])
    for plan in plans_of(row):
        print_plan(plan)
    answer = predicted(row)
    print_thought(row["llm_answer"])
    print_line("answer", answer or "(none)", BOLD)
    if row.get("answer") is not None:
        golds = golds_of(row)
        _, recall, _ = answer_scores(answer, golds)
        print_line("gold", " | ".join(str(gold) for gold in golds[:5]))
        if recall == 1:
            print_line("", "right", GREEN)
        else:
            print_line("", "wrong", RED)
    model, search = row["cost"]["seconds_model"], row["cost"]["seconds_search"]
    print_line("time", f"{model:.2f} s model, {search:.3f} s search")
    print()


def print_plan(plan):
    """A sub-question, where it went, the best passage of each base, and the intermediate answer."""
    if "thought" in plan or "fault" in plan:
        print_thought(plan)
    if plan["retriever"] == [NONE]:
        print_line("ask", NONE, CYAN)
    else:
        print_line("ask", f"{' + '.join(plan['retriever'])}: {plan['query']}", CYAN)
    for prefix in PREFIX.values():
        if plan.get(prefix):
            print_line("read", plan[prefix][0][:160], GREY)
    if "answer" in plan:
        print_thought(plan["answer"])
        print_line("found", plan["answer"]["answer"])


# ----------------------------------------------------------------------------------------- a chat

FOLLOW_UPS = "A line is a question, which sees the question and answer before it."
ALONE = "Each line is a question of its own (follow-ups: docs/commands.md)."
COMMANDS = """\
  :image FILE   a picture for the questions that follow; :image alone takes it away
  :base NAME    ask text, image or table only; :base alone lets the model choose again
  :trace        show the steps of each answer, or stop showing them
  :new          forget the question before, as a new picture does too
  :help  :quit"""


def greeting(model, bases, world):
    """What a chat begins with: the model, its bases, and questions of the world, where they are a
    world's: one look-up, two, and two about a picture."""
    sizes = [f"{name} ({len(base):,} passages)" for name, base in bases.items()]
    lines = [f"{model} over {', '.join(sizes)}."]
    rows, file = [], Path(world or "") / "questions.jsonl"
    if world and file.is_file():
        rows, _ = load_questions(file, limit=100)
    for picture, hops in ((False, 1), (False, 2), (True, 2)):
        for row in rows:
            if bool(row["image"]) == picture and len(row.get("hops") or ()) == hops:
                if picture:
                    lines.append(f"  :image {printable(row['image'])}")
                lines.append(f"  {printable(row['question'])}")
                break
    return "\n".join(lines)


def knows_follow_ups(model):
    """Whether a model directory says that its model was trained on them ("follow_ups": true in
    generation_config.json)."""
    file = Path(model) / "generation_config.json"
    return file.is_file() and read_json(file).get("follow_ups") is True


class Chat:
    """Questions and commands from the terminal or a pipe. With `as_json`, a result row a question
    and nothing else.

    A follow-up has the exchange before it as `former` (see Router.run): a method that routes goes
    on from there.
    """

    def __init__(self, make_router, method, image, as_json, hello="", follow_ups=False):
        """make_router(method=name) returns a Router; `method` is the one to begin with. Without
        `follow_ups` no question sees the one before it."""
        self.make_router, self.method, self.as_json = make_router, method, as_json
        self.hello, self.follow_ups = hello, follow_ups
        self.router = make_router(method=method)
        self.former = ()                    # the exchange before, a list of one (question, answer)
        self.trace = False
        self.show_picture(image or "")

    def run(self):
        """Until :quit, the end of the input, or Ctrl-C. A mistake is told in one line and the chat
        goes on."""
        sys.stdin.reconfigure(errors="replace")
        prompt = "> " if sys.stdin.isatty() else ""
        if not self.as_json:
            print(self.hello)
            self.help()
        try:
            while True:
                line = input(prompt).strip()
                if line.split()[:1] == [":quit"]:
                    break
                try:
                    self.answer(line)
                except (ValueError, OSError) as error:
                    say(f"infer.py: {error}")
        except EOFError:
            say("")
        except KeyboardInterrupt as stop:
            if stop_code(stop) != 130:                              # SIGTERM ends the program
                raise
            say("")

    def answer(self, line):
        """Does what a line of the user's asks for."""
        if line.startswith(":"):
            name, _, value = line[1:].partition(" ")
            self.command(name, value.strip())
        elif line:
            self.ask(line)

    def help(self):
        print(f"{FOLLOW_UPS if self.follow_ups else ALONE} Commands:\n{COMMANDS}")

    def command(self, name, value):
        """Does what a command asks for, and confirms it."""
        done = ""
        if name == "image":
            self.show_picture(value)
            done = self.image or "none"
        elif name == "base":
            if value and value not in BASES:
                raise ValueError(f":base {value}: give one of {', '.join(BASES)}, or nothing")
            self.router = self.make_router(method=value or self.method)
            done = f"asks {value} only" if value else f"{self.method} again"
        elif name == "trace":
            self.trace = not self.trace
            done = "on" if self.trace else "off"
        elif name == "new":
            self.former = ()
            done = "the question before is forgotten" if self.follow_ups else "nothing to forget"
        elif name == "help":
            self.help()
        else:
            raise ValueError(f":{name}: no such command, :help names them")
        if done and not self.as_json:
            print_line(name, done)

    def show_picture(self, path):
        """The picture of the questions that follow; "" for none."""
        path = os.path.expanduser(path)
        if path:
            load_picture(path)
        self.image = path or None
        self.former = ()

    def ask(self, question):
        row = {"question": question, "image": self.image, "former": self.former}
        [trajectory] = self.router.run([row])
        result = result_row(trajectory)
        goes_on = self.follow_ups and trajectory.answer
        self.former = [(question, trajectory.answer)] if goes_on else ()
        if self.as_json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        elif self.trace:
            print_trace(result)
        else:
            answer = predicted(result)
            print_line("answer", answer or f"(none: {result['llm_answer']['fault']})", BOLD)
