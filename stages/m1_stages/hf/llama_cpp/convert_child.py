"""Runs llama.cpp's converter with one answer of ours: ``convert_child.py SOURCES SPLIT ARGUMENT...``.

The converter recognises a tokenizer by a hash of how it encodes a text, and stops at those that are not in its list, though
llama.cpp can split text as they do. Here the method that looks into the list is asked first; where it finds nothing, the answer
is SPLIT.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def main(sources: str, split: str, arguments: list[str]) -> None:
    """Import the converter from ``sources`` and call it as its command line would."""
    sys.path.insert(0, sources)
    converter: Any = importlib.import_module("convert_hf_to_gguf")
    base: Any = importlib.import_module("conversion.base")
    look_up = base.TextModel.get_vocab_base_pre

    def answer(self: Any, tokenizer: Any) -> str:
        try:
            return str(look_up(self, tokenizer))
        except NotImplementedError:
            if not split:
                raise
            return split

    base.TextModel.get_vocab_base_pre = answer
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    converter.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
