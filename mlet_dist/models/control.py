"""The single layer that tells MLET's gain from a larger learning rate."""

import dataclasses
import math

from mlet_dist.config import ModelConfig


def single_layer_control(model: ModelConfig, optimizer: str) -> tuple[ModelConfig, float]:
    """The single layer at MLET's initial scale, and the factor on the rows' learning rate that makes them equal.

    At initialisation E[W2ᵀW2] = kσ²I, so MLET draws its rows σ√k times larger and, under SGD, steps them kσ² times
    further. An adaptive optimizer divides the gradient's scale out again: W1 moves by its own learning rate and W by
    σ√k times that.
    """
    if model.hidden_dim is None:
        return model, 1.0
    std = 1 / math.sqrt(model.hidden_dim) if model.projection_init_std is None else model.projection_init_std
    gain = std * math.sqrt(model.hidden_dim)
    control = dataclasses.replace(model, hidden_dim=None, rows_init_gain=model.rows_init_gain * gain)
    return control, gain * gain if optimizer == "sgd" else gain
