"""The program that trained the bundled weights, linearsr-tiny, on one GPU."""
