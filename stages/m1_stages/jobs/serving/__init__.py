"""``m1 generate --serve``: the engine behind a part of OpenAI's HTTP interface, on one device."""
