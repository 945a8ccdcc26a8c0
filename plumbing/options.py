"""Options: a frozen dataclass, declared once, becomes flags, their --help, their limits, and the
check of a JSON object that somebody else wrote.

    @dataclass(frozen=True)
    class Search:
        k: int = option(5, "hits of a query", least=1)

    add_flags(parser, Search)           -k N      hits of a query [5]
    from_flags(Search, args)            flags -> Search, or ValueError: "-k is 0: give at least 1"
    fill(Search, {"k": 3}, "a.json")    foreign JSON -> Search, or ValueError: "a.json: k is ..."
"""
import argparse
import math
from dataclasses import MISSING, field, fields


def option(default=MISSING, text="", *, least=0, most=math.inf, choices=None, **more):
    """A field of an options class. Without a default it must be given.

    text: the sentence that --help shows; without one the field is no flag. least, most: limits of a
    number, or of each number of a tuple. choices: the values that it may have. more: `nargs` and
    `metavar` of the flag, or anything else that a script wants to know of its option.
    """
    return field(default=default, metadata={"text": text, "least": least, "most": most,
                                            "choices": choices, **more})


def flag_of(name):
    """The flag of a field: -k, --learning-rate."""
    return f"-{name}" if len(name) == 1 else "--" + name.replace("_", "-")


def expected(f):
    """What a number must be, in words: of at least 1, from 1 to 1000."""
    least, most = f.metadata["least"], f.metadata["most"]
    return f"give at least {least}" if most == math.inf else f"give {least} to {most}"


def checked(f, value, name):
    """The value of a field, if it has the field's type and keeps its limits. `name` is what a
    message calls it."""
    if "least" not in f.metadata:                           # a plain field of the class
        return value
    shown = repr(value)[:40]
    choices, number = f.metadata["choices"], f.type in (int, float)
    for item in value if f.type is tuple and choices else (value,):
        if choices and item not in choices:
            raise ValueError(f"{name} is {shown}: give {' or '.join(map(str, choices))}")
    if f.type is int and type(value) is not int:
        raise ValueError(f"{name} is {shown}: expected a whole number, {expected(f)}")
    if f.type is float and type(value) not in (int, float):
        raise ValueError(f"{name} is {shown}: expected a number, {expected(f)}")
    if number and not (f.metadata["least"] <= value <= f.metadata["most"] and value < math.inf):
        raise ValueError(f"{name} is {shown}: {expected(f)}")
    if f.type in (bool, str, dict) and not isinstance(value, f.type):
        raise ValueError(f"{name} is {shown}: expected {f.type.__name__}")
    return value


def check_options(options):
    """Checks every field of an options object; for its __post_init__."""
    for f in fields(options):
        value = getattr(options, f.name)
        if value is not None or f.default is not None:      # None where None is the default
            checked(f, value, f.name)


def numbers(f, value, name):
    """A foreign list of whole numbers as a tuple."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {repr(value)[:40]}: expected a list of whole numbers")
    for item in value:
        if type(item) is not int or not f.metadata["least"] <= item <= f.metadata["most"]:
            raise ValueError(f"{name} is {repr(value)[:40]}: expected whole numbers, {expected(f)}")
    return tuple(value)


def fill(cls, values, where):
    """An object of an options class from foreign JSON. Keys that the class does not have are
    passed over; null is as good as missing. ValueError names `where` and what does not fit,
    what the class itself finds in its __post_init__ too."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {repr(values)[:40]}: expected an object")
    chosen, missing = {}, []
    for f in fields(cls):
        value = values.get(f.name)
        if value is not None:
            check = numbers if f.type is tuple and "least" in f.metadata else checked
            chosen[f.name] = check(f, value, f"{where}: {f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            missing.append(f.name)
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    try:
        return cls(**chosen)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# ------------------------------------------------------------------------------------------- flags

class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message):
        raise ValueError(f"{message}: see {self.prog} --help")


def add_flags(parser, cls):
    """A flag for each field of an options class that has a text. Flags that are not given leave
    nothing behind, so the result of parse_args says which ones were."""
    for f in fields(cls):
        text = f.metadata.get("text")
        if not text:
            continue
        more = {name: f.metadata[name] for name in ("nargs", "metavar") if name in f.metadata}
        if f.type is bool:
            more["action"] = argparse.BooleanOptionalAction
        else:
            more["type"] = f.type if f.type in (int, float) else str
            if f.type in (int, float):
                more.setdefault("metavar", "N")
            more["choices"] = f.metadata["choices"]
        if f.default is MISSING and f.default_factory is MISSING:
            more["required"] = True
        elif f.default not in (MISSING, None, "", (), False):
            text += f" [{f.default}]"
        names = [flag_of(f.name)] + ([f"--{f.name}"] if len(f.name) == 1 else [])
        parser.add_argument(*names, dest=f.name, default=argparse.SUPPRESS, help=text, **more)


def from_flags(cls, args, **more):
    """An object of an options class from the flags that were given, and `more` of its fields."""
    given = {}
    for f in fields(cls):
        if f.metadata.get("text") and hasattr(args, f.name):
            value = getattr(args, f.name)
            value = tuple(value) if isinstance(value, list) else value
            given[f.name] = checked(f, value, flag_of(f.name))
    return cls(**{**given, **more})
