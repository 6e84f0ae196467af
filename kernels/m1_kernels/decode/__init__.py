"""A decoding step of all slots: what stands between the large products, in few kernels. No gradient flows."""
