"""Learning from batches: targets, losses, the loop. It knows no source of frames."""
