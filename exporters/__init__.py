"""From torch to ONNX: the BEV head, the sparse 3D backbone, and checks of the graphs."""
