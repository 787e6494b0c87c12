"""Models as ONNX files and `torch.export` programs."""
