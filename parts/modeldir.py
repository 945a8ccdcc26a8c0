"""A model directory: the files that belong to it, beside its weights."""
import shutil
from pathlib import Path

from parts.lora import load_adapter, save_adapter
from parts.stepfiles import load_prompts
from plumbing.files import write_json

CONFIG, TOKENIZER = "config.json", "tokenizer.json"             # without them there is no model
OTHER_FILES = (TOKENIZER, "tokenizer_config.json", "preprocessor_config.json",
               "processor_config.json", "generation_config.json", "chat_template.json",
               "chat_template.jinja")
PROMPTS = "prompts.json"                # the system prompts that a model was trained with


def prompts_in(folder):
    """The system prompts that a model directory was trained with; {} where it has none."""
    path = Path(folder) / PROMPTS
    return load_prompts(path) if path.exists() else {}


def write_model(path, model, origin, prompts, dtype=None):
    """Writes a model directory: our weights (or adapter) in that type; tokenizer and picture
    settings of the directory that training started from; the system prompts."""
    path.mkdir(parents=True, exist_ok=True)
    for name in OTHER_FILES:
        if (Path(origin) / name).exists():
            shutil.copy(Path(origin) / name, path / name)
    if prompts:
        write_json(path / PROMPTS, prompts)
    if hasattr(model, "lora"):
        save_adapter(model, path)
    else:
        model.save_pretrained(path, dtype)


def read_model(path, model):
    """The weights (or the adapter) of a checkpoint, into a model that is there."""
    if hasattr(model, "lora"):
        load_adapter(model, path)
    else:
        dtype = next(model.parameters()).dtype
        saved = type(model).from_pretrained(path, dtype=dtype)
        model.load_state_dict(saved.state_dict())


def keep_others(old, new):
    """Copies what is no part of a model from a directory to its successor. ValueError where the old
    one holds other files and no model."""
    paths = list(old.iterdir())
    if paths and not (old / CONFIG).is_file() and not (old / TOKENIZER).is_file():
        raise ValueError(f"{old}: holds other files and no model: name another place, nothing was "
                         "overwritten")
    new.mkdir()
    for path in paths:
        if path.name in (CONFIG, PROMPTS, *OTHER_FILES) or path.match("model*.safetensors*"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)
