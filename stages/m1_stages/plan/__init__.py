"""Estimates what a run will cost: parameters, FLOPs, memory, time, and how to spread it over GPUs. It needs no torch.

``estimate.make_plan`` is the entry. Numbers measured once and used everywhere are in ``hardware.py`` alone.
"""
