"""Geometry of points and boxes in numpy alone, because it runs in the vehicle."""
