"""Frames in: readers, the simulator, the calibration set and the gradients taken over it."""
