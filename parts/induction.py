"""Half of an induction head, put into random weights by hand: a head that looks one token back."""
import math

import torch


@torch.no_grad()
def start_previous_token_head(model, layers=(0, 1), strength=10.0):
    """Lets query head 0 of the first layers start out attending to the token before.

    On the rotary pairs that turn with time the weights of its query and key are set to zero and
    their biases to constants: key (m, 0), query (m cos w, -m sin w) for a pair of speed w. After
    rotation the product is largest at distance one. The architecture is unchanged.
    """
    config = model.config
    D = config.head_dim
    speeds = config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)     # (D / 2,)
    m = math.sqrt(strength * math.sqrt(D))
    for layer in layers:
        attention = model.model.layers[layer].self_attn
        q, k = attention.q_proj, attention.k_proj
        q.weight[:D] *= 0.1
        for pair in range(config.mrope_section[0]):
            places = [pair, pair + D // 2]                      # of the two numbers of a pair
            cos, sin = math.cos(speeds[pair]), math.sin(speeds[pair])
            q.weight[places] = 0.0
            k.weight[places] = 0.0
            k.bias[places] = torch.tensor([m, 0.0])
            q.bias[places] = m * torch.tensor([cos, -sin])
