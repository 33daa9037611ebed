"""A spinning LiDAR in a made-up street, so that frames exist without any data set."""
