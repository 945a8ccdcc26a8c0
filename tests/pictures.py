"""Pictures for tests."""
import numpy as np
from PIL import Image


def picture(width, height, mode="RGB", seed=0):
    """A smooth pattern under noise, so that a wrong filter, order or channel shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 11), np.cos(x / 13)],
                     -1) * 90 + 128
    pixels = np.clip(waves + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)
    # the last channel of RGBA and LA is a transparency that varies
    if mode in ("RGBA", "CMYK", "LA"):
        channels = pixels[..., :len(Image.new(mode, (1, 1)).getbands())]
        return Image.frombytes(mode, (width, height), np.ascontiguousarray(channels).tobytes())
    return Image.fromarray(pixels[..., :3]).convert(mode)
