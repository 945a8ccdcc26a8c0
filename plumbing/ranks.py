"""Several GPUs: the ranks that share the work of one run.

`torchrun --nproc_per_node N train.py ...` starts N processes, the ranks, that train one model. Each
keeps 1 / N of weights, gradients and optimizer state (FSDP2, arXiv 2304.11277). All draw and decide
alike; prompts, groups and examples are dealt out, and the results are put together again.

A rank that waits for a message which another never sends waits forever. So whatever they exchange,
they exchange equally often. Without torchrun there is one rank, and all of this does nothing.
"""
import copy
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist


def join_ranks(device):
    """Meets the processes that torchrun started beside this one. ValueError for a --device that
    they cannot share."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: under torchrun say cpu or cuda; every rank takes the "
                         "GPU of its number")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))    # "cuda" is this rank's from here on
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")                      # the first rank speaks for all


def leave_ranks(code):
    """Ends a process that has met others, with its exit code; all its files are closed by now.

    The interpreter's teardown is left out, since gloo's threads abort in it now and then.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


# --------------------------------------------------------------------------------- sharing the work

def mine(items):
    """This rank's share of a list or a tensor: every N-th item."""
    return items[rank()::ranks()]


def gather(value):
    """The values of all ranks, in the order of the ranks; waits for all of them."""
    values = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def together(share):
    """The shares of all ranks, put together in the order that they had before `mine`."""
    shares = gather(share)
    items = [None] * sum(len(share) for share in shares)
    for number, share in enumerate(shares):
        items[number::len(shares)] = share
    return items


def total(*numbers):
    """The sum over all ranks of each of these numbers, a list."""
    return [sum(column) for column in zip(*gather(numbers))]


def in_step(batches, idle):
    """Yields (batch, 1) for each of this rank's batches, then (idle, 0) until the rank that has
    most is through: all ranks make equally many passes through the model."""
    for i in range(max(gather(len(batches)))):
        if i < len(batches):
            yield batches[i], 1
        else:
            yield idle, 0


def backward(loss, weight=1):
    """The gradient of the sum of all ranks' losses, of which FSDP would take the mean. weight: 0
    where a pass only keeps the other ranks company."""
    (loss * (ranks() * weight)).backward()


@contextmanager
def first_rank_first():
    """What is written on first use (a world, its bases) is written by the first rank; the others
    find it there."""
    if rank():
        gather(None)
    try:
        yield
    finally:
        if not rank():
            gather(None)


def tell(line, file=None):
    """A line for people, once whatever the number of ranks, by default on stderr. A screen that is
    gone (| head, a closed terminal) ends no run."""
    file = file or sys.stderr
    try:
        if not rank():
            print(line, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


# -------------------------------------------------------------------------------- sharing the model

def sharded(model):
    """The model as it is trained: itself where there is one rank, else a twin of which each rank
    keeps its share.

    The model itself is emptied; `Run.whole` fills it when all weights are needed in one place. In a
    pass the decoder's layers are gathered one by one. All else (embeddings, vision tower, head) is
    gathered together: were a block of the tower gathered by itself, a rank that shows no pictures
    would leave the others waiting there.
    """
    if ranks() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh      # here: they take a second
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)   # bfloat16 gradients add in float32
    same_parameters = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, same_parameters)                # modules of its own
    for module in (*twin.model.layers, twin):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for name in ("log_probs", "group_log_probs"):
        register_fsdp_forward_method(twin, name)
    empty(model)
    return twin


def expect_pictures(model, some):
    """Tells the model before a pass whether any rank shows pictures. If so, a rank without gives
    zeros as the vision tower's gradient; if not, nobody gives one, and AdamW leaves the tower
    alone, as it does with one rank."""
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
    tensor = tensor.to(p.device)
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
