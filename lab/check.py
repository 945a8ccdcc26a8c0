"""Is a downloaded checkpoint read rightly? What a model directory holds, and our network beside
transformers' on the same directory.

    directory -> what was found: sizes, weights on disk, vocabulary, picture limits
    two prompts, of words and with a picture -> our Processor -> ids and patches, for both networks
        -> logits at every position, greedy tokens -> the differences -> equal, or what differs

The networks are in memory one after the other, never together: only what they answered stays.
`python model.py check DIR` runs this.

Shapes: T tokens of a prompt, V vocabulary, L new tokens.
"""
import gc
import inspect
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

from model import VLM
from parts.chat import Processor
from plumbing.files import printable, read_json, run_command
from plumbing.options import OneLineParser, add_flags, from_flags, option
from plumbing.weights import weight_files

NEW_TOKENS = 16                                     # of each greedy answer
PIXEL_LEVELS = 2        # of 255: resized pictures are rounded in other ways by other libraries

# How far logits may lie apart by rounding in many layers, as a share of the largest one. In half
# precision that is much: it shows a wrong layout of weights, but only float32 shows a small fault.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class CheckOptions:
    """How the weights are held while they are checked."""
    dtype: str = option("float32", "of the weights in memory; float32 is the sharpest comparison",
                        choices=tuple(TOLERANCE))
    device: str = option("cpu", "cpu, cuda, ...")


def command(words):
    """The command line of model.py -> its exit code."""
    top = OneLineParser(prog="model.py", description="Qwen2.5-VL by hand.")
    commands = top.add_subparsers(required=True, metavar="check")
    parser = commands.add_parser(
        "check", help="load a model directory, say what is in it, compare with transformers",
        description="Loads a Qwen2.5-VL directory, says what it found and, where transformers is "
        "installed, compares logits and greedy tokens with its network on words and on a picture. "
        "Memory: one network at a time, so that of the weights in --dtype and little more (7B: "
        "17 GB in bfloat16, 33 GB in float32). Exit code 0: equal, or not compared; 1: differs; "
        "2: not a directory that can be read.")
    parser.add_argument("dir", help="model directory: config.json, safetensors, tokenizer.json")
    add_flags(parser, CheckOptions)
    args = top.parse_args(words or ["--help"])
    return check(args.dir, from_flags(CheckOptions, args))


def check(path, options):
    """Prints what a directory holds and how our network differs from transformers' -> 0 where they
    agree or transformers is missing, 1 where they differ. ValueError for what cannot be read."""
    vlm = VLM.from_pretrained(path, dtype=getattr(torch, options.dtype), device=options.device)
    processor = Processor.from_pretrained(path)
    print(path)
    for title, text in findings(path, vlm.config, processor):
        print(f"  {title:<12}{text}")

    batches, ours = {}, {}
    for name, conversation in conversations().items():
        batches[name] = on_device(processor([conversation]), options.device)
        ours[name] = our_answer(vlm, batches[name], processor.eos_ids)
        print(f"  {name:<12}answered with {processor.decode(ours[name].tokens)!r}")
    del vlm                                         # its memory is needed
    free_memory()

    try:
        import transformers
        network = transformers.Qwen2_5_VLForConditionalGeneration
    except (ImportError, AttributeError) as error:
        print("not compared: transformers with its Qwen2.5-VL cannot be imported here "
              f"({printable(error)}): pip install 'transformers>=4.49'")
        return 0
    print(f"beside transformers {transformers.__version__}, {options.dtype} on {options.device}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    faults = compare_inputs(path, processor, transformers)
    theirs = their_answers(network, path, batches, options, processor)
    tolerance = TOLERANCE[options.dtype]
    for name in batches:
        faults += compare(name, ours[name], theirs[name], tolerance)
    if faults:
        print(f"differs: {', '.join(faults)}")
        return 1
    print(f"equal within {tolerance} of the largest logit")
    return 0


# --------------------------------------------------------------------------- what a directory holds

def findings(path, c, processor):
    """What was found, as pairs of a title and a text; c is the Config."""
    layout = "nested (text_config)" if "text_config" in c.raw else "flat"
    yield "config", f"{layout}, {c.max_position_embeddings:,} positions"

    files = weight_files(path)
    numbers, tensors, newer = stored_weights(files)
    types = ", ".join(f"{count:,} {kind}" for kind, count in sorted(numbers.items()))
    size = sum(file.stat().st_size for file in files) / 1e6
    layout = "newer" if newer else "older"
    yield "weights", f"{types} in {tensors:,} tensors, {layout} names"
    yield "files", f"{len(files)} of safetensors, {size:,.1f} MB"

    yield "decoder", (f"{c.num_hidden_layers} layers, {c.num_attention_heads} heads, "
                      f"{c.num_key_value_heads} key/value heads, hidden size {c.hidden_size:,}")
    v = c.vision
    yield "vision", (f"{v.depth} blocks, {v.num_heads} heads, hidden size {v.hidden_size:,}, "
                     f"patches of {v.patch_size} x {v.patch_size} pixels")
    head = "tied to the embedding table" if c.tie_word_embeddings else "separate"
    tokens = processor.tokenizer.get_vocab_size()
    yield "vocabulary", f"{c.vocab_size:,} rows for {tokens:,} tokens, head {head}"
    ends = [f"{i} {processor.tokenizer.id_to_token(i)}" for i in processor.eos_ids]
    yield "ends", printable(", ".join(ends))
    pictures = processor.pictures
    yield "pixels", f"{pictures.min_pixels:,} to {pictures.max_pixels:,} of a picture"


def stored_weights(files):
    """(Counter of the numbers of each type, how many tensors, whether they have the newer names) of
    safetensors files, from their headers alone."""
    numbers, tensors, newer = Counter(), 0, False
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():
                part = stored.get_slice(key)
                numbers[part.get_dtype()] += math.prod(part.get_shape())
                tensors += 1
                newer = newer or key.startswith("model.language_model.")
    return numbers, tensors, newer


# ------------------------------------------------------------------------------------ what is asked

def conversations():
    """{name: conversation}, one of words and one with a picture."""
    words = "What is the capital of France? Answer with one word."
    look = [{"type": "image", "image": drawn_picture()},
            {"type": "text", "text": "Which colours are in this picture?"}]
    return {"words": [{"role": "user", "content": words}],
            "picture": [{"role": "user", "content": look}]}


def drawn_picture():
    """Three bands under a circle and a line. No side is a multiple of a patch, so it is resized."""
    picture = Image.new("RGB", (301, 199), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 100, 199), fill=(0, 60, 170))
    draw.rectangle((200, 0, 301, 199), fill=(210, 30, 50))
    draw.ellipse((110, 60, 190, 140), fill=(250, 200, 0), outline=(0, 0, 0))
    draw.line((5, 190, 295, 10), fill=(20, 130, 60), width=5)
    return picture


