"""Depthwise filters: the covariance in closed form, measured statistics, and how well one fits the other."""
