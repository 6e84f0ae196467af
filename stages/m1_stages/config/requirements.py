"""The forms of requirements that checks of a configuration share."""

from __future__ import annotations

from m1_stages.config.schema import Resolved
from m1_stages.errors import ConfigError


class Requirements:
    """What checks are made of; each method raises ``ConfigError`` with the key, and where its value comes from."""

    def __init__(self, resolved: Resolved) -> None:
        self.resolved, self.config = resolved, resolved.config

    def require(self, ok: bool, key: str, what: str, fix: str) -> None:
        """Refuse ``key`` unless ``ok``."""
        if not ok:
            origin = self.resolved.origins.get(key, "")
            raise ConfigError(what, where=f"{origin}, key {key}" if origin else f"key {key}", fix=fix)

    def positive(self, section: str, *keys: str) -> None:
        """Refuse keys of ``section`` that are not above 0."""
        target = self.config
        for part in section.split("."):
            target = target[part] if isinstance(target, dict) else getattr(target, part)
        for key in keys:
            value = getattr(target, key)
            self.require(value > 0, f"{section}.{key}", f"{section}.{key} is {value}", "give a value above 0")

    def not_negative(self, section: str, *keys: str) -> None:
        """Refuse keys of ``section`` that are below 0."""
        for key in keys:
            value = getattr(getattr(self.config, section), key)
            self.require(value >= 0, f"{section}.{key}", f"{section}.{key} is {value}", "give 0 or more")

    def share(self, key: str, value: float) -> None:
        """Refuse a value outside of 0 to 1."""
        self.require(0.0 <= value <= 1.0, key, f"{key} is {value}; a share lies between 0 and 1", "give 0 to 1")

    def cut(self, seq_len: int, where: str) -> None:
        """Refuse rows that do not divide: each context rank takes two equal parts, which sequence parallelism cuts by tensor."""
        p = self.config.parallel
        parts = (2 * p.context if p.context > 1 else 1) * p.tensor
        self.require(
            seq_len % parts == 0,
            "parallel.context" if p.context > 1 else "parallel.tensor",
            f"{where} has rows of {seq_len} tokens, which do not divide into {parts} equal parts "
            f"(tensor = {p.tensor}, context = {p.context}: two for each context-parallel rank)",
            "choose sizes by which 2 * parallel.context * parallel.tensor divides every context length",
        )
