"""Which layers compute in dynamic int8, as torchao's PT2E asks for it; imported where torchao is needed."""

from torch import fx
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationConfig, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from distill.runtimes.graph import LINEAR


class Dynamic(Quantizer):
    """Linear layers. Convolutions stay float: XNNPACK answers wrongly where a 1×1 and a 3×3 one read the same tensor
    (SqueezeNet, GoogLeNet: 6 to 11 dB of signal to noise, a Linear has over 100), and in RegNet and MobileNetV3."""

    def __init__(self, config: QuantizationConfig):
        super().__init__()
        self.config = config

    def annotate(self, graph: fx.GraphModule) -> fx.GraphModule:
        for node in graph.graph.find_nodes(op="call_function", target=LINEAR):
            images, weight = node.args[:2]
            if weight.op == "get_attr":  # one that is computed stays float
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                    {images: self.config.input_activation, weight: self.config.weight}, _annotated=True
                )
        return graph

    def validate(self, graph: fx.GraphModule) -> None:
        pass
