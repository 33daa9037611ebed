"""Detections against labels, as the benchmarks count them."""
