"""The experiments behind docs/results, written with the public API as a user would write them."""
