"""3D object detection in point clouds with linear group RNNs (LION, Liu et al. 2024, arXiv:2407.18232)."""
