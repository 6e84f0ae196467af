"""Exports for llama.cpp: its own converter writes them, its own library computes with them; none of its code is here."""
