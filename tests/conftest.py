"""What all tests share: the project root on the path, one thread, a way to run a script, and small
worlds and models that are made once. The files that use them only read them."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)          # for `python -m lab.world` from any folder
torch.set_num_threads(1)                     # tests are many small things: a second thread waits


def command(script, *words):
    """The words that start a script: "infer.py", or a module of the lab, "lab.world"."""
    start = ["-m", script] if script.startswith("lab.") else [str(ROOT / script)]
    return [sys.executable, *start, *map(str, words)]


def run(script, *words, **options):
    """Runs a script as a person would."""
    options = {"capture_output": True, "text": True, **options}
    return subprocess.run(command(script, *words), **options)


def made(script, *words, **options):
    """What `run` gives where it must succeed."""
    done = run(script, *words, **options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def golden():
    """Folder with published samples and reference numbers; tests that need it skip where it is
    absent."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden data at {GOLDEN}")
    return GOLDEN


@pytest.fixture(scope="session")
def tiny():
    """Folder of the shipped trained model."""
    return ROOT / "weights" / "tiny"


@pytest.fixture(scope="session")
def tiny_vlm(tiny):
    """The shipped trained model."""
    from model import VLM
    return VLM.from_pretrained(tiny)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder of a small training world: 39 questions on 40 countries, with its bases in `kb`,
    practice files beside it, and a shell of the tiny model in `shell`."""
    from retrieve import world_bases
    folder = tmp_path_factory.mktemp("world") / "world"
    made("lab.world", "--split", "train", "--countries", 40, "--questions", 39, "--practice", 8,
         "--out", folder)
    made("lab.world", "--shell", folder / "shell")
    world_bases(folder)
    return folder


@pytest.fixture(scope="session")
def shell(tmp_path_factory):
    """Folder of a very small model of two layers, without weights."""
    from lab.tiny import write_shell
    folder = tmp_path_factory.mktemp("shell") / "model"
    write_shell(folder, 32, 2, 2, 1, 48)
    (folder / "prompts.json").write_text('{"route": "plan", "answer": "read", "final": "answer"}')
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """For bad input: the smallest world `w` with its bases, a random model `m` that fits it, and an
    `adapter` of that model."""
    from model import VLM, add_lora, save_adapter
    from retrieve import world_bases
    out = tmp_path_factory.mktemp("faults")
    made("lab.world", "--countries", 12, "--questions", 13, "--out", out / "w",
         "--shell", out / "m", "--shape", 16, 1, 2, 1, 16)
    world_bases(out / "w")
    vlm = VLM.from_config(out / "m", seed=1)
    vlm.save_pretrained(out / "m")
    add_lora(vlm, 2, 4)
    save_adapter(vlm, out / "adapter")
    return out


@pytest.fixture(scope="session")
def noise_model(world, tmp_path_factory):
    """A random model in the shape of the tiny one: what it says is noise, what it is asked is real.
    """
    from model import VLM
    folder = tmp_path_factory.mktemp("noise") / "model"
    shutil.copytree(world / "shell", folder)
    VLM.from_config(folder, seed=0).save_pretrained(folder)
    (folder / "prompts.json").write_text('{"route": "plan", "answer": "read", "final": "answer"}')
    return folder


@pytest.fixture(scope="session")
def bases():
    """Three bases of a few sentences each (scripted.DOCS)."""
    from scripted import small_bases
    return small_bases()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small random model: as transformers has it, as we load it, its config and its folder."""
    from networks import make_pair
    return make_pair(tmp_path_factory.mktemp("small"))
