"""Saving and loading as users of torch.distributed.checkpoint do it."""

import os
import warnings

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def save(folder, model, optimizer):
    """Every rank its shards."""
    weights, state = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        # Of torch 2.9's own code.
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=os.fspath(folder))


def load(folder, model, optimizer):
    """Into a fresh model and optimizer, on any number of ranks."""
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state}
    dcp.load(found, checkpoint_id=os.fspath(folder))
    set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )
