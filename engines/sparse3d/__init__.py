"""The 3D sparse backbone as a launch plan: planned from ONNX, run by an interpreter, by CUDA or by a C++ runtime."""
