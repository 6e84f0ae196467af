"""The tokenizer files of an export: those of the prepared data, without code of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1_data.chat.encoder import default_template
from m1_stages.errors import DataError

TEMPLATE = "chat_template.jinja"
_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFiles:
    """Names and bytes of the files, and the ids that the model's configuration names; None where the tokenizer has none."""

    files: dict[str, bytes]
    bos: int | None
    eos: int | None
    pad: int | None
    own_code: str = ""
    """What the source named as code of its own (``auto_map``), which is left out; empty without any."""

    @classmethod
    def of(cls, folder: Path, chat_template: Path | None = None) -> TokenizerFiles:
        """Read a tokenizer folder.

        Args:
            chat_template: Jinja file; None takes the tokenizer's own template, else the one shipped with m1.

        Raises:
            DataError: the folder has no readable tokenizer, or the chat template cannot be read.
        """
        from tokenizers import Tokenizer

        try:
            files = {name: (folder / name).read_bytes() for name in _COPIED if (folder / name).is_file()}
            tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
            config: dict[str, Any] = dict(json.loads(files["tokenizer_config.json"]))
        except Exception as error:  # tokenizers raises plain Exception
            reason = f"there is no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"cannot read the tokenizer: {reason}", where=str(folder), fix="run: m1 prepare-data"
            ) from error

        def token_id(key: str) -> int | None:
            value = config.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            return tokenizer.token_to_id(text) if isinstance(text, str) and text else None

        if own_code := config.pop("auto_map", None):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            files["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        if chat_template is not None:
            files[TEMPLATE] = _read_template(chat_template)
        elif TEMPLATE not in files and "chat_template" not in config:
            files[TEMPLATE] = default_template().encode()
        return cls(
            files=files,
            bos=token_id("bos_token"),
            eos=token_id("eos_token"),
            pad=token_id("pad_token"),
            own_code=json.dumps(own_code) if own_code else "",
        )

    @property
    def template(self) -> bytes:
        """The chat template that a loader takes: the file, else that of ``tokenizer_config.json``, of several the default one."""
        if TEMPLATE in self.files:
            return self.files[TEMPLATE]
        said = json.loads(self.files["tokenizer_config.json"])["chat_template"]
        if not isinstance(said, str):
            said = next((one["template"] for one in said if one["name"] == "default"), "")
        return str(said).encode()


def _read_template(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the chat template: {error}", where=str(path), fix="mend sft.chat_template"
        ) from error
    return data
