"""What orthogonal layers are made of: complex arithmetic in planes, block inversion, real DFTs as products, a cache."""
