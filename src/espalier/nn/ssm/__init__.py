"""State-space layers: Mamba-1 and Mamba-2, their scans and what surrounds them."""
