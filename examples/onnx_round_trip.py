"""A bidirectional LSTM goes to ONNX, with its lengths, and ONNX Runtime computes the same.

    pip install torch onnx onnxscript onnxruntime .
    python examples/onnx_round_trip.py

In the file the layers are ONNX's own LSTM nodes, for any batch and length: whoever runs it needs no fastseq.
"""

import onnxruntime
import torch
from torch import Tensor, nn

import fastseq


class Classifier(nn.Module):
    """The mean of an LSTM's outputs over the valid steps, read by a linear layer."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.lstm = fastseq.nn.LSTM(inputs, width, num_layers=2, bidirectional=True, batch_first=True)
        self.read = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [B,T,inputs], lengths int64 [B] -> scores [B,classes]."""
        y, _ = self.lstm(x, lengths=lengths)  # 0 past the lengths
        return self.read(y.sum(1) / lengths[:, None])


def main() -> None:
    torch.manual_seed(0)
    model = Classifier(8, 32, 5).eval()
    example = torch.randn(3, 10, 8), torch.tensor([10, 4, 7])
    any_size = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        model, example, input_names=["x", "lengths"], output_names=["scores"], dynamo=True, verbose=False,
        dynamic_shapes=({0: any_size, 1: any_size}, {0: any_size}),
    )  # fmt: skip
    assert program is not None  # which it is without dynamo=True alone
    file = program.model_proto  # program.save("classifier.onnx") writes it
    nodes = [node.op_type for node in file.graph.node]
    print(f"{nodes.count('LSTM')} LSTM nodes among {len(nodes)}")

    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((3, 10), (1, 1), (16, 200)):
        x, lengths = torch.randn(batch, length, 8), torch.randint(1, length + 1, (batch,))
        with torch.no_grad():
            ours = model(x, lengths)
        (theirs,) = session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
        error = (ours - torch.from_numpy(theirs)).abs().max()
        print(f"{batch} sequences of {length} steps: largest difference {error:.1e}")


if __name__ == "__main__":
    main()
