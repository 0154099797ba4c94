"""TorchRec's quantised DLRM, and its tables as the tensors that an export stores."""

from collections.abc import Mapping

import torch
from torch import nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import DataType
from torchrec.tensor_types import UInt4Tensor

from mlet_dist.export.encoding import Encoding
from mlet_dist.models.dlrm import TABLES_PREFIX, build_quantised_dlrm
from mlet_dist.models.spec import ModelSpec

_CPU = torch.device("cpu")


def build_served(spec: ModelSpec, encoding: Encoding, device: torch.device = _CPU) -> DLRM:
    """The DLRM whose tables hold rows of an encoding, to be filled by ``table_tensors`` and ``load_dense``."""
    return build_quantised_dlrm(spec, DataType(encoding.name.upper()), device)


def table_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """By state name, views of the tables' memory: values uint8 (for fp32, too), scales and biases float16."""
    return {
        # TorchRec shows four bits as if each had a column of its own.
        name: tensor.view(torch.uint8) if isinstance(tensor, UInt4Tensor) else tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{TABLES_PREFIX}embedding_bags.")
    }


def load_dense(model: nn.Module, dense: Mapping[str, torch.Tensor]) -> None:
    """Fill all that is no table from tensors by state name; KeyError where one is missing."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(dense[name])
