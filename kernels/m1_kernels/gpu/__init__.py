"""Triton kernels. Imported only when the ``triton`` backend runs, so that triton stays optional."""
