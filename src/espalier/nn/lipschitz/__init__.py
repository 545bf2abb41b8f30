"""Parts of networks whose Lipschitz constant is known: each states it, and a certificate multiplies what it is told."""
