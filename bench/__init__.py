"""Speed as ratios against plain loops, measured in one run on one machine; no test depends on it."""
