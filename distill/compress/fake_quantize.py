"""How training rounds activations for the flow "fx"; imported where torch.ao is needed."""

import torch
from torch import Tensor
from torch.ao.quantization import FakeQuantize


class Unsaturated(FakeQuantize):
    """Rounds as the kernels for x86 do: the scale spreads the observed range over 7 bits, so that sums of products do
    not overflow, but what lies outside of that range is cut off only where 8 bits end.

    torch.ao's own fake quantization cuts it off at 7 bits: a network would be trained in a range of which the kernels
    know nothing.
    """

    def forward(self, values: Tensor) -> Tensor:
        if self.observer_enabled[0] == 1:
            self.activation_post_process(values.detach())
            scale, zero_point = self.calculate_qparams()
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, 0, 255)
