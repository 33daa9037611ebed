"""What to prune: costs, rankings, distortion curves, allocation, patterns, masks."""
