"""Compat: other libraries' names for what peftlite does; `pl.compat.peft` has PEFT's."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import peftlite.compat.peft as peft
else:

    def __getattr__(name: str) -> object:
        if name != "peft":
            raise AttributeError(f"pl.compat has peft, and no {name!r}")
        import peftlite.compat.peft as peft  # imported when asked for

        return peft


__all__ = ["peft"]
