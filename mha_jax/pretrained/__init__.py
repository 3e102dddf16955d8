"""Trained weights of other programs under our names and axes; files are read with NumPy alone, no pickle."""
