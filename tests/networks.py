"""Small random networks, as transformers has them and as we load them, and how they are compared.
Used by test_model, test_lora, test_weights, test_chat and test_vision."""
from types import SimpleNamespace

import torch

import model
from oracles import deviation, hf_logits, make_batch, make_config, make_model, save_checkpoint

CLOSE = 1e-4                                    # of the largest logit
GREEDY = dict(temperature=0.0)

BATCHES = {         # an int is that many words, (h, w) a picture of h x w patches
    "words": [[9]],                                                     # a window is 4 x 4 patches,
    "one picture": [[4, (8, 8), 5]],                                    # or 6 x 6
    "pictures of several sizes in a row": [[3, (6, 10), 2, (4, 4), (14, 2), 6]],
    "nothing but the smallest picture": [[(2, 2)]],
    "padded words": [[9], [3], [1]],
    "padded, with and without pictures": [[5, (6, 10), 3], [7], [(4, 4), 2, (14, 6), 9], [2]],
}
PICTURES = make_batch(make_config(), [[5, (6, 10), 3], [(4, 4), 2, (10, 6), 4], [8]], seed=5)
REAL = PICTURES["attention_mask"]               # (B, T)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_pair(folder, seed=0, **options):
    """A random checkpoint, as transformers has it (.hf) and as we load it from the same directory
    (.vlm)."""
    hf = make_model(make_config(**options), seed)
    path = save_checkpoint(hf, folder / "checkpoint")
    vlm = model.VLM.from_pretrained(path).eval()
    return SimpleNamespace(hf=hf, vlm=vlm, config=hf.config, path=path)


def fresh(pair):
    """The model of a pair once more, free to be changed."""
    return model.VLM.from_pretrained(pair.path)


@torch.no_grad()
def our_logits(vlm, batch):
    return vlm(**batch)


def assert_same_logits(vlm, hf, batch=PICTURES):
    """Ours against transformers' at all tokens that are not padding."""
    real = batch["attention_mask"]
    assert deviation(our_logits(vlm, batch)[real], hf_logits(hf, batch)[real]) < CLOSE
