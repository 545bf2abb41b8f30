"""Orthogonal layers: the Cayley transform of matrices and of kernels' spectra."""
