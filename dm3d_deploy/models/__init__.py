"""Detectors as torch modules with OpenPCDet's parameter names."""
