"""ONNX graphs, on onnx-graphsurgeon."""
