"""Which layers compute in dynamic int8, as torchao's PT2E asks for it; imported where torchao is needed."""

from torch import fx
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationConfig, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from distill.compress.flows import CONV, LINEAR


class Dynamic(Quantizer):
    """Linear, and with `conv` also convolutions that mix channels: there are no kernels for depthwise ones.

    torchao's own quantizer for XNNPACK leaves out a convolution in front of a ReLU, that is most of them.
    """

    def __init__(self, config: QuantizationConfig, conv: bool):
        super().__init__()
        self.config, self.conv = config, conv

    def annotate(self, graph: fx.GraphModule) -> fx.GraphModule:
        for node in graph.graph.nodes:
            if self.rounds(node):
                images, weight = node.args[:2]
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                    {images: self.config.input_activation, weight: self.config.weight}, _annotated=True
                )
        return graph

    def rounds(self, node: fx.Node) -> bool:
        if node.target not in (LINEAR, CONV) or node.args[1].op != "get_attr":  # a weight that is computed stays float
            return False
        return node.target == LINEAR or (self.conv and node.args[1].meta["val"].shape[1] > 1)

    def validate(self, graph: fx.GraphModule) -> None:
        pass
