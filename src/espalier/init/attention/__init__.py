"""Self-attention: factors of matrices near the identity, the mimetic start, and the baselines it is compared with."""
