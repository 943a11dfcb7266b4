"""--tensor-parallel: the processes of torchrun that hold a part of one model each.

    torchrun --nproc-per-node 4 train_steering.py --dataset NAME --tensor-parallel

Rank 0 does what a single process does: it reads, decides, trains, writes and speaks. The others get
each of its trainings as a job, and run it with their part of the model on the same rows, writing
into a folder that nobody sees. The model is transformers' own; every rank has the whole vector.
If torchrun is gone, all of them end, with the memory that they hold.
In a single process, all of this does nothing.
"""

import datetime
import os
import threading
import time

import torch
from torch import distributed

WAIT = datetime.timedelta(hours=2)  # for one process, before the others give up


def _end_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def start(device):
    """Join the processes that torchrun has started; ValueError if it did not start this one.
    device: as `pick_device` gives it."""
    if "LOCAL_RANK" not in os.environ:
        how = "torchrun --nproc-per-node N train_steering.py ..."
        raise ValueError(f"--tensor-parallel: start it as {how}")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if (kind := torch.device(device).type) != (here.type if here else "cpu") or kind == "mps":
        raise ValueError(
            f"--tensor-parallel is for GPUs, or a CPU where there are none: not {kind}"
        )
    on_gpu = kind == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backends = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backends, timeout=WAIT)


def size():
    """How many processes share the model."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    """Which of them this is."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    if size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def jobs():
    """The other ranks: each job that rank 0 sends by `from_rank_0`, until it sends None."""
    return iter(lambda: from_rank_0(None), None)


def everywhere(flag):
    """Whether a flag is true on every rank."""
    return bool(least(flag))


def least(number):
    """The smallest of all ranks' numbers."""
    each = [number] * size()
    if size() > 1:
        distributed.all_gather_object(each, number)
    return min(each)


def share_gradients(parameters):
    """Give all ranks the gradients of rank 0, so that their vectors stay the same bit for bit."""
    if size() == 1:
        return
    for parameter in parameters:
        distributed.broadcast(parameter.grad, src=0)


def check_heads(config):
    """ValueError unless the ranks can share a model's attention heads evenly."""
    text = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(text, name, None) or 0
        if count % size():
            raise ValueError(f"--tensor-parallel: {size()} processes do not divide {name}, {count}")
