"""From ONNX to something that runs. Nothing here imports torch: it is what the vehicle computer installs."""
