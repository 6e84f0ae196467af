"""The tables of ``m1 plan``."""
