"""dm3d-deploy: prune LiDAR 3D object detectors by DM3D and leave a folder that can be deployed."""

__version__ = "0.1.0"
