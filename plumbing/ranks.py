"""Several GPUs: the ranks that share the work of one run."""
import copy
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist


# ---------------------------------------------------------------------------------------------------------------- ranks
#
# `torchrun --nproc_per_node N train.py ...` starts N processes, the ranks, that train one model: each keeps 1 / N of
# weights, gradients and optimizer state (FSDP2, arXiv 2304.11277). All draw and decide alike; prompts, groups and
# examples are dealt out, and what the ranks find is put together. A rank that waits for a message which another never
# sends waits forever: whatever they exchange, they exchange equally often. Without torchrun there is one rank.


def join_ranks(device):
    """Meet the processes that torchrun started beside this one. ValueError for a --device that they cannot share."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: under torchrun say cpu or cuda; every rank takes the GPU of its number")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))              # from here on "cuda" is this rank's GPU
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")                                # the first rank speaks for all


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """What every rank has to say, in the order of the ranks; waits for all of them."""
    said = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(said, value)
    return said


@contextmanager
def first_rank_first():
    """What is written on first use (a world, its bases) is written by the first rank; the others find it there."""
    if rank():
        gather(None)
    try:
        yield
    finally:
        if not rank():
            gather(None)


def sharded(model):
    """The model as it is trained: itself where there is one rank, else a twin of which each rank keeps its share.

    The model itself is emptied; `Run.whole` fills it when all weights are needed in one place. In a pass the decoder's
    layers are gathered one by one. All else (embeddings, vision tower, head) is gathered together: were a block of the
    tower gathered by itself, a rank that shows no pictures would leave the others waiting there.
    """
    if ranks() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh            # here, because these imports take a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)             # bfloat16 gradients are added up in float32
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})   # modules of its own, the same parameters
    for module in (*twin.model.layers, twin):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for name in ("log_probs", "group_log_probs"):
        register_fsdp_forward_method(twin, name)
    empty(model)
    return twin


def expect_pictures(model, some):
    """Say before a pass whether any rank shows pictures. If so, a rank without gives zeros as the vision tower's
    gradient; if not, nobody gives one, and AdamW leaves the tower alone, as it does with one rank."""
    if ranks() > 1:
        model.set_reduce_scatter_unused_params(some)


def empty(model):
    for p in model.parameters():
        p.data = p.data.new_empty(0)


def full(tensor):
    """All of a tensor of which each rank may hold a share."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_of(tensor, p):
    """This rank's share of a full tensor, cut as the parameter p is."""
    if not hasattr(p, "placements"):
        return tensor.to(p.device)
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
