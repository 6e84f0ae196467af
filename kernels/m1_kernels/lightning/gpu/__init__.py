"""Triton and Gluon kernels of lightning attention. Imported only when the ``triton`` backend runs."""
