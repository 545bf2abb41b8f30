"""Other projects' formulas for the same layers, written plainly and independently, to be timed against ours."""
