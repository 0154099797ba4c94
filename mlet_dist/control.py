"""The single layer that tells MLET's gain from a larger learning rate."""

import dataclasses
import math

from mlet_dist.config.sections import ModelConfig


def single_layer_control(model: ModelConfig, optimizer: str) -> tuple[ModelConfig, float]:
    """The single layer at MLET's initial scale, and the factor on the rows' learning rate that makes them equal.

    At initialisation E[W2ᵀW2] = kσ²I. MLET draws its rows σ√k times larger. Under SGD it steps W kσ² times further for
    the same gradient g. Under Adagrad a first step moves W1 by its learning rate times sign(g·W2ᵀ), and so W by kσ/√d
    times what a single layer moves along g, on average over Gaussian W2 and g.

    Args:
        model: the MLET model.
        optimizer: ``sgd`` or ``adagrad``.
    """
    if model.hidden_dim is None:
        return model, 1.0
    std = 1 / math.sqrt(model.hidden_dim) if model.projection_init_std is None else model.projection_init_std
    gain = std * math.sqrt(model.hidden_dim)
    control = dataclasses.replace(model, hidden_dim=None, rows_init_gain=model.rows_init_gain * gain)
    if optimizer == "sgd":
        return control, gain * gain
    return control, gain * math.sqrt(model.hidden_dim / model.embedding_dim)
