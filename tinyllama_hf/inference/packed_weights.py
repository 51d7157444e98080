"""Linear layers with weights in the layout of oneDNN, for models that only compute on a CPU.

torch multiplies fp32 matrices with MKL, which takes 1.3 to 2.5 times as long on an AMD EPYC (`benchmarks/packing.py`).
torch has the operators below for compiled models. They differ from its own product by rounding only.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..provenance import processor_name


_ROWS = 8  # the number of rows that the layout is chosen for; it is nearly as fast for others


class PackedLinear(nn.Module):
    """A linear layer whose weights cannot be changed, trained or saved.

    Args:
        linear (`nn.Linear`): the layer, in fp32 on a CPU.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiplies `[..., in_features]`."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise InputError("model: its weights are packed, and cannot be saved. Load it again")


def pack_weights(model: PreTrainedModel) -> int:
    """Packs the linear layers of a model in place.

    On other devices, on Intel's processors, in other dtypes than fp32 and with adapters none are packed. This does not
    depend on measured times, so that the same machine gives the same results.

    Args:
        model (`PreTrainedModel`): a model that is not trained, changed or saved afterwards. Its tied embeddings are
            kept in addition to the packed head.

    Returns:
        The number of packed layers.
    """
    is_useful = model.device.type == "cpu" and torch.backends.mkldnn.is_available() and "Intel" not in processor_name()
    if not is_useful or hasattr(model, "peft_config"):
        return 0
    head = model.get_output_embeddings()  # in `TinyLlamaForCausalLM` a subclass, which computes the loss
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if (type(child) is nn.Linear or (child is head and isinstance(child, nn.Linear)))
        and child.weight.dtype == torch.float32
    ]
    for module, name, child in found:
        setattr(module, name, PackedLinear(child))
    return len(found)
