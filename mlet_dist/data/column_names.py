"""The names that columns, features and embedding tables may have."""

from typing import Any

# Tables are entries of torch's ModuleDict and ParameterDict, which do not allow their own attributes as keys.
MODULE_ATTRIBUTES = frozenset({
    "T_destination", "add_module", "apply", "bfloat16", "buffers", "call_super_init", "children", "clear",
    "compile", "copy", "cpu", "cuda", "double", "dump_patches", "eval", "extra_repr", "float", "forward",
    "fromkeys", "get", "get_buffer", "get_extra_state", "get_parameter", "get_submodule", "half", "ipu", "items",
    "keys", "load_state_dict", "modules", "mtia", "named_buffers", "named_children", "named_modules",
    "named_parameters", "parameters", "pop", "popitem", "register_backward_hook", "register_buffer",
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook", "register_load_state_dict_post_hook", "register_load_state_dict_pre_hook",
    "register_module", "register_parameter", "register_state_dict_post_hook", "register_state_dict_pre_hook",
    "requires_grad_", "set_extra_state", "set_submodule", "setdefault", "share_memory", "state_dict", "to",
    "to_empty", "train", "training", "type", "update", "values", "xpu", "zero_grad",
})  # fmt: skip

# A feature's name is part of file names and of the names of a model's tensors.
MAX_NAME_BYTES = 200  # file systems allow 255, which must also hold suffixes such as .parquet and .<uuid>.tmp
NAME_RULE = f"printable text of 1 to {MAX_NAME_BYTES} bytes without dots and slashes"
LABEL_NAME_RULE = "a name of letters, digits and _, which begins with a letter"
TABLE_NAME_RULE = f"{NAME_RULE} that does not begin with _ and is no attribute of a torch module (type, items, …)"


def is_name(value: Any) -> bool:
    """Return whether a column may have this name."""
    if not (isinstance(value, str) and value.isprintable()) or set(value) & set("./"):
        return False
    return 0 < len(value.encode()) <= MAX_NAME_BYTES


def is_label_name(value: Any) -> bool:
    """Return whether one of several labels may have this name, which is part of the names of metrics."""
    return is_name(value) and value.isascii() and value.isidentifier() and not value.startswith("_")


def is_table_name(value: Any) -> bool:
    """Return whether a sparse feature, and so its embedding table, may have this name."""
    return is_name(value) and not value.startswith("_") and value not in MODULE_ATTRIBUTES
