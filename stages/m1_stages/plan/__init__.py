"""What a run will cost before it runs: parameters, FLOPs, memory, time, and how to spread it over GPUs. No torch.

``estimate.make_plan`` is the entry. Numbers measured once and used everywhere are in ``hardware.py`` alone.
"""
