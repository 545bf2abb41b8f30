"""What orthogonal layers are made of: split-complex arithmetic, block inversion, real DFTs as products, a cache."""