def on_device(batch, device):
    """A processor's batch for the network; without the pictures where there are none."""
    return {name: tensor.to(device) for name, tensor in batch.items() if tensor is not None}


def free_memory():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------ answers

@dataclass(frozen=True)
class Answer:
    """What a network makes of a prompt."""
    logits: torch.Tensor                # (T, V) float32
    tokens: list                        # at most NEW_TOKENS, greedy, the end included
    new_logits: torch.Tensor = None     # (L, V) float32 that the tokens were picked from


@torch.no_grad()
def our_answer(vlm, batch, eos_ids):
    """Our network's Answer to a batch of one prompt."""
    vlm.eval()
    [logits] = vlm(**batch)                                                 # (T, V)
    samples = vlm.generate(**batch, temperature=0, max_new_tokens=NEW_TOKENS, eos_ids=eos_ids)
    return Answer(logits.float().cpu(), samples.tokens[samples.mask].tolist())


@torch.no_grad()
def their_answers(network, path, batches, options, processor):
    """{name: Answer} of transformers' network, for the batches of one prompt each."""
    from transformers import GenerationConfig
    torch.backends.cudnn.allow_tf32 = False         # CUDA would round its first layer more coarsely
    dtype = getattr(torch, options.dtype)
    hf = network.from_pretrained(path, torch_dtype=dtype, local_files_only=True,
                                 use_safetensors=True)          # torch_dtype: older ones know it
    hf = hf.to(options.device).eval()
    # else the directory's own settings, which name penalties and temperatures, count as well
    hf.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=list(processor.eos_ids),
        pad_token_id=processor.pad_id, output_logits=True, return_dict_in_generate=True)
    answers = {}
    for name, batch in batches.items():
        ids = batch["input_ids"]                                            # (1, T)
        inputs = {**batch, "attention_mask": batch["attention_mask"].long()}
        if "mm_token_type_ids" in inspect.signature(hf.forward).parameters:     # newer releases
            inputs["mm_token_type_ids"] = (ids == processor.image_pad).int()
        [logits] = hf(**inputs).logits                                      # (T, V)
        reply = hf.generate(**inputs)
        tokens = reply.sequences[0, ids.shape[1]:].tolist()
        new_logits = torch.cat(reply.logits)                                # (L, V)
        answers[name] = Answer(logits.float().cpu(), tokens, new_logits.float().cpu())
    return answers


# -------------------------------------------------------------------------------------- differences

