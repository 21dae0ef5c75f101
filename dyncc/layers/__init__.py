"""Mixing layers of the literature, written plainly in PyTorch: something to compile, to compare with and to read. One layer a file."""
