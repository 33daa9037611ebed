"""A spinning LiDAR in a made-up street, so that frames exist without any data set."""

from calib.simulator.frame import SimulatedFrame, simulate_frame
from calib.simulator.objects import CLASS_NAMES
from calib.simulator.sensor import SENSORS

__all__ = ["CLASS_NAMES", "SENSORS", "SimulatedFrame", "simulate_frame"]