def compare(name, ours, theirs, tolerance):
    """Prints how two Answers differ -> what differs beyond rounding, a list of texts."""
    faults = []
    scale = theirs.logits.abs().max().item()
    allowed = tolerance * scale
    apart = (ours.logits - theirs.logits).abs().max().item()
    if not apart <= allowed:                                    # nor where it is not a number
        faults.append(f"logits on {name}")
    T = len(theirs.logits)
    same = int((ours.logits.argmax(-1) == theirs.logits.argmax(-1)).sum())
    print(f"  {name:<12}logits within {apart:.1e} of each other, the largest {scale:.1f}; arg-max "
          f"the same at {same} of {T}")

    place = first_difference(ours.tokens, theirs.tokens)
    if place is None:
        print(f"  {'':<12}{len(ours.tokens)} greedy tokens, all the same")
        return faults
    note = ""
    if is_tie(theirs, place, ours.tokens, 2 * min(apart, allowed)):
        note = ", where two are as likely within rounding"
    else:
        faults.append(f"greedy tokens on {name}")
    print(f"  {'':<12}greedy tokens differ from number {place + 1} on{note}")
    return faults


def first_difference(ours, theirs):
    """The first place where two lists differ, None where they are the same."""
    for place, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def is_tie(theirs, place, tokens, allowed):
    """Whether transformers' logits put our token at this place as high as its own, but for
    `allowed`: each of two logits may be wrong by half of it."""
    if place >= min(len(tokens), len(theirs.tokens)):           # one ended where the other went on
        return False
    logits = theirs.new_logits[place]                                       # (V,)
    return bool(logits.max() - logits[tokens[place]] <= allowed)


# ------------------------------------------------------------------------ the published preparation

def compare_inputs(path, processor, transformers):
    """Prints whether transformers makes the same ids and patches -> what differs, a list of texts.

    Its AutoProcessor wants torchvision for videos. So its parts are asked: tokenizer, chat template
    and image processor.
    """
    try:
        theirs = their_inputs(path, transformers)
    except Exception as error:          # many kinds: files that are missing, templates that fail
        print(f"  {'prompts':<12}not compared: transformers' tokenizer or image processor gives "
              f"{type(error).__name__}: {printable(error)[:200]}")
        return []
    faults = []
    for name, conversation in conversations().items():
        ours = processor([conversation])
        ids, pixels, grid = theirs[name]
        texts = []
        if ids is None:
            texts.append("ids not compared, as there is no chat template")
        elif ids == ours["input_ids"][0].tolist():
            texts.append("the same ids")
        else:
            texts.append(f"other ids from place {first_difference(ours, ids)} on")
            faults.append(f"ids of {name}")
        if pixels is not None:
            levels = pixel_levels(ours, pixels, grid, processor.pictures)
            texts.append(f"pixels within {levels:.1f} of 255 levels")
            if not levels <= PIXEL_LEVELS:
                faults.append("pixels")
        print(f"  {name:<12}prompt: {', '.join(texts)}")
    return faults


def their_inputs(path, transformers):
    """{name: (ids or None, patches or None, grid or None)}: the conversations as transformers
    prepares them. No ids where the directory has no chat template."""
    local = dict(local_files_only=True, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
    look = transformers.AutoImageProcessor.from_pretrained(path, **local)
    older = Path(path) / "chat_template.json"
    template = tokenizer.chat_template
    if older.is_file():
        template = read_json(older).get("chat_template")

    inputs = {}
    for name, conversation in conversations().items():
        pixels = grid = ids = None
        places = 0
        if name == "picture":
            patches = look(images=[drawn_picture()], return_tensors="pt")
            pixels, grid = patches["pixel_values"], patches["image_grid_thw"]
            places = int(grid.prod()) // look.merge_size ** 2
        if template is not None:
            text = tokenizer.apply_chat_template(conversation, chat_template=template,
                                                 tokenize=False, add_generation_prompt=True)
            text = text.replace("<|image_pad|>", places * "<|image_pad|>")
            ids = tokenizer(text)["input_ids"]
        inputs[name] = ids, pixels, grid
    return inputs


def pixel_levels(ours, pixels, grid, settings):
    """How far patches lie apart, in steps of 1/255 before normalisation; infinite where they are
    cut otherwise."""
    our_pixels = ours["pixel_values"]
    if ours["image_grid_thw"].tolist() != grid.tolist() or our_pixels.shape != pixels.shape:
        return math.inf
    apart = (our_pixels - pixels).abs().unflatten(1, (3, -1))       # (patches, colours, numbers)
    std = torch.tensor(settings.image_std)[:, None]                 # (colours, 1)
    return 255 * (apart * std).max().item()


def main(argv=None):
    return run_command("model.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
